"""A tiny model is cheap to run: what costs and sets no width is lowered; bound fields follow."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_costs import costs, known_of
from torch import nn
from transformers import FalconH1Config, FalconH1ForCausalLM, Mamba2Config, Mamba2ForCausalLM

from tp_hf_config.fieldmap.field_map import Expression, Power
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.forward.head_splits import HeadSplits
from tp_hf_config.model.build import module_of
from tp_hf_config.twin.tiny.compute_budget import in_proportion, lighter, smaller_images
from tp_hf_config.twin.tiny.requirements import (
    Requirements,
    _keeps_order_alone,
    _several_per_unit,
    _shared,
    _still_shared,
)
from tp_hf_config.twin.tiny.shrink import _smaller, shrunken, small_tokens
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model


def test_a_size_that_costs_goes_down_as_far_as_is_needed() -> None:
    known = known_of(non_size_fields={("chunk",): 256, ("limit",): 1024})
    data = {"chunk": 256, "limit": 1024}
    assert lighter(known, data, 0, costs(10**5, "chunk")) == {"chunk": 16, "limit": 1024}


def test_a_light_class_keeps_all_sizes() -> None:
    known, data = known_of(non_size_fields={("chunk",): 256}), {"chunk": 256}
    assert lighter(known, data, 0, costs(10**4, "chunk")) == data


def test_what_may_count_the_experts_of_a_token_stays() -> None:
    known, data = known_of(non_size_fields={("top_k",): 32}), {"top_k": 32}
    seen = costs(10**6, "top_k")
    assert lighter(known, data, 32, seen) == data
    assert lighter(known, data, 8, seen) == {"top_k": 16}


def test_sizes_of_no_effect_cost_no_pass_each() -> None:
    """Of Granite Speech Plus's nine trials with lower sizes, seven computed as much as before."""
    idle = {(f"size {n}",): 256 for n in range(16)}
    known = known_of(non_size_fields={**idle, ("chunk",): 512})
    data = {"chunk": 512, **{name: 256 for (name,) in idle}}
    passes, seen = list[dict[str, Any]](), costs(10**5, "chunk")

    def counted(trial: dict[str, Any]) -> HeadSplits | None:
        if trial not in passes:
            passes.append(trial)
        return seen(trial)

    assert lighter(known, data, 0, counted) == {**data, "chunk": 32}
    assert len(passes) == 9  # of 52: all at once, then halves of those that may matter


def test_a_size_of_which_less_costs_more_is_as_it_was() -> None:
    patches = {("patches", 0): frozenset({("patch",)})}
    sizes = {("patch",): 16, ("hidden",): 64}
    width = {("layer.weight", 0): Expression(64, {frozenset({("hidden",)}): Fraction(1)})}
    known = known_of(sizes=sizes, unfitted=patches, expressions=width)
    data = {"patch": 6, "hidden": 24}
    passes = {6: 10**8, 16: 10**6}

    def seen(data: dict[str, Any]) -> HeadSplits:
        return HeadSplits(numbers=passes[data["patch"]] * data["hidden"])

    assert lighter(known, data, 0, seen) == {"patch": 16, "hidden": 24}
    passes[16] = 10**8
    assert lighter(known, data, 0, seen) == data


@pytest.mark.parametrize(
    ("experts", "heads", "taken", "left"), [(16, 8, 8, 16), (16, 8, 2, 8), (4, 4, 2, 4)]
)
def test_a_router_has_experts_to_choose_from(
    experts: int, heads: int, taken: int, left: int
) -> None:
    config = hf.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=taken,
        moe_intermediate_size=24,
        bos_token_id=1,
        eos_token_id=2,
    )
    field_map = map_of(module_of(config, hf.Qwen3MoeModel))
    small = field_map.builder.config(shrunken(field_map, field_map.depth.data, False))
    assert (small.num_experts, small.num_experts_per_tok) == (left, taken)


def test_equal_entries_of_a_list_go_down_together() -> None:
    known = known_of(non_size_fields={("windows", n): 512 for n in range(3)})
    seen = costs(10**4, "windows", legal=lambda data: len(set(data["windows"])) == 1)
    assert lighter(known, {"windows": [512] * 3}, 0, seen) == {"windows": [32] * 3}


def test_positions_go_down_where_they_are_how_long_the_inputs_are() -> None:
    known, data = known_of(sizes={("positions",): 1500}), {"positions": 1500}
    rows = [("positions",)]
    assert lighter(known, data, 0, costs(10**4, "positions"), rows) == {"positions": 375}
    assert lighter(known, data, 0, lambda data: HeadSplits(numbers=10**8), rows) == data


def test_bound_widths_shrink_in_proportion() -> None:
    sizes = {("hidden",): 4096, ("heads",): 128}
    known = known_of(
        ratio_partners={("hidden",): (("heads",),), ("heads",): (("hidden",),)}, sizes=sizes
    )
    seen = costs(1, "hidden", legal=lambda data: data["hidden"] == 32 * data["heads"])
    assert in_proportion(known, {"hidden": 4096, "heads": 128}, seen) == {"hidden": 128, "heads": 4}


def test_bound_widths_stay_larger_than_what_may_group_them() -> None:
    sizes = {("hidden",): 4096, ("heads",): 128, ("groups",): 8}
    known = known_of(
        ratio_partners={("hidden",): (("heads",),), ("heads",): (("hidden",),)}, sizes=sizes
    )
    data = {"hidden": 4096, "heads": 128, "groups": 4}
    seen = costs(1, "hidden", legal=lambda data: data["hidden"] == 32 * data["heads"])
    assert in_proportion(known, data, seen) == {"hidden": 256, "heads": 8, "groups": 4}


@pytest.mark.parametrize(
    ("model_class", "config_class", "frames"),
    [
        ("VoxtralEncoder", "VoxtralEncoderConfig", 30),  # as many as it has positions for
        ("ASTModel", "ASTConfig", 40),
        ("GlmAsrEncoder", "GlmAsrEncoderConfig", 64),
    ],
    ids=["Voxtral", "AST", "GLM-ASR"],
)
def test_sound_is_short_and_its_convolutions_are_no_experts(
    model_class: str, config_class: str, frames: int
) -> None:
    config = getattr(hf, config_class)()
    tiny = tiny_model(map_of(module_of(config, getattr(hf, model_class))))
    assert isinstance(tiny, TinyModel)
    (sound,) = (one for name, one in tiny.inputs.items() if name.startswith("input_"))
    assert max(sound.shape) == frames
    assert tiny.field_map.values[("hidden_size",)] <= 64


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Mamba2ForCausalLM, Mamba2Config(num_hidden_layers=2)),
        (FalconH1ForCausalLM, FalconH1Config(num_hidden_layers=2)),
    ],
    ids=["Mamba2", "FalconH1"],
)
def test_state_space_models_of_the_usual_size_are_tiny(model_class: Any, config: Any) -> None:
    tiny = tiny_model(map_of(module_of(config, model_class)))
    assert isinstance(tiny, TinyModel)
    assert sum(parameter.numel() for parameter in tiny.model.parameters()) < 80_000
    assert tiny.model.config.hidden_size < config.hidden_size // 32  # type: ignore[union-attr]


def test_a_width_shrinks_with_the_size_of_mambas_heads_and_what_is_twice_as_wide() -> None:
    config = hf.Zamba2Config()
    tiny = tiny_model(map_of(module_of(config, hf.Zamba2ForCausalLM)))
    assert isinstance(tiny, TinyModel)
    assert config.hidden_size == 2560
    assert tiny.field_map.values[("hidden_size",)] == 40
    assert tiny.field_map.values[("attention_hidden_size",)] == 80


def smaller(data: dict[str, int], *heads: str) -> list[dict[str, int]]:
    """What is tried for the width of a config with so many heads."""
    sizes = {(name,): size for name, size in data.items()}
    known = known_of(sizes=sizes, must_equal={}, expressions={}, unpruned=None)
    counts = [(name,) for name in heads]
    tried = _smaller(known, data, ("width",), counts, counts, together=False)
    return [{path[0]: value for path, value in one.items()} for one in tried]  # type: ignore[misc]


def test_as_many_key_value_heads_as_query_heads_stay_as_many() -> None:
    tried = smaller({"width": 2560, "heads": 40, "groups": 40}, "heads", "groups")
    assert {"width": 128, "heads": 2} in tried
    assert {"width": 128, "heads": 2, "groups": 2} in tried


def test_a_width_that_many_heads_split_is_as_large_as_they_need() -> None:
    assert smaller({"width": 1024})[-1] == {"width": 256}


def test_what_is_rounded_holds_no_unit_several_times() -> None:
    """An image of 448 has 32 patches of 14 a side: there may be fewer than its side is long."""
    slopes = {"positions": Fraction(32, 14), "fused": Fraction(3)}
    expressions = {
        (name, 0): SimpleNamespace(fields={("size",)}, terms={frozenset({("size",)}): slope})
        for name, slope in slopes.items()
    }
    assert _several_per_unit(known_of(expressions=expressions)) == [("fused", 0, ("size",))]


def test_images_that_set_widths_shrink_with_the_sizes_that_follow() -> None:
    data = {
        "vision": {"image_size": 1024, "patch_size": 16},
        "prompt": {"image_size": 1024, "grid": 64, "hidden": 256, "layer": 4},
    }
    sizes = {("vision", "image_size"): 1024, ("vision", "patch_size"): 16}
    sizes[("prompt", "hidden")] = 256  # not the side of a patch, of which there would be 4
    non_size_fields = {
        ("prompt", "grid"): 64,
        ("prompt", "image_size"): 1024,
        ("prompt", "layer"): 4,
    }
    known = known_of(data, sizes=sizes, non_size_fields=non_size_fields)
    first = next(smaller_images(known, data))
    assert first["vision"] == {"image_size": 64, "patch_size": 16}
    assert first["prompt"] == {"image_size": 64, "grid": 4, "hidden": 256, "layer": 4}


def test_the_sides_of_an_image_that_set_widths_stay_in_proportion() -> None:
    """SegGPT puts two square images on top of each other, and takes no other shape.

    An eighth and a quarter have as many patches in proportion, whatever a patch's side is.
    """
    sides = {("image_size", 0): 896, ("image_size", 1): 448}
    data = {"image_size": [896, 448], "width": 32}
    known = known_of(data, sizes={**sides, ("width",): 32})
    assert list(smaller_images(known, data)) == [
        {"image_size": [2 * size, size], "width": 32} for size in (56, 64, 96, 112, 128)
    ]


def test_the_tiny_seggpt_computes_little() -> None:
    """With images of full size it needed 126 GB for one pass."""
    field_map = map_of(module_of(hf.SegGptConfig(), hf.SegGptModel))
    data = shrunken(field_map, small_tokens(field_map), together=False)
    assert data["image_size"] == [112, 56]


class PaddedConfig(hf.PretrainedConfig):
    """A vocabulary and the tokens of it that are no padding, as Inkling's."""

    model_type = "padded"

    def __init__(self, vocab_size: int = 4096, tokens: int = 4000, **rest: Any):
        self.vocab_size, self.tokens = vocab_size, tokens
        self.widths = rest.pop("widths", [80, 82, 84, 86, 88, 90, 100])
        super().__init__(**rest)


class PaddedModel(hf.PreTrainedModel):
    """Saved with the padding, which is a number of rows."""

    config_class = PaddedConfig

    def __init__(self, config: PaddedConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.widths[0])
        sizes = [*config.widths, config.tokens]
        self.layers = nn.Sequential(*map(nn.Linear, sizes[:-1], sizes[1:]))
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scores of every token."""
        return self.layers(self.embed(input_ids))


def test_a_vocabulary_stays_as_large_as_what_it_is_padded_from() -> None:
    field_map = map_of(PaddedModel(PaddedConfig()))
    tiny = shrunken(field_map, field_map.depth.data, False)
    assert tiny["widths"] == [16, 24, 32, 40, 48, 64, 96]
    assert (tiny["tokens"], tiny["vocab_size"]) == (128, 128)


def test_a_width_as_large_as_the_image_is_no_patch() -> None:
    """GLM-Image merges one patch of each: no number of them along an image of 2,048 pixels."""
    data = {"image_size": 2048, "patch": 16, "merge": 1}
    sizes = {("image_size",): 2048, ("patch",): 16, ("hidden",): 2048}
    known = known_of(data, sizes=sizes, non_size_fields={("merge",): 1})
    assert [one["merge"] for one in smaller_images(known, data)] == [1] * len(
        list(smaller_images(known, data))
    )


def test_heads_that_would_be_narrow_are_known_before_the_class_is_built(monkeypatch: Any) -> None:
    model = module_of(hf.BertConfig(vocab_size=64, num_hidden_layers=1), hf.BertModel)
    field_map = map_of(model)
    required = Requirements(field_map, field_map.builder.build(field_map.depth.data))
    trial = {**field_map.depth.data, "hidden_size": 192}
    assert required.observed(trial).heads["encoder.layer.0.attention.self.query"] == ((12, 16),)
    monkeypatch.setattr(required, "builder", None)  # it is not asked
    assert required.observed({**trial, "hidden_size": 96}) is None
    assert required.observed({**trial, "num_attention_heads": 24}) is None


def test_a_norm_is_not_left_with_two_numbers() -> None:
    """Of those it keeps which is larger, no more, and all tokens are alike."""
    before = {"norm.weight": (64,), "mixer.A_log": (24,), "mixer.weight": (64, 64)}
    assert _keeps_order_alone(before, {**before, "norm.weight": (2,)})
    assert not _keeps_order_alone(before, {**before, "norm.weight": (4,)})
    assert not _keeps_order_alone(before, {**before, "mixer.A_log": (2,)})
    assert not _keeps_order_alone({**before, "norm.weight": (2,)}, {**before, "norm.weight": (2,)})


def test_a_dimension_of_which_nothing_is_left_holds_no_units() -> None:
    """PP-OCRv6's small detector: an eighth of a small width is no channel at all."""
    parts, field = {("layer.weight", 0): False}, ("hidden_size",)
    assert _still_shared(parts, field, {"hidden_size": 8}, {"layer.weight": (4, 2)})
    assert not _still_shared(parts, field, {"hidden_size": 8}, {"layer.weight": (0, 2)})


def test_what_is_a_single_unit_at_full_size_divides_nothing() -> None:
    """Mimi's upsampling has as many groups as channels, and wider stages behind half of a width."""
    width, groups = ("width",), ("groups",)
    values = {width: 64, groups: 64}
    half = {width: 1, ("compress",): -1}
    powers = {
        ("up.weight", 1): Power(1, {width: 1, groups: -1}, values),
        ("inner.weight", 0): Power(32, half, values),
        ("wider.weight", 0): Power(128, half, values),
    }
    known = known_of(values=values, expressions={}, powers=powers)
    assert _shared(known) == {}
    del powers["up.weight", 1]
    powers["in.weight", 0] = Power(64, half, values)
    places = {("inner.weight", 0): False, ("in.weight", 0): True}
    assert _shared(known) == {width: places}
