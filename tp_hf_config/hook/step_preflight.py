"""Preflight of one step: choose its groups without cutting, and prove what they leave."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigSyncError
from ..fieldmap.solve.explain import AGAIN
from ..graph.config_graph import ConfigGraph
from ..graph.config_group import ConfigGroup
from ..graph.sides import owner_of, tensors_to_cut
from ..model.shapes import Shapes, shapes
from ..model.surroundings import restore_attribute
from .agreement import Agreement
from .follow import Follower
from .history import PrunedGroup, layers_of
from .steering import is_unmodified

_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")
"""The dicts that ``BasePruner._prune`` changes while it chooses (base_pruner.py, 1.6.1)."""


@contextmanager
def prove_before_cutting(
    pruner: Any,
    refusing: Callable[[], AbstractContextManager[None]],
    prove: Callable[[Sequence[Any]], None],
    prepare: Callable[[Sequence[Any], bool], None] | None = None,
) -> Iterator[None]:
    """Prove all groups of a step together before the step cuts the first.

    The groups of an interactive step are not proved: the user decides which of them to prune.

    Args:
        pruner: the pruner; if its choice may depend on what is cut meanwhile, nothing is proved.
        refusing: surrounds all that comes before the first cut.
        prove: gets the chosen groups, and raises if no config could describe what they leave.
            Nothing is cut then, and the step does not count.
        prepare: gets the chosen groups once they are proved, and whether all of them are pruned for
            certain; in an interactive step that is the user's choice.
    """
    # OBD-C's importance (it has adjust_fisher) is told what was chosen: choosing changes it
    if not is_unmodified(pruner) or hasattr(pruner.importance, "adjust_fisher"):
        yield
        return
    choose, own = pruner._prune, vars(pruner).get("_prune")
    stepping = True

    def prune() -> Iterator[Any]:
        whole = stepping
        if (not whole and prepare is None) or pruner.current_step > pruner.iterative_steps:
            yield from choose()
            return
        with refusing(), _undone_if_refused(pruner):
            groups = list(choose())
            if whole:
                prove(groups)
            if prepare is not None:
                prepare(groups, whole)
        for group in groups:
            yield _as_numbered_now(pruner.DG, group)

    pruner._prune = prune
    try:
        yield
    finally:
        stepping = False
        restore_attribute(pruner, "_prune", own)


@contextmanager
def _undone_if_refused(pruner: Any) -> Iterator[None]:
    """If the block raises, restore what choosing groups changes, and do not count the step."""
    before = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]
    try:
        yield
    except BaseException:
        for current, old in before:
            current.clear()
            current.update(old)
        pruner.current_step -= 1
        raise


def _as_numbered_now(graph: ConfigGraph, group: ConfigGroup) -> ConfigGroup:
    """Return a group with its channels as they are numbered after the cuts since it was chosen."""
    if any(graph.other_sides_of(side) for side in group.graph_group.sides):
        return graph.group_at(group.graph_group, group.units)
    return group


def check_step(
    follower: Follower, agreement: Agreement, pruner: Any, groups: Sequence[Any]
) -> None:
    """Raise if no config could describe what a step leaves, or another rank would cut else.

    ``groups``: the groups that the step prunes; if their layers cannot be cut without data, no
    config is checked.

    Raises:
        ConfigSyncError: no config could.
        TrainingError: another rank would cut something else.
    """
    pruned = [PrunedGroup(tuple(layers_of(pruner.DG, group))) for group in groups]
    remaining = shapes_left(pruner, follower.model, groups)
    failure: ConfigSyncError | None = None
    try:
        if remaining is not None:
            follower.check_shapes_after(pruned, remaining)
    except ConfigSyncError as error:
        reason = str(error).removesuffix(AGAIN).rstrip()
        failure = ConfigSyncError(
            f"{type(pruner).__name__}: step {pruner.current_step} would end in this, and nothing "
            f"of it is pruned: {reason}",
            error.conflicts,
        )
    agreement.on_groups(pruner, pruned, failure)


def shapes_left(pruner: Any, model: nn.Module, groups: Sequence[Any]) -> Shapes | None:
    """Return the shape of every parameter and saved buffer of a model once these groups are cut.

    Copies of the layers on the meta device are cut, those that are not plain by Torch-Pruning's own
    functions.

    Returns:
        Tensor name -> shape, or ``None`` if one of the functions cannot cut without data.
    """
    modules = {id(module) for module in model.modules()}
    cuts: dict[tuple[int, bool], tuple[Any, Any, set[int]]] = {}
    for dep, idxs in (item for group in groups for item in group):
        module, out = dep.target.module, pruner.DG.is_out_channel_pruning_fn(dep.handler)
        if id(owner_of(module)) not in modules:
            continue  # units; to cut them would change the graph itself
        cuts.setdefault((id(module), out), (module, dep.handler, set()))[2].update(map(int, idxs))
    copies: dict[int, Any] = {}
    try:
        for (_, out), (module, handler, idxs) in cuts.items():
            if idxs:
                _cut(copies, module, out, handler, sorted(idxs))
    except Exception:  # a function of Torch-Pruning or of the user may need data
        return None
    return shapes(model, copies)


def _cut(copies: dict[int, Any], module: Any, out: bool, handler: Any, idxs: list[int]) -> None:
    """Cut one side of the copy of a layer; make the copy if there is none."""
    owner = owner_of(module)
    if id(owner) not in copies:
        copies[id(owner)] = _without_data(owner)
    duplicate, tensors = copies[id(owner)], tensors_to_cut(module, out)
    for _, key, dim, _ in tensors:
        held = duplicate._parameters if key in duplicate._parameters else duplicate._buffers
        held[key] = held[key].narrow(dim, 0, held[key].shape[dim] - len(idxs))
    if not tensors:
        handler(duplicate, idxs)


def _without_data(module: Any) -> Any:
    """Return a copy of a layer, or of a tensor in it, on the meta device."""
    if isinstance(module, torch.Tensor):
        empty = torch.empty_like(module, device="meta")
        return nn.Parameter(empty, False) if isinstance(module, nn.Parameter) else empty
    duplicate = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(duplicate)[kind] = {
            key: None if value is None else _without_data(value)
            for key, value in vars(module)[kind].items()
        }
    return duplicate
