"""Models to calibrate and prune: batches, units that stand twice, a ranking by place."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import small
import torch
import torch_pruning as tp
import zoo

from tp_hf_config import HFConfigSyncHook, calibrate
from tp_hf_config.model.tensors import tensor

BATCHES = 60


class Last(tp.importance.Importance):
    """The later a channel stands, the sooner it goes."""

    def __call__(self, group: Any) -> torch.Tensor:
        return -torch.arange(1 + max(group[0].root_idxs), dtype=torch.float32)


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of the zoo whose experts run without kernels, which take no float64."""
    model: Any = zoo.build(name).to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def batches(model: Any, count: int = BATCHES) -> list[dict[str, torch.Tensor]]:
    """Different inputs of a zoo's model."""
    return [zoo.inputs(model, seed) for seed in range(2, 2 + count)]


def pruner_of(model: Any, hook: HFConfigSyncHook | None = None, **settings: Any) -> Any:
    """A pruner that takes the last half of every width, unless the settings say otherwise.

    ``settings``: the pruner's, and without a ``hook`` the hook's too.
    """
    if hook is None:
        hook, settings = small.split(**settings)
    given = {"pruning_ratio": 0.5, "importance": Last(), **settings}
    return tp.pruner.MetaPruner(model, example_inputs=None, hooks=[hook], **given)


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the first tensor that a model returns."""
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    result = model(**given)
    first = result.get("logits")
    return next(iter(result.values())) if first is None else first


@torch.no_grad()
def duplicate(model: Any, pruner: Any, groups: Iterable[Any], data: Any) -> None:
    """Make every unit that a step takes a copy of one that stays, in all that writes it.

    What reads units is left as it is: a refit can add up what the two were read with. Exactly half
    of each group goes, so norms over the units see the same mean square.
    """
    places = set(calibrate(model, data).readings.by_place())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        graph_group, gone = group.graph_group, set(group.units)
        size = graph_group.units.count // graph_group.count.channel_groups
        copies: dict[int, int] = {}
        for start in range(0, graph_group.units.count, size):
            units = range(start, start + size)
            stays = [unit for unit in units if unit not in gone]
            goes = [unit for unit in units if unit in gone]
            assert len(stays) == len(goes)
            copies.update(zip(goes, stays, strict=True))
        for side in graph_group.sides:
            to, source = (side.table[list(u)].flatten() for u in (copies, copies.values()))
            for dim in side.dims:
                values = tensor(model, dim.name)
                if (names.get(id(values)), dim.dim) not in places:
                    values.index_copy_(dim.dim, to, values.index_select(dim.dim, source))


def chosen(pruner: Any) -> list[Any]:
    """The groups that the next step takes; nothing is pruned, and the step is still to come."""
    groups = list(pruner.step(interactive=True))
    pruner.current_step -= 1
    return groups


def others_full(names: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """Names to test with; ``make test`` runs the chosen ones alone."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.full) for name in names
    ]
