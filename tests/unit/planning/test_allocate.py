"""Widths by sensitivity: what the model misses least goes first, and the target is met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import layer_zoo
import pytest
import small
import torch
import torch_pruning as tp

from tp_hf_config import (
    HFConfigSyncHook,
    LayerCurve,
    UnsupportedModelError,
    allocate,
    calibrate,
)
from tp_hf_config.planning.allocate import _lagrangian

pytestmark = [
    pytest.mark.skipif(not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]


def llama(useless: int = 1) -> Any:
    """A model in whose layer of this number the feed-forward part hardly does anything."""
    model = calibrated.build("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[useless].mlp.down_proj.weight.mul_(1e-3)
    return model


@pytest.mark.parametrize("useless", [0, 1])
def test_a_layer_that_does_little_goes_first(useless: int) -> None:
    model = llama(useless)
    before = model.config.to_json_string()
    allocation = allocate(model, calibrate(model, calibrated.batches(model, 10)), target_params=0.8)
    assert model.config.to_json_string() == before
    assert type(model).__name__ == "LlamaForCausalLM"
    narrow, wide = (f"per_layer_config.{n}.intermediate_size" for n in (useless, 1 - useless))
    assert dict(allocation.widths) == {narrow: 38, wide: 76}
    assert allocation.evenness == 0.0  # halfway to equal shares costs more
    assert allocation.measure == "KL"
    assert str(allocation).splitlines()[1].startswith("intermediate_size, 96 in each layer -> ")


def test_it_is_carried_out_to_the_letter(tmp_path: Path) -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    allocation = allocate(model, calibration, target_params=0.85, round_to=4)
    old, new = allocation.parameters
    assert old == model.num_parameters()
    assert 0.83 * old < new <= 0.85 * old
    assert allocation.at(int(0.85 * old), round_to=4) == allocation
    assert allocation.at(old).ratios == {}
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance(),
        hooks=[HFConfigSyncHook(plan=allocation, refit=calibration)],
    )
    pruner.step()
    widths = layer_zoo.widths(model, ("intermediate_size",))["intermediate_size"]
    assert widths == list(allocation.widths.values())
    assert all(width % 4 == 0 for width in widths)
    assert model.num_parameters() == new
    allocation.plot(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 10_000
    assert allocation.to_dict()["parameters"] == {"before": old, "after": new}


@pytest.mark.parametrize(
    ("settings", "field", "possible"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "num_attention_heads", {6, 3}),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "num_attention_heads", {4, 3, 2}),
    ],
)
def test_widths_are_such_as_the_class_takes(
    settings: dict[str, int], field: str, possible: set[int]
) -> None:
    """Every key/value group loses as many query heads."""
    model = small.llama(**settings, hidden_size=48, head_dim=8, vocab_size=128)
    calibration = calibrate(model, calibrated.batches(model, 10))
    allocation = allocate(model, calibration, target_params=0.97, prune=[field])
    for target in range(allocation.parameters[1], allocation.parameters[0], 500):
        assert set(allocation.at(target).widths.values()) <= possible
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance(),
        hooks=[HFConfigSyncHook(plan=allocation, strict=True)],
    )
    pruner.step()
    assert layer_zoo.widths(model, (field,))[field] == list(allocation.widths.values())
    assert model.num_parameters() == allocation.parameters[1]


def test_sizes_of_a_layer() -> None:
    """Multiples that the class takes, in channels of heads, down to what was tried or it needs."""
    changes = {0.5: 0.1}
    assert LayerCurve("a", 9, 1, changes, multiple=3).sizes(1) == [9, 6]
    assert LayerCurve("a", 8, 1, changes, minimum=6).sizes(1) == [8, 7, 6]
    assert LayerCurve("a", 8, 1, changes, run=8).sizes(16) == [8, 6, 4]
    assert LayerCurve("a", 768, 1, changes, multiple=8).sizes(1)[:3] == [768, 760, 752]


def test_widths_between_the_cheapest_ones_and_equal_shares() -> None:
    """A unit of the second layer costs four times as much."""
    curves = [
        LayerCurve(name, 60, 1, {1.0: cost}, multiple=3) for name, cost in {"a": 1, "b": 4}.items()
    ]
    found = {evenness: _lagrangian(curves, 120, 90, None, evenness) for evenness in (0.0, 0.5, 1.0)}
    assert found[0.0] == ({"a": 36, "b": 54}, 90)
    assert found[0.5] == ({"a": 39, "b": 51}, 90)
    assert found[1.0] == ({"a": 45, "b": 45}, 90)


def test_what_cannot_be_is_refused() -> None:
    model = llama()
    calibration = calibrate(model, calibrated.batches(model, 10))
    with pytest.raises(
        ValueError, match=r"target_params=.* parameters remain even if the largest of shares="
    ):
        allocate(model, calibration, target_params=0.3)
    with pytest.raises(
        UnsupportedModelError,
        match=r"hidden_size is not a width that can differ from layer to layer\. .*: "
        "intermediate_size",
    ):
        allocate(model, calibration, target_params=0.9, prune="hidden_size")
    alone = calibrate(model, calibrated.batches(model, 1))
    with pytest.raises(
        UnsupportedModelError,
        match="compares layers on held-out batches, and the calibration has none",
    ):
        allocate(model, alone, target_params=0.9)


def test_changes_between_those_measured_rise_with_the_square_of_the_share() -> None:
    curve = LayerCurve("a", 100, 10, {0.2: 0.04, 0.4: 0.36})
    assert curve.change_at(0.0) == 0
    assert curve.change_at(0.1) == pytest.approx(0.01)
    assert curve.change_at(0.2) == pytest.approx(0.04)
    assert curve.change_at(0.3) == pytest.approx(0.16)
    assert curve.change_at(0.4) == pytest.approx(0.36)
