"""Importances that are asked for a few channels at a time say what they say of whole layers."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from graph_cases import fresh, groups_of, llama, pruner_of
from torch import nn

from tp_hf_config.hook import unit_choice

IMPORTANCES = [
    tp.importance.MagnitudeImportance(),
    tp.importance.GroupMagnitudeImportance(p=1, normalizer=None, group_reduction="max"),
    tp.importance.GroupMagnitudeImportance(bias=True, group_reduction="sum", normalizer="max"),
    tp.importance.GroupMagnitudeImportance(target_types=[nn.LayerNorm]),
    tp.importance.LAMPImportance(),
    tp.importance.GroupTaylorImportance(bias=True),
    tp.importance.TaylorImportance(multivariable=True, group_reduction="prod"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_importances_in_pieces_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit, at sizes that no vector register divides."""
    model = small.bert(hidden_size=132, intermediate_size=203, num_hidden_layers=1).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    pruner, _ = pruner_of(model, ("intermediate_size", "hidden_size"))
    monkeypatch.setattr(unit_choice, "PIECE", 20_000)
    split = 0
    for group in groups_of(pruner):
        split += sum(len(list(unit_choice._pieces(item, (nn.Linear,), True))) > 1 for item in group)
        for importance in IMPORTANCES:
            whole = importance(group)
            parts = unit_choice._in_pieces(importance, group)
            assert whole is parts is None or torch.equal(whole, parts)
    assert split == 14  # seven linear layers, each by its rows and by its columns


def test_an_importance_of_the_users_own_gets_whole_groups():
    sizes = []

    class Own(tp.importance.GroupMagnitudeImportance):  # type: ignore[misc, name-defined]
        def __call__(self, group: Any) -> Any:
            sizes.append(len(group))
            return super().__call__(group)

    pruner, _ = pruner_of(fresh(llama), ("intermediate_size",), importance=Own())
    pruner.step()
    assert sizes == [3, 3]
