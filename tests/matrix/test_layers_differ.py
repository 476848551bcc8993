"""Layers that differ: rankings, ratios and ignored layers that leave each layer its own widths.

Asked of each class: the config says what each layer is, the pruned model computes what the original
does with the removed units at zero, a fresh process that has nothing of this library loads it with
the same outputs and text, and it can be trained.  What a class cannot do is refused before the cut.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import layer_zoo
import pytest
import torch
import torch_pruning as tp

from tp_hf_config import HFConfigSyncHook, pruner_kwargs

pytestmark = [
    pytest.mark.skipif(
        not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
    ),
    pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning"),
]
HALF = 0.5


class Case(NamedTuple):
    """A class pruned in one way, in so many steps."""

    model: str
    way: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}-{self.way}-{self.steps}"


class Run(NamedTuple):
    """A pruned model, what it was, and its hook."""

    original: Any
    model: Any
    hook: HFConfigSyncHook


def first_layer(model: Any) -> torch.nn.Module:
    """The first layer of the first list whose layers may differ."""
    return next(module for name, module in model.named_modules() if name.endswith(layer_zoo.FIRST))


def arguments(model: Any, case: Case) -> dict[str, Any]:
    """What the pruner gets for a way of pruning."""
    settings: dict[str, Any] = {"pruning_ratio": HALF, "iterative_steps": case.steps}
    if case.way == "global":
        settings |= {"global_pruning": True, "pruning_ratio": 0.3}
    elif case.way == "isomorphic":
        settings |= {"global_pruning": True, "isomorphic": True, "pruning_ratio": 0.3}
    elif case.way == "dict":
        settings["pruning_ratio_dict"] = {first_layer(model): 0.25}
    else:
        settings["ignored_layers"] = [first_layer(model)]
    return settings


@functools.cache
def run_of(case: Case) -> Run:
    """Prune a case's model; once, for all tests that ask about it."""
    model = layer_zoo.build(case.model)
    original = copy.deepcopy(model)
    fields = layer_zoo.FIELDS[case.model]
    hook = HFConfigSyncHook(layers="differ")
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=fields, layers="differ", **arguments(model, case)),
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[hook],
    )
    for _ in range(case.steps):
        pruner.step()
    assert all(report.proof and report.error is None for report in hook.reports)
    return Run(original, model, hook)


CASES = [
    pytest.param(case, id=str(case))
    for name in layer_zoo.FIELDS
    for way in ("global", "isomorphic", "dict", "ignored")
    for case in (Case(name, way, 1), Case(name, way, 3))
    if (name, way) not in layer_zoo.REFUSED
]


@pytest.mark.parametrize("case", CASES)
def test_the_config_says_what_each_layer_is(case: Case) -> None:
    run = run_of(case)
    built = type(run.model)(copy.deepcopy(run.model.config))
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in run.model.named_parameters()
    }
    name = type(run.model).__name__
    if case.way in ("dict", "ignored"):
        before = layer_zoo.widths(run.original, layer_zoo.FIELDS[case.model])
        kept = {"dict": 0.75, "ignored": 1.0}[case.way]
        for field, (first, *others) in layer_zoo.widths(run.model, before).items():
            assert first == kept * before[field][0]
            assert set(others) == {HALF * before[field][1]}
    assert name.startswith("Layerwise") == bool(layer_zoo.entries(run.model))
    assert case.way not in ("dict", "ignored") or layer_zoo.entries(run.model)
