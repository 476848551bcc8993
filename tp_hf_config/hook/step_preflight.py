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
from ..model.shapes import named_modules
from .follow import Follower
from .history import PrunedGroup, layers_of
from .steering import is_plain

Shapes = dict[str, tuple[int, ...]]
_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")
"""The dicts that ``BasePruner._prune`` changes while it chooses (base_pruner.py, 1.6.1)."""


@contextmanager
def proved_first(pruner: Any, prove: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Prove all groups of a step together before the step cuts the first.

    The pruner chooses its groups twice, the second time with the importances of the first.  The
    groups of an interactive step are not proved: the user decides which of them to prune.

    Args:
        pruner: the pruner; nothing is proved if its step or its importance rules out to choose
            twice.
        prove: is given the chosen groups, and raises if no config could describe what they leave.
            Nothing is cut then, and the step does not count.
    """
    if not _chooses_freely(pruner):
        yield
        return
    choose, estimate = pruner._prune, pruner.estimate_importance
    own = {name: vars(pruner).get(name) for name in ("_prune", "estimate_importance")}
    stepping = True

    def prune() -> Iterator[Any]:
        if stepping and pruner.current_step <= pruner.iterative_steps:
            importances: list[Any] = []
            pruner.estimate_importance = _noting(estimate, importances)
            try:
                prove(_chosen(pruner, choose))
            except BaseException:
                pruner.current_step -= 1
                raise
            pruner.estimate_importance = lambda *args, **kwargs: importances.pop(0)
        yield from choose()

    pruner._prune = prune
    try:
        yield
    finally:
        stepping = False
        for name, value in own.items():
            _restore(pruner, name, value)


def check_step(follower: Follower, pruner: Any, groups: Sequence[Any], step: int) -> None:
    """Raise if no config could describe what a step's groups leave.

    Args:
        follower: the follower of the pruner's model.
        pruner: the pruner.
        groups: the groups that the step prunes; if their layers cannot be cut without data, nothing
            is checked.
        step: the number of the step, for the message.

    Raises:
        ConfigSyncError: no config could.
    """
    remaining = shapes_left(pruner, follower.model, groups)
    if remaining is None:
        return
    try:
        follower.check_left(
            [PrunedGroup(tuple(layers_of(pruner.DG, group))) for group in groups], remaining
        )
    except ConfigSyncError as error:
        reason = str(error).removesuffix(AGAIN).rstrip()
        raise ConfigSyncError(
            f"{type(pruner).__name__}: step {step} would end in this, and nothing of it is pruned: "
            f"{reason}",
            error.conflicts,
        ) from None


def _chooses_freely(pruner: Any) -> bool:
    """True if a pruner chooses as Torch-Pruning does, so that choosing twice changes nothing.

    OBD-C's importance (it has ``adjust_fisher``) rules that out: it is told what was chosen.
    """
    return is_plain(pruner) and not hasattr(pruner.importance, "adjust_fisher")


def _noting(estimate: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    """Wrap ``estimate`` so that each of its results is appended to ``seen``."""

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(estimate(*args, **kwargs))
        return seen[-1]

    return noting


def _chosen(pruner: Any, choose: Callable[[], Iterator[Any]]) -> list[Any]:
    """Return the groups that the pruner would prune now; restore what choosing changes."""
    before = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]
    try:
        return list(choose())
    finally:
        for now, was in before:
            now.clear()
            now.update(was)


def _restore(owner: Any, name: str, own: Any) -> None:
    """Give an object its own attribute back; without one (``None``), the class's applies."""
    vars(owner).pop(name, None)
    if own is not None:
        setattr(owner, name, own)


def shapes_left(pruner: Any, model: nn.Module, groups: Sequence[Any]) -> Shapes | None:
    """Return the shape of every parameter and saved buffer of a model once these groups are cut.

    Torch-Pruning's own functions cut copies of the layers on the meta device.

    Args:
        pruner: the pruner of the groups.
        model: the Hugging Face model.
        groups: the groups.

    Returns:
        Tensor name -> shape, or ``None`` if one of the functions cannot cut without data.
    """
    own = {id(module) for module in model.modules()}
    going: dict[tuple[int, bool], tuple[Any, Any, set[int]]] = {}
    for dep, idxs in (item for group in groups for item in group):
        module, out = dep.target.module, pruner.DG.is_out_channel_pruning_fn(dep.handler)
        if id(_owner(module)) not in own:
            continue  # units; to cut them would change the graph itself
        going.setdefault((id(module), out), (module, dep.handler, set()))[2].update(map(int, idxs))
    copies: dict[int, Any] = {}
    try:
        for module, handler, idxs in going.values():
            if idxs:
                _cut(copies, module, handler, sorted(idxs))
    except Exception:  # a function of Torch-Pruning or of the user may need data
        return None
    return _shapes_with(model, copies)


def _owner(module: Any) -> Any:
    """Return the module behind a view of a parameter; any other module itself."""
    return module.owner if isinstance(module, ParameterView) else module


def _cut(copies: dict[int, Any], module: Any, handler: Any, idxs: list[int]) -> None:
    """Cut the copy of a layer; make the copy if there is none."""
    owner = _owner(module)
    if id(owner) not in copies:
        copies[id(owner)] = _without_data(owner)
    if isinstance(module, ParameterView):
        held = copies[id(owner)]._parameters
        held = held if module.key in held else copies[id(owner)]._buffers
        gone = set(idxs)
        kept = [place for place in range(held[module.key].shape[module.dim]) if place not in gone]
        left = held[module.key].index_select(module.dim, torch.tensor(kept, device="meta"))
        held[module.key] = left
    else:
        handler(copies[id(module)], idxs)


def _without_data(module: Any) -> Any:
    """Return a copy of a layer, or of a tensor in it, on the meta device."""
    if isinstance(module, torch.Tensor):
        empty = torch.empty_like(module, device="meta")
        return nn.Parameter(empty, False) if isinstance(module, nn.Parameter) else empty
    duplicate = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        held = vars(module)[kind].items()
        vars(duplicate)[kind] = {
            key: None if value is None else _without_data(value) for key, value in held
        }
    return duplicate


def _shapes_with(model: nn.Module, copies: dict[int, Any]) -> Shapes:
    """Return the shapes of a model with the copies in place of their layers."""
    parameters: Shapes = {}
    buffers: Shapes = {}
    for name, module in named_modules(model):
        layer, prefix = copies.get(id(module), module), f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters[prefix + key] = tuple(layer._parameters[key].shape)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffers[prefix + key] = tuple(layer._buffers[key].shape)
    return parameters | buffers
