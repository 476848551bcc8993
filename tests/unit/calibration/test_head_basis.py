"""Narrower heads: their bases keep the products, and which classes get them."""

from __future__ import annotations

import calibrated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tp_hf_config import HFConfigSyncHook, calibrate
from tp_hf_config.calibration.head_basis import _best_bases

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]

WEIGHTS = {"gpt2": 2, "clip": 12, "bart": 18, "opt": 6, "whisper": 18, "bloom": 0, "t5": 0}
"""Those that compute queries, keys or values: GPT-2's compute all three.

Bloom's heads are next to the biases of its positions, which have no slot for other bases; T5's have
a width of their own.
"""


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.data())
def test_the_first_columns_keep_the_products(seed: int, size: int, data: st.DataObject) -> None:
    """No choice of channels keeps more of them, and all columns keep all."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (
        torch.randn(40, size, dtype=torch.float64, generator=generator)
        @ torch.randn(size, size, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    kept = data.draw(st.integers(1, size))
    own, other = _best_bases((queries.T @ queries)[None], (keys.T @ keys)[None])
    assert torch.allclose(own[0] @ other[0].T, torch.eye(size, dtype=torch.float64), atol=1e-7)

    def lost(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((queries @ keys.T - queries @ first @ second.T @ keys.T).norm())

    some = torch.randperm(size, generator=generator)[:kept]
    channels = torch.eye(size, dtype=torch.float64)[:, some]
    found = lost(own[0][:, :kept], other[0][:, :kept])
    assert found <= lost(channels, channels) * (1 + 1e-6) + 1e-4


@pytest.mark.parametrize("name", calibrated.others_full(WEIGHTS, ("gpt2",)))
def test_classes_whose_heads_get_narrower(name: str) -> None:
    model = calibrated.build(name)
    calibration = calibrate(model, calibrated.batches(model, 24))
    hook = HFConfigSyncHook(refit=calibration)
    importance = calibration.importance()
    calibrated.pruner_of(model, hook, importance=importance, pruning_ratio=0.25).step()
    assert hook.last_report is not None
    result = hook.last_report.refits
    assert result is not None
    told = [note.partition(" weights that compute")[0] for note in result.notes if "basis" in note]
    assert told == [str(WEIGHTS[name])][: WEIGHTS[name]]
    if told:
        assert result.after == pytest.approx(result.refit, rel=0.1)
