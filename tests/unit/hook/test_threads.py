"""Other threads prune, while this one constructs or steps a pruner with a hook."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch_pruning as tp
import torch_pruning.pruner.algorithms.base_pruner as tp_base
from other_thread import in_another_thread

from tp_hf_config import HFConfigSyncHook


def plain_result() -> tuple[Any, ...]:
    """Prune a model without a hook; return its graph's class and shapes, and what it comes from."""
    model = small.mlp()
    pruner = small.pruner_of(model)
    pruner.step()
    shapes = [tuple(model[i].weight.shape) for i in (0, 2, 4)]
    return type(pruner.DG), shapes, tp_base.dependency


def hooked_pruner(model: Any, meanwhile: Any) -> Any:
    """Return a pruner with a hook, in whose constructor ``meanwhile`` was called."""

    def schedule(ratio: float, steps: int) -> list[float]:
        meanwhile()
        return [0.0, ratio]

    return tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        iterative_pruning_ratio_scheduler=schedule,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[HFConfigSyncHook(prune=small.inside(model))],
    )


@pytest.mark.parametrize("run", [in_another_thread, lambda function: function()])
def test_a_pruner_without_a_hook_traces_for_itself(run: Any):
    results: list[Any] = []
    model = small.llama()
    pruner = hooked_pruner(model, lambda: results.append(run(plain_result)))
    assert len(results) >= 1
    own = (tp.DependencyGraph, [(8, 8), (6, 8), (4, 6)], tp.dependency)
    assert all(result == own for result in results)
    pruner.step()
    assert (model.config.hidden_size, model.config.intermediate_size) == (16, 32)
