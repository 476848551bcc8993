"""The private members of Torch-Pruning that the library uses are there, in every version."""

from __future__ import annotations

import re
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
from torch import nn

from tp_hf_config.graph.pruner_access import Graph, Importance, Pruner

MEMBERS = [
    (protocol.__name__, name)
    for protocol in (Graph, Pruner, Importance)
    for name in (*protocol.__annotations__, *vars(protocol))
    if re.fullmatch(r"_[a-z]\w*", name) and not name.startswith("_abc")
    if name not in ("_is_protocol", "_is_runtime_protocol")
]


@pytest.fixture(scope="module")
def used() -> dict[str, Any]:
    pruner = tp.pruner.BasePruner(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        torch.ones(1, 4),
        importance=tp.importance.GroupMagnitudeImportance(),
    )
    return {"Graph": pruner.DG, "Pruner": pruner, "Importance": pruner.importance}


@pytest.mark.parametrize(("protocol", "member"), MEMBERS)
def test_it_is_there(protocol: str, member: str, used: dict[str, Any]) -> None:
    assert hasattr(used[protocol], member)


def test_every_one_that_is_used_is_named() -> None:
    private = r"\b(?:pruner|DG|importance)\.(_[a-z]\w+)"
    found = {
        name
        for folder in ("graph", "planning", "hook", "calibration")
        for path in (small.ROOT / "tp_hf_config" / folder).rglob("*.py")
        for name in re.findall(private, path.read_text())
    }
    assert found <= {name for _, name in MEMBERS}
