"""Preflight of one step: choose its groups without cutting, and prove what they leave."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigSyncError
from ..fieldmap.solve.explain import AGAIN
from ..graph.sides import ParameterView
from ..model.shapes import Shapes, shapes
from ..model.surroundings import restore_attribute
from .follow import Follower
from .history import PrunedGroup, layers_of
from .steering import is_unmodified

_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")
"""The dicts that ``BasePruner._prune`` changes while it chooses (base_pruner.py, 1.6.1)."""


@contextmanager
def prove_before_cutting(
    pruner: Any,
    prove: Callable[[Sequence[Any]], None],
    prepare: Callable[[Sequence[Any], bool], None] | None = None,
) -> Iterator[None]:
    """Prove all groups of a step together before the step cuts the first.

    The pruner chooses its groups twice, the second time with the importances of the first.  The
    groups of an interactive step are not proved: the user decides which of them to prune.

    Args:
        pruner: the pruner; if it cannot choose twice, nothing is proved.
        prove: gets the chosen groups, and raises if no config could describe what they leave.
            Nothing is cut then, and the step does not count.
        prepare: gets the chosen groups once they are proved, and whether all of them are pruned for
            certain; in an interactive step that is the user's choice.
    """
    # OBD-C's importance (it has adjust_fisher) is told what was chosen: choosing changes it
    if not is_unmodified(pruner) or hasattr(pruner.importance, "adjust_fisher"):
        yield
        return
    choose, estimate = pruner._prune, pruner.estimate_importance
    own = {name: vars(pruner).get(name) for name in ("_prune", "estimate_importance")}
    stepping = True

    def prune() -> Iterator[Any]:
        whole = stepping
        if (whole or prepare is not None) and pruner.current_step <= pruner.iterative_steps:
            importances: list[Any] = []

            def recorded(*args: Any, **kwargs: Any) -> Any:
                importances.append(estimate(*args, **kwargs))
                return importances[-1]

            pruner.estimate_importance = recorded
            try:
                groups = _chosen_groups(pruner, choose)
                if whole:
                    prove(groups)
                if prepare is not None:
                    prepare(groups, whole)
            except BaseException:
                pruner.current_step -= 1
                raise
            pruner.estimate_importance = lambda *args, **kwargs: importances.pop(0)
        try:
            yield from choose()
        finally:
            if not whole:
                restore_attribute(pruner, "estimate_importance", own["estimate_importance"])

    pruner._prune = prune
    try:
        yield
    finally:
        stepping = False
        for name, value in own.items():
            restore_attribute(pruner, name, value)


def check_step(follower: Follower, pruner: Any, groups: Sequence[Any], step: int) -> None:
    """Raise if no config could describe what a step's groups leave.

    ``groups``: the groups that the step prunes; if their layers cannot be cut without data, nothing
    is checked.
    ``step``: the number of the step, for the message.

    Raises:
        ConfigSyncError: no config could.
    """
    remaining = shapes_left(pruner, follower.model, groups)
    if remaining is None:
        return
    try:
        follower.check_shapes_after(
            [PrunedGroup(tuple(layers_of(pruner.DG, group))) for group in groups], remaining
        )
    except ConfigSyncError as error:
        reason = str(error).removesuffix(AGAIN).rstrip()
        raise ConfigSyncError(
            f"{type(pruner).__name__}: step {step} would end in this, and nothing of it is pruned: "
            f"{reason}",
            error.conflicts,
        ) from None


def _chosen_groups(pruner: Any, choose: Callable[[], Iterator[Any]]) -> list[Any]:
    """Return the groups that the pruner would prune now; restore what choosing changes."""
    before = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]
    try:
        return list(choose())
    finally:
        for current, old in before:
            current.clear()
            current.update(old)


def shapes_left(pruner: Any, model: nn.Module, groups: Sequence[Any]) -> Shapes | None:
    """Return the shape of every parameter and saved buffer of a model once these groups are cut.

    Torch-Pruning's own functions cut copies of the layers on the meta device.

    Returns:
        Tensor name -> shape, or ``None`` if one of the functions cannot cut without data.
    """
    modules = {id(module) for module in model.modules()}
    cuts: dict[tuple[int, bool], tuple[Any, Any, set[int]]] = {}
    for dep, idxs in (item for group in groups for item in group):
        module, out = dep.target.module, pruner.DG.is_out_channel_pruning_fn(dep.handler)
        if id(_owner(module)) not in modules:
            continue  # units; to cut them would change the graph itself
        cuts.setdefault((id(module), out), (module, dep.handler, set()))[2].update(map(int, idxs))
    copies: dict[int, Any] = {}
    try:
        for module, handler, idxs in cuts.values():
            if idxs:
                _cut(copies, module, handler, sorted(idxs))
    except Exception:  # a function of Torch-Pruning or of the user may need data
        return None
    return shapes(model, copies)


def _owner(module: Any) -> Any:
    """Return the module behind a view of a parameter; any other module itself."""
    return module.owner if isinstance(module, ParameterView) else module


def _cut(copies: dict[int, Any], module: Any, handler: Any, idxs: list[int]) -> None:
    """Cut the copy of a layer; make the copy if there is none."""
    owner = _owner(module)
    if id(owner) not in copies:
        copies[id(owner)] = _without_data(owner)
    if isinstance(module, ParameterView):
        tensors = copies[id(owner)]._parameters
        tensors = tensors if module.key in tensors else copies[id(owner)]._buffers
        tensor, removed = tensors[module.key], set(idxs)
        remaining = [index for index in range(tensor.shape[module.dim]) if index not in removed]
        remaining_index = torch.tensor(remaining, device="meta")
        tensors[module.key] = tensor.index_select(module.dim, remaining_index)
    else:
        handler(copies[id(module)], idxs)


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
