"""How much outputs change: what is compared, and along which axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

from tp_hf_config import CalibrationError
from tp_hf_config.calibration import held_out
from tp_hf_config.calibration.held_out import Difference


def change(before: Any, now: Any) -> tuple[str, float]:
    """What is measured of two outputs, and what it comes to."""
    difference = Difference()
    difference.note(0, before)
    difference.begin()
    difference.compare(0, now)
    return difference.measure, difference.mean()


def squared(before: Tensor, now: Tensor) -> float:
    return float((now - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 5)])
def test_logits_of_classes_are_compared_as_probabilities(shape: tuple[int, ...]) -> None:
    before, now = torch.rand(2, *shape)
    wanted, found = before.log_softmax(-1), now.log_softmax(-1)
    expected = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert change({"logits": before}, {"logits": now}) == ("KL", pytest.approx(expected))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_said(value: float) -> None:
    logits = torch.rand(2, 7, 5)
    logits[0, 3, 1] = value
    with pytest.raises(CalibrationError, match=r"output on held-out batch 1 .* is NaN or infinite"):
        change({"logits": logits}, {"logits": logits})


@pytest.mark.parametrize("shape", [(2, 1), (2, 7, 1), (2, 5, 6, 4), (3,)])
def test_other_logits_are_compared_as_they_are(shape: tuple[int, ...]) -> None:
    """A reward, the classes of an image's pixels: no softmax along the last axis tells of them."""
    before, now = torch.rand(2, *shape)
    result = change(
        {"loss": torch.tensor(1.0), "logits": before}, {"loss": torch.tensor(2.0), "logits": now}
    )
    assert result == ("squared error", pytest.approx(squared(before, now)))


def test_tensors_may_lie_deeper() -> None:
    before, now = torch.rand(2, 2, 4, 3, 3)
    outputs = [BackboneOutput(feature_maps=(one, one * 2)) for one in (before, now)]
    assert change(*outputs) == ("squared error", pytest.approx(squared(before, now)))


def test_an_output_without_tensors_is_refused() -> None:
    class Result:
        """What no one can look into."""

    nothing: tuple[object | Mapping[str, Any], ...] = (Result(), {"caption": "a cat"})
    for one in nothing:
        with pytest.raises(
            CalibrationError, match=r"the model returns a .* without tensors, so its outputs"
        ):
            Difference().note(0, one)


def test_of_large_outputs_some_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of every output, at equal distances, over all batches no more than fit."""
    monkeypatch.setattr(held_out, "_KEPT", 2 * 3 * 5 * 4)  # three rows of two batches
    pairs = [torch.rand(2, 2, 4, 5), torch.rand(2, 1, 3, 5)]
    difference = Difference(batches=2)
    for number, (before, _) in enumerate(pairs):
        difference.note(number, {"logits": before})
    difference.begin()
    expected = []
    for number, (before, now) in enumerate(pairs):
        difference.compare(number, {"logits": now})
        some = [0, 3, 7] if number == 0 else [0, 1, 2]
        wanted, found = (each.view(-1, 5)[some].log_softmax(-1) for each in (before, now))
        expected.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
    assert difference.mean() == pytest.approx(sum(expected) / 2)
