"""Update an optimizer when its parameters are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ...arguments import check_arguments
from ...errors import TrainingError
from ...model.build import Refusal
from ...model.fill import told_of_cuts
from ...model.sharded import divided_like, is_dtensor, is_sharded, reshard, whole
from ...model.tensors import select

_PLAIN = (bool, int, float, str, type(None))


@check_arguments
@contextmanager
def optimizer_follows(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Update the optimizer's parameters and state when a pruning step replaces parameters.

    ::

        with optimizer_follows(model, optimizer):
            pruner.step()

    Every new Parameter replaces its old one in ``param_groups``. State of the parameter's shape
    (Adam's moments, momentum) keeps the positions that the parameter keeps; single numbers (step
    counts) do not change. Schedulers and gradient scalers need no update. If the step raises, the
    optimizer is updated for what was pruned until then.

    Args:
        model: the module whose parameters the optimizer has; under FSDP2, the currently sharded
            one. Afterwards the optimizer has the parameters of ``hook.sharded_model``.
        optimizer: the optimizer, or accelerate's wrapper around it.

    Raises:
        TrainingError: before the step, if the optimizer has parameters that are not the model's or
            have gradient hooks, or state of another shape than its parameter's. After the step, if
            something else than pruning replaced parameters.
    """
    inner = unwrapped(optimizer)
    reshard(model)
    refusal = cannot_follow(model, inner)
    if refusal is not None:
        raise TrainingError(refusal.reason)
    tracked = _Tracked(inner)
    with told_of_cuts(tracked.follow):
        yield
    known = {*model.parameters(), *(tracked.successors if is_sharded(model) else ())}
    orphans = [one for group in inner.param_groups for one in group["params"] if one not in known]
    if orphans:
        raise TrainingError(
            f"{len(orphans)} of the optimizer's parameters, the first of shape "
            f"{list(orphans[0].shape)}, were replaced, but not by pruning. The model is pruned. "
            "Make a new optimizer from model.parameters()."
        )


def unwrapped(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def cannot_follow(model: nn.Module, optimizer: Optimizer) -> Refusal | None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                return Refusal(
                    f"{kind} has a parameter of shape {list(parameter.shape)} that is not one of "
                    f"{type(model).__name__}'s. The optimizer may have been made before an earlier "
                    "pruning step. Make it from model.parameters(), and prune inside "
                    "optimizer_follows."
                )
            name = names[parameter]
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return Refusal(
                    f"{name} has gradient hooks, which the pruned Parameter would not have. Remove "
                    "them before pruning (an optimizer that steps inside the backward pass is not "
                    "supported)."
                )
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                fits, what = isinstance(value, _PLAIN), type(value).__name__
                if isinstance(value, Tensor):
                    fits = value.shape == parameter.shape or value.numel() == 1
                    what = f"tensor of shape {list(value.shape)}"
                if not fits:
                    return Refusal(
                        f"{kind} keeps {key!r} of {name}, a {what}, but the parameter "
                        f"has shape {list(parameter.shape)}. Only state of the parameter's shape "
                        "can be pruned with it. Use an optimizer with this kind of state (AdamW, "
                        "SGD, Lion)."
                    )
    return None


class _Tracked:
    """The parameters of an optimizer, which are replaced, with their state, as they are cut."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._places = {
            parameter: (group["params"], index)
            for group in optimizer.param_groups
            for index, parameter in enumerate(group["params"])
        }
        self.successors: set[nn.Parameter] = set()

    def follow(self, new: nn.Parameter, old: nn.Parameter, kept: Mapping[int, Tensor]) -> None:
        if old not in self._places:
            return
        states = self._optimizer.state
        if old in states:  # first, because memory may be short
            states[new] = {
                key: _remaining_state(value, old, new, kept) for key, value in states[old].items()
            }
            del states[old]
        parameters, index = self._places[new] = self._places.pop(old)
        parameters[index] = new
        self.successors.add(new)


def _remaining_state(
    value: Any, old: nn.Parameter, new: nn.Parameter, kept: Mapping[int, Tensor]
) -> Any:
    if not (isinstance(value, Tensor) and value.shape == old.shape):
        return value
    values = select(whole(value), kept) if kept else whole(value)
    return divided_like(values, new) if is_dtensor(value) else values
