"""A model without weights that is pruned in the place of one that FSDP2 keeps in shards.

The stand-in has the class, the config and the shapes of the sharded model. Its parameters, and
their gradients, are gathered from the shards whenever something is computed with them, and freed
again, so a pruner can work on it as on any model. Every rank has a stand-in of its own and works on
it alike, so all ranks gather the same parameter at the same time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ..errors import UnsupportedModelError
from ..model.config_json import config_json
from ..model.fill import fill
from ..model.lazy_tensor import LazyTensor
from ..model.locate import check_followable, find_pretrained
from ..model.shapes import shapes
from ..model.sharded import is_sharded, plain_class, reshard, whole
from ..model.tensors import state_of
from .rebuild import empty_copy
from .taking_turns import InterruptedByRankError, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StandIn:
    """A stand-in, and the sharded model that it reads.

    Args:
        sharded: the model under ``fully_shard``; whoever prunes has to hold it.

    Attributes:
        model: the stand-in.

    Raises:
        UnsupportedModelError: the sharded model's config does not build it.
    """

    def __init__(self, sharded: PreTrainedModel):
        self._sharded = weakref.ref(sharded)
        self._state = state_of(sharded)
        self._turns: Turns | None = None
        self._numbers = {name: n for n, (name, _) in enumerate(sharded.named_parameters())}
        self.model: PreTrainedModel = empty_copy(sharded)
        fill(
            self.model,
            self.model,
            lambda name, empty: LazyTensor(empty, partial(self._values, name)),
        )

    @property
    def sharded(self) -> PreTrainedModel:
        """The model that the stand-in reads now.

        Raises:
            RuntimeError: it was freed.
        """
        sharded = self._sharded()
        if sharded is None:
            raise RuntimeError("the sharded model that is pruned was freed: hold on to it")
        return sharded

    def fits(self) -> bool:
        """True if the sharded model has the config and shapes of the stand-in."""
        same = config_json(self.sharded.config) == config_json(self.model.config)
        return same and shapes(self.sharded) == shapes(self.model)

    def refresh(self) -> None:
        """Take over gradients, which parameters have one, and that weights have changed."""
        sharded = self.sharded
        reshard(sharded)
        before, self._state = self._state, state_of(sharded)
        if before != self._state:
            increment_version(self.model.parameters())
        for name, parameter in self.model.named_parameters():
            source = sharded.get_parameter(name)
            parameter.requires_grad_(source.requires_grad)
            like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            read = partial(self._gradient, name)
            parameter.grad = None if source.grad is None else LazyTensor(like, read)

    def read_from(self, sharded: PreTrainedModel) -> None:
        """Read the weights of another model from now on, which has those that the stand-in has."""
        _standins.pop(self.sharded, None)
        _standins[sharded] = self
        self._sharded = weakref.ref(sharded)
        self._state = state_of(sharded)
        lazy: Any
        for name, lazy in self.model.named_parameters():
            lazy.read, lazy.grad = partial(self._values, name), None

    @contextmanager
    def taking_turns(self) -> Iterator[Turns]:
        """Let every rank read what it wants while the block runs; all ranks have to enter it.

        Yields:
            What has to be told which batch this rank is at.

        Raises:
            InterruptedByRankError: another rank cannot go on.
        """
        parameters = list(self.sharded.parameters())

        def gather(number: int) -> Tensor:
            return whole(parameters[number].detach()).cpu()

        self._turns = turns = Turns(gather, parameters[0].device)
        try:
            yield turns
            turns.finish()
        except BaseException:
            with suppress(InterruptedByRankError):
                turns.fail()
            raise
        finally:
            self._turns = None

    def forget(self) -> None:
        """Let the next pruner of the sharded model have a stand-in of its own."""
        _standins.pop(self.sharded, None)

    def _values(self, name: str) -> Tensor:
        if self._turns is not None:
            return self._turns.read(self._numbers[name])
        return whole(self.sharded.get_parameter(name).detach()).cpu()

    def _gradient(self, name: str) -> Tensor:
        gradient = self.sharded.get_parameter(name).grad
        assert gradient is not None  # refresh saw one
        return whole(gradient).cpu()


_standins: weakref.WeakKeyDictionary[nn.Module, StandIn] = weakref.WeakKeyDictionary()


def standin_of(module: nn.Module) -> nn.Module:
    """Return the stand-in of a model that FSDP2 keeps in shards; any other module itself.

    Raises:
        UnsupportedModelError: the sharded model cannot be pruned.
    """
    if not isinstance(module, nn.Module) or not is_sharded(module):
        return module
    prefix, model = find_pretrained(module)
    if prefix:
        raise UnsupportedModelError(
            f"{plain_class(type(model)).__name__} is under fully_shard (FSDP2) and inside a "
            f"{plain_class(type(module)).__name__}. Pass the model itself: the .{prefix} of that"
        )
    check_followable(model, sharded=True)
    standin = _standins.get(model)
    if standin is None or not standin.fits():
        standin = _standins[model] = StandIn(model)
    standin.refresh()
    return standin.model


def standin_behind(model: nn.Module) -> StandIn | None:
    """Return the stand-in that a model is, with what it reads; ``None``: it is an ordinary one."""
    return next((each for each in _standins.values() if each.model is model), None)


def on_standin(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pruner's arguments with parts of the stand-in in the place of a sharded model's.

    Args:
        module: the sharded model; of any other module the arguments stay as they are.
        arguments: the arguments; layers and parameters in lists, tuples and dicts are replaced.
    """
    standin = standin_of(module)
    if standin is module:
        return dict(arguments)
    parts: dict[int, Any] = {}
    for name, layer in module.named_modules():
        parts[id(layer)] = standin.get_submodule(name)
    for name, parameter in module.named_parameters():
        parts[id(parameter)] = standin.get_parameter(name)
    return {name: _replaced(value, parts) for name, value in arguments.items()}


def _replaced(value: Any, parts: Mapping[int, Any]) -> Any:
    """Return a value with some objects replaced, in plain containers too."""
    if type(value) in (list, tuple, set):
        return type(value)(_replaced(item, parts) for item in value)
    if type(value) is dict:
        return {_replaced(key, parts): _replaced(item, parts) for key, item in value.items()}
    return parts.get(id(value), value)
