"""What a step is going to leave, known before it cuts: gone through once without cutting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import ConfigSyncError
from .explain import AGAIN
from .history import PrunedGroup, layers_of
from .reference import named_modules
from .steer import is_plain
from .sync import Follower
from .traced_groups import listed_groups
from .views import ParameterView

Shapes = dict[str, tuple[int, ...]]
_STATE = ("num_heads", "in_channel_groups", "out_channel_groups", "_scope_initial_channels")
"""What ``BasePruner._prune`` writes while it chooses (base_pruner.py, 1.6.1)."""


@contextmanager
def proved_first(pruner: Any, prove: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Around one step: all of its groups are proved together before the first is cut.

    The step goes through its choice twice, with the importances of the first time.  Groups that
    the user is handed (an interactive step) are the user's.

    Args:
        pruner: the pruner; where it chooses in a way of its own, nothing is proved.
        prove: raises where no config would say what these groups leave; then nothing is cut, and
            the step has not been.
    """
    if not _chooses_freely(pruner):
        yield
        return
    choose, estimate = pruner._prune, pruner.estimate_importance
    own = {name: vars(pruner).get(name) for name in ("_prune", "estimate_importance")}
    stepping = True

    def prune() -> Iterator[Any]:
        if stepping and pruner.current_step <= pruner.iterative_steps:
            seen: list[Any] = []
            pruner.estimate_importance = _noting(estimate, seen)
            try:
                prove(_chosen(pruner, choose))
            except BaseException:
                pruner.current_step -= 1
                raise
            pruner.estimate_importance = lambda *args, **kwargs: seen.pop(0)
        yield from choose()

    pruner._prune = prune
    try:
        yield
    finally:
        stepping = False
        for name, value in own.items():
            _restore(pruner, name, value)


def foretell(follower: Follower, pruner: Any, groups: Sequence[Any], step: int) -> None:
    """Refuse a step whose groups leave what no config says.

    Raises:
        ConfigSyncError: they do.
    """
    left = shapes_left(pruner, follower.model, groups)
    if left is None:
        return
    try:
        follower.foretell([PrunedGroup(tuple(layers_of(pruner.DG, one))) for one in groups], left)
    except ConfigSyncError as error:
        why = str(error).removesuffix(AGAIN).rstrip()
        raise ConfigSyncError(
            f"{type(pruner).__name__}: step {step} would end in this, and nothing of it is pruned: "
            f"{why}",
            error.conflicts,
        ) from None


def foretell_traced(follower: Follower, pruner: Any) -> None:
    """Refuse settings of a pruner on a traced graph that leave what no config says.

    Its first step and its last are gone through; one in between is when it comes.

    Raises:
        ConfigSyncError: they do.
    """
    for step in () if pruner.current_step else sorted({1, pruner.iterative_steps}):
        groups = chosen_at(pruner, step)
        if groups is not None:
            foretell(follower, pruner, groups, step)


def _chooses_freely(pruner: Any) -> bool:
    """Whether choosing twice is as choosing once: OBD-C's importance is told what it chose."""
    return is_plain(pruner) and not hasattr(pruner.importance, "adjust_fisher")


def _noting(estimate: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(estimate(*args, **kwargs))
        return seen[-1]

    return noting


def _chosen(pruner: Any, choose: Callable[[], Iterator[Any]]) -> list[Any]:
    """The groups that the pruner would prune now; it is as before afterwards."""
    before = [(getattr(pruner, name), dict(getattr(pruner, name))) for name in _STATE]
    try:
        return list(choose())
    finally:
        for now, was in before:
            now.clear()
            now.update(was)


def chosen_at(pruner: Any, step: int) -> list[Any] | None:
    """The groups of a step of a pruner that chooses each layer's channels by themselves.

    Importances decide which channels go, not how many, so any will do.

    Returns:
        ``None`` where the pruner chooses in a way of its own.
    """
    if not _chooses_freely(pruner) or pruner.global_pruning or pruner.isomorphic:
        return None
    groups, now = listed_groups(pruner), pruner.current_step
    own = vars(pruner).get("estimate_importance")
    own_listing = vars(pruner.DG).get("get_all_groups")
    try:
        pruner.estimate_importance, pruner.current_step = _any_importance, step
        pruner.DG.get_all_groups = lambda *args, **kwargs: iter(groups)
        return _chosen(pruner, pruner._prune)
    finally:
        pruner.current_step = now
        _restore(pruner, "estimate_importance", own)
        _restore(pruner.DG, "get_all_groups", own_listing)


def _restore(owner: Any, name: str, own: Any) -> None:
    """Give an object its own attribute back, or its class's."""
    vars(owner).pop(name, None)
    if own is not None:
        setattr(owner, name, own)


def _any_importance(group: Any) -> torch.Tensor | None:
    """Some importance of each channel; none where Torch-Pruning's have none (a norm alone)."""
    weighted = (nn.Linear, nn.modules.conv._ConvNd)
    if not any(isinstance(dep.target.module, weighted) for dep, _ in group):
        return None
    return torch.arange(len(group[0].idxs), dtype=torch.float)


def shapes_left(pruner: Any, model: nn.Module, groups: Sequence[Any]) -> Shapes | None:
    """The shape of every parameter and saved buffer of a model without what these groups cut.

    Torch-Pruning's own functions cut copies of the layers, on the meta device.

    Returns:
        ``None`` where one of them cannot.
    """
    own = {id(one) for one in (*model.modules(), *model.parameters())}
    going: dict[tuple[int, bool], tuple[Any, Any, set[int]]] = {}
    for dep, idxs in (item for group in groups for item in group):
        module, out = dep.target.module, pruner.DG.is_out_channel_pruning_fn(dep.handler)
        if id(_owner(module)) not in own:
            continue  # an operation between layers: cutting it would change the graph itself
        going.setdefault((id(module), out), (module, dep.handler, set()))[2].update(map(int, idxs))
    copies: dict[int, Any] = {}
    try:
        for module, handler, idxs in going.values():
            if idxs:
                _cut(copies, module, handler, sorted(idxs))
    except (
        Exception
    ):  # whatever a function of Torch-Pruning or of the user does not do without data
        return None
    return _shapes_with(model, copies)


def _owner(module: Any) -> Any:
    return module.owner if isinstance(module, ParameterView) else module


def _cut(copies: dict[int, Any], module: Any, handler: Any, idxs: list[int]) -> None:
    """Cut the copy of a layer, or of a bare parameter."""
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
    elif isinstance(module, nn.Parameter):
        copies[id(module)] = handler(copies[id(module)], idxs)
    else:
        handler(copies[id(module)], idxs)


def _without_data(module: Any) -> Any:
    """The copy of a layer, a parameter or a buffer on the meta device."""
    if isinstance(module, torch.Tensor):
        empty = torch.empty_like(module, device="meta")
        return nn.Parameter(empty, False) if isinstance(module, nn.Parameter) else empty
    made = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        held = vars(module)[kind].items()
        vars(made)[kind] = {key: None if one is None else _without_data(one) for key, one in held}
    return made


def _shapes_with(model: nn.Module, copies: dict[int, Any]) -> Shapes:
    """The shapes of a model some of whose layers are others."""
    parameters: Shapes = {}
    buffers: Shapes = {}
    for name, module in named_modules(model):
        layer, prefix = copies.get(id(module), module), f"{name}." if name else ""
        for key, one in module._parameters.items():
            if one is not None:
                left = copies.get(id(one), layer._parameters[key])
                parameters[prefix + key] = tuple(left.shape)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                buffers[prefix + key] = tuple(layer._buffers[key].shape)
    return parameters | buffers
