"""An optimizer follows what is pruned: its parameters, and its state with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .cuts import select
from .errors import TrainingError
from .lineage import Lineage, Origin, recording

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def optimizer_follows(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Around a pruning step: the optimizer goes on with what is left of its parameters.

    ::

        with optimizer_follows(model, optimizer):
            pruner.step()

    Every new Parameter takes its old one's place in ``param_groups``. State of a parameter's shape
    (Adam's moments, momentum) keeps exactly the positions that the parameter keeps; single numbers
    (step counts) stay. Schedulers and gradient scalers need nothing. Also if the step raises, the
    optimizer goes with the weights as they are then.

    Args:
        model: the module whose parameters the optimizer has.
        optimizer: the optimizer, or accelerate's wrapper around it.

    Raises:
        TrainingError: the optimizer has parameters that are not the model's, or state of another
            shape than its parameter's; before the step.
    """
    inner = unwrapped(optimizer)
    reason = why_not(model, inner)
    if reason is not None:
        raise TrainingError(reason)
    with recording() as lineage:
        try:
            yield
        finally:
            lost = _follow(model, inner, lineage)
    if lost:
        raise TrainingError(
            f"{len(lost)} of the optimizer's parameters, the first of shape {list(lost[0].shape)}, "
            "were replaced by something else than pruning. The model is pruned; make a new "
            "optimizer from model.parameters()."
        )


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers that have it as their ``optimizer``."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    plain: Optimizer = optimizer
    return plain


def why_not(model: nn.Module, optimizer: Optimizer) -> str | None:
    """Why an optimizer could not follow a model's pruning; None: it can."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                return (
                    f"{kind} has a parameter of shape {list(parameter.shape)} that is not one of "
                    f"{type(model).__name__}'s. It may have been made before an earlier pruning: "
                    "make it from model.parameters(), and prune inside optimizer_follows."
                )
            name = names[parameter]
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return (
                    f"{name} has hooks of its own on its gradient, which its pruned successor "
                    "would not have. Remove them before pruning (an optimizer that steps inside "
                    "the backward pass cannot follow)."
                )
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if not _follows(value, parameter):
                    return (
                        f"{kind} keeps {key!r} of {name}, {_described(value)}, where the parameter "
                        f"has shape {list(parameter.shape)}: only state of the parameter's shape "
                        "can follow it. Take an optimizer with such state (AdamW, SGD, Lion)."
                    )
    return None


def replace(
    optimizer: Optimizer, parameters: Mapping[nn.Parameter, tuple[nn.Parameter, Origin]]
) -> None:
    """Put new Parameters in the places of old ones; state keeps what the origin kept."""
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            if old not in parameters:
                continue
            new, origin = parameters[old]
            group["params"][place] = new
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[new] = {
                    key: _kept(value, old, origin) for key, value in state.items()
                }


def _follow(model: nn.Module, optimizer: Optimizer, lineage: Lineage) -> list[nn.Parameter]:
    """Follow what was cut; returns the optimizer's parameters that nothing was made of."""
    left = dict.fromkeys(model.parameters())
    heirs: dict[nn.Parameter, tuple[nn.Parameter, Origin]] = {}
    for parameter in left:
        origin = lineage.origin_of(parameter)
        if origin.kept:
            heirs.setdefault(origin.parameter, (parameter, origin))
    gone = {old: heir for old, heir in heirs.items() if old not in left}
    replace(optimizer, gone)
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in now if parameter not in left]


def _kept(value: Any, old: nn.Parameter, origin: Origin) -> Any:
    shaped = isinstance(value, torch.Tensor) and value.shape == old.shape
    return select(value, origin.kept) if shaped and origin.kept else value


def _follows(value: Any, parameter: nn.Parameter) -> bool:
    if isinstance(value, torch.Tensor):
        return value.shape == parameter.shape or value.numel() == 1
    return isinstance(value, _PLAIN)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
