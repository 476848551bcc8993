"""A tiny model that is still slow is made cheaper by numbers that its forward pass reads."""

from dataclasses import replace
from typing import Any

import torch
import transformers as hf
from tiny_costs import costs, known_of
from torch import nn

from tp_hf_config.fieldmap.learn_field_map import map_of, numbers_read
from tp_hf_config.forward.head_splits import HeadSplits
from tp_hf_config.model.build import Builder
from tp_hf_config.twin.tiny import compute_budget
from tp_hf_config.twin.tiny.compute_budget import (
    cheaper,
    images_in_proportion,
    with_equal_values,
    with_smaller_inputs,
)
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model


class QueriesConfig(hf.PretrainedConfig):
    """A detector that reads how many objects it looks for while it runs, as RT-DETR does."""

    model_type = "queries"

    def __init__(self, queries: int = 300, width: int = 24, inner: int = 16, **rest: Any):
        self.queries, self.width, self.inner = queries, width, inner
        super().__init__(**rest)


class QueriesModel(hf.PreTrainedModel):
    """Takes the best places of an image, so that it has to have as many."""

    config_class = QueriesConfig

    def __init__(self, config: QueriesConfig):
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.width, 8, stride=8)
        self.score = nn.Linear(config.width, 1)
        self.layers = nn.Sequential(
            nn.Linear(config.width, config.inner),
            nn.ReLU(),
            nn.Linear(config.inner, config.width),
        )
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the best places hold, each beside all others."""
        places = self.patches(pixel_values).flatten(2).transpose(1, 2)
        best = self.score(places)[..., 0].topk(self.config.queries, dim=1).indices
        chosen = places.gather(1, best[..., None].expand(-1, -1, places.shape[-1]))
        rounds = 40 * torch.ones(1, 40, 1, 1, device=chosen.device, dtype=chosen.dtype)
        return self.layers(chosen) + (rounds * chosen[:, None]).mean(1)


def test_numbers_that_only_the_forward_pass_reads_are_found() -> None:
    builder = Builder(QueriesModel(QueriesConfig()))
    data = QueriesConfig().to_dict()

    def run(model: nn.Module) -> None:
        model(pixel_values=torch.empty(1, 3, 224, 224, device="meta"))

    assert numbers_read(builder, data, run) == {("queries",): 300}
    assert numbers_read(builder, {**data, "width": -1}, run) == {}


def test_a_slow_detector_looks_for_fewer_objects_in_a_smaller_image(monkeypatch: Any) -> None:
    field_map = map_of(QueriesModel(QueriesConfig()))
    assert field_map.recipe.form == 1  # 64 pixels a side have 64 places, of 300
    monkeypatch.setattr(compute_budget, "_SLOW", 20_000)
    monkeypatch.setattr(compute_budget, "_HEAVY", 10_000)
    tiny = tiny_model(field_map)
    assert isinstance(tiny, TinyModel)
    assert tiny.field_map.data["queries"] == 10
    assert tiny.inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert tiny.full_field_map is field_map


def test_a_detector_that_is_fast_keeps_its_image_and_its_objects() -> None:
    tiny = tiny_model(map_of(QueriesModel(QueriesConfig())))
    assert isinstance(tiny, TinyModel)
    assert tiny.field_map.data["queries"] == 300
    assert tiny.inputs["pixel_values"].shape == (2, 3, 224, 224)


def test_only_a_form_of_inputs_with_which_a_slow_model_goes_as_far_replaces_another(
    monkeypatch: Any,
) -> None:
    field_map = map_of(QueriesModel(QueriesConfig()))
    monkeypatch.setattr(compute_budget, "_SLOW", 20_000)
    model = field_map.build_at({})
    assert isinstance(model, nn.Module)
    assert with_smaller_inputs(model, field_map.recipe) == field_map.recipe  # 300 of 64 places
    fewer: Any = field_map.builder.build({**field_map.data, "queries": 10})
    assert with_smaller_inputs(fewer, field_map.recipe).form == 0
    users = replace(field_map.recipe, make_inputs=lambda config: {})
    assert with_smaller_inputs(fewer, users) == users


def slow(read: Any, monkeypatch: Any) -> None:
    """Let a forward pass read these numbers."""
    monkeypatch.setattr(compute_budget, "numbers_read", lambda *_: read)


def test_a_number_goes_down_to_its_smallest_divisor_that_the_class_takes(monkeypatch: Any) -> None:
    slow({("frames",): 1500}, monkeypatch)
    seen = costs(10**5, "frames", legal=lambda data: data["frames"] % 6 == 0)
    known = known_of()
    known.recipe = None
    assert cheaper(known, {"frames": 1500}, 0, seen) == {"frames": 12}
    assert cheaper(known, {"frames": 1500}, 16, seen) == {"frames": 30}  # more than 16 experts
    assert cheaper(known, {"frames": 48}, 0, seen) == {"frames": 48}  # fast enough


def test_what_sets_a_width_is_lowered_only_where_it_counts_positions(monkeypatch: Any) -> None:
    slow({("rows",): 900}, monkeypatch)
    known = known_of(sizes={("rows",): 900})
    known.recipe = None
    seen = costs(10**5, "rows")
    assert cheaper(known, {"rows": 900}, 0, seen) == {"rows": 900}
    assert cheaper(known, {"rows": 900}, 0, seen, [("rows",)]) == {"rows": 9}


def test_numbers_of_equal_value_go_down_together_or_alone(monkeypatch: Any) -> None:
    slow({("one",): 100, ("two",): 100}, monkeypatch)
    known, data = known_of(), {"one": 100, "two": 100}
    known.recipe = None
    equal = costs(10**6, "one", legal=lambda data: data["one"] == data["two"])
    assert cheaper(known, data, 0, equal) == {"one": 10, "two": 10}
    single = costs(10**6, "one", legal=lambda data: data["two"] == 100)
    assert cheaper(known, data, 0, single) == {"one": 10, "two": 100}


def test_numbers_of_no_effect_cost_no_pass_each(monkeypatch: Any) -> None:
    numbers = {(f"number {n}",): 100 + n for n in range(16)}
    slow(numbers, monkeypatch)
    known, data = known_of(), {name: n for (name,), n in numbers.items()}
    known.recipe = None
    passes: list[dict[str, Any]] = []

    def seen(trial: dict[str, Any]) -> HeadSplits:
        passes.extend([trial] if trial not in passes else [])
        return HeadSplits(numbers=10**8)

    assert cheaper(known, data, 0, seen) == data
    assert len(passes) == 2


class Bounded:
    """Requirements of a class that costs something beside its widths; counts the passes."""

    def __init__(self, constant: float) -> None:
        self.constant = constant
        self.passes = 0

    def cost(self, trial: dict[str, Any]) -> float:
        self.passes += 1
        return self.constant + sum(10**7 * width for width in trial.values())


def test_widths_stay_different_where_they_do_not_decide(monkeypatch: Any) -> None:
    data = {f"width {n}": 40 + n for n in range(6)}
    fields: list[Any] = [(name,) for name in data]

    def lower(data: dict[str, Any], field: Any) -> Any:
        yield {field: 4}

    few: Any = Bounded(10**11)
    assert with_equal_values(data, fields, lower, few) == data
    assert few.passes == 2
    decisive: Any = Bounded(10**6)
    assert with_equal_values(data, fields, lower, decisive) == dict.fromkeys(data, 4)


def test_an_image_and_the_maps_of_its_features_shrink_together(monkeypatch: Any) -> None:
    """SAM 2's maps are listed: a quarter, an eighth and a sixteenth of the image's side."""
    data = {
        "vision": {"image_size": [1024, 1024], "maps": [[256, 256], [128, 128], [64, 64]]},
        "prompt": {"image_size": 1024, "patch_size": 16, "layer": 9, "window": 14},
    }
    numbers = {("vision", "maps", row, side): 256 >> row for row in range(3) for side in range(2)}
    numbers |= {("vision", "image_size", side): 1024 for side in range(2)}
    numbers |= {("prompt", "image_size"): 1024, ("prompt", "patch_size"): 16}
    numbers |= {("prompt", "layer"): 9, ("prompt", "window"): 14}
    first = next(images_in_proportion(known_of(data), data, numbers))
    assert first["vision"] == {"image_size": [64, 64], "maps": [[16, 16], [8, 8], [4, 4]]}
    assert first["prompt"] == {"image_size": 64, "patch_size": 16, "layer": 9, "window": 14}
    slow(numbers, monkeypatch)

    def seen(trial: dict[str, Any]) -> HeadSplits:
        return HeadSplits(numbers=10**5 * trial["prompt"]["image_size"])

    known = known_of(data)
    known.recipe = None
    assert cheaper(known, data, 0, seen)["prompt"]["image_size"] == 64


def test_maps_that_are_larger_than_the_patches_are_many_shrink_too() -> None:
    """SAM 3's largest map has four places a patch of 14 pixels: 288 for 1008 pixels."""
    data = {"image_size": 1008, "maps": [288, 144, 72]}
    numbers = {("maps", n): size for n, size in enumerate(data["maps"])} | {("image_size",): 1008}
    first = next(images_in_proportion(known_of(data), data, numbers))
    assert first == {"image_size": 84, "maps": [24, 12, 6]}
    assert not list(images_in_proportion(known_of({"size": 64}), {"size": 64}, {("size",): 64}))
