"""Read and fill weights that FSDP2 (``fully_shard``) shards over several processes.

Pruners work on a copy of the sharded model on the meta device, because FSDP2 replaces the classes
of modules. The sharded model is unchanged until the pruned one is built.

Torch's distributed modules are looked up, not imported: a model is under FSDP2 only if they are
already imported.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

# sharded model -> its copy on the meta device
meta_copies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()


def behind(model: nn.Module) -> nn.Module:
    """Return the sharded model of a meta copy; any other model itself."""
    return next((sharded for sharded, copy in meta_copies.items() if copy is model), model)


def _fsdp_module() -> Any:
    """The class that ``fully_shard`` adds to a module; ``None`` if not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def plain_class(model_class: type) -> type:
    fsdp = _fsdp_module()
    if fsdp is None or not issubclass(model_class, fsdp):
        return model_class
    return next(base for base in model_class.__mro__ if not issubclass(base, fsdp))


def _sharded_parts(module: nn.Module) -> Iterator[Any]:
    """Yield the modules under ``fully_shard`` in a module, itself included."""
    fsdp = _fsdp_module()
    if fsdp is not None:
        yield from (part for part in module.modules() if isinstance(part, fsdp))


def is_sharded(module: nn.Module) -> bool:
    return any(True for _ in _sharded_parts(module))


def is_dtensor(tensor: Tensor) -> bool:
    """True if a tensor is spread over processes (FSDP2, tensor parallelism)."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def sharded_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that only FSDP2 or HSDP divides, not tensor parallelism."""
    managed: set[Any] = {p for part in _sharded_parts(module) for p in part.parameters()}
    return {
        parameter
        for parameter in managed
        if is_dtensor(parameter)
        and sum(not placement.is_replicate() for placement in parameter.placements) == 1
    }


def reshard(module: nn.Module) -> None:
    for part in _sharded_parts(module):
        part.reshard()


def whole(tensor: Any) -> Tensor:
    """Return all values of a tensor; shards are gathered, so every rank has to call this."""
    if not is_dtensor(tensor):
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        return tensor.detach().full_tensor()  # type: ignore[no-any-return]


def divided_like(values: Tensor, parameter: Any) -> Tensor:
    """Divide values that every rank has over the ranks as ``parameter`` is."""
    if not is_dtensor(parameter):
        return values.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def whole_tensor(model: nn.Module, name: str) -> Tensor:
    layer, _, key = name.rpartition(".")
    return whole(getattr(behind(model).get_submodule(layer), key).detach())


@contextmanager
def gathered(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Give these layers of a meta copy whole parameters and gradients; all ranks enter it."""
    source, held = behind(model), list[tuple[Any, str, Any]]()
    whole_of: dict[nn.Parameter, nn.Parameter] = {}  # tied ones are gathered once
    try:
        for name in dict.fromkeys(names) if source is not model else ():
            layers = (_own_modules(each.get_submodule(name)) for each in (model, source))
            for module, original in zip(*layers, strict=True):
                for key, empty in [*module._parameters.items()]:
                    if empty is not None:
                        if empty not in whole_of:
                            whole_of[empty] = _whole_of(original._parameters[key])
                        held.append((module._parameters, key, empty))
                        module._parameters[key] = whole_of[empty]
        yield
    finally:
        for parameters, key, empty in held:
            parameters[key] = empty


def _own_modules(layer: nn.Module) -> list[nn.Module]:
    """Return a layer and the modules of its parametrizations."""
    return [layer, *getattr(layer, "parametrizations", nn.ModuleDict()).modules()]


def _whole_of(parameter: Any) -> nn.Parameter:
    made = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    made.grad = None if parameter.grad is None else whole(parameter.grad)
    return made


class Passes:
    """Forward passes that gather on all ranks together; ``note`` gets each gathered FSDP2 part."""

    def __init__(self, model: nn.Module, note: Callable[[nn.Module], None]):
        self._note, self._parts = note, list(_sharded_parts(model))
        self._waiting: dict[nn.Module, None] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the passes inside ``with``; afterwards parameters are sharded again."""
        handles = [part.register_forward_pre_hook(self._gathered) for part in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in self._parts:
                part.reshard()

    def begin(self) -> None:
        self._waiting = dict.fromkeys(self._parts)

    def give_up(self) -> None:
        """After an error in a pass, gather the parts that other ranks still wait for."""
        for part in self._waiting:
            part.unshard()  # type: ignore[operator]
        for part in self._parts:
            with suppress(AttributeError, RuntimeError):  # torch before 2.13; no root
                part.reset_iter_state()  # type: ignore[operator]

    def _gathered(self, part: nn.Module, args: Any) -> None:
        self._waiting.pop(part, None)
        self._note(part)
