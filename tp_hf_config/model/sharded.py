"""What several processes share: weights that FSDP2 (``fully_shard``) shards, and decisions.

All processes of a distributed run have to prune alike; that is compared before any of them prunes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TPHFConfigError, in_one_line, listed

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


_T = TypeVar("_T")
_SAME_POINT = "Every rank has to prune at the same point of the program"


def agree(
    kind: type[TPHFConfigError],
    when: str,
    parts: Iterable[tuple[str, str]] = (),
    failure: BaseException | None = None,
    more: str = "",
) -> None:
    """Raise on every rank unless all ranks agree; all must call this at the same point.

    ``when``: where this rank is ("step 1"). ``parts``: what is pruned or measured, each with a
    digest of how, in order. ``failure``: why this rank cannot continue. It is raised here, and the
    other ranks raise ``kind`` with its text, followed by ``more``. A rank that never calls this is
    reported after the timeout of the process group.
    """
    text = "" if failure is None else in_one_line(failure)
    reason = _difference(when, tuple(parts), text) if are_several() else ""
    if failure is not None:
        raise failure
    if reason:
        raise kind(reason + more)


def from_all_ranks(value: _T) -> list[_T]:
    import torch.distributed as dist

    if not are_several():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def summed(values: Tensor, device: torch.device | str) -> Tensor:
    """Sum over all ranks on ``device``, to the same bits; all call it. May overwrite ``values``."""
    import torch.distributed as dist

    total = values.to(device).contiguous()
    dist.reduce(total, 0)  # all_reduce may return other bits on other ranks
    dist.broadcast(total, 0)
    return total.to(values.device)


def are_several() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _difference(when: str, parts: tuple[tuple[str, str], ...], failure: str) -> str:
    """Return why the ranks cannot continue together; empty if all agree."""
    import torch.distributed as dist

    try:
        reason = _absence(when)
        if reason:
            return reason
        everyone = from_all_ranks((when, parts, failure))
    except RuntimeError as error:
        return (
            f"rank {dist.get_rank()} lost the connection to the other ranks at {when}: "
            f"{in_one_line(error)}"
        )
    first, first_parts, _ = everyone[0]
    for rank, (where, others, failed) in enumerate(everyone):
        if failed:
            return f"rank {rank} at {where}: {failed}"
        if where != first:
            return f"rank 0 is at {first}, but rank {rank} is at {where}"
        if others != first_parts:
            pairs = zip(first_parts, others, strict=False)
            names = (mine[0] for mine, theirs in pairs if mine != theirs)
            return (
                f"rank {rank} made another decision than rank 0 at {first} "
                f"({next(names, 'one prunes more than the other')}). Every rank needs the same "
                "settings and the same importances: equal seeds, and statistics that are summed "
                "over all ranks"
            )
    return ""


def _absence(when: str) -> str:
    """Wait for all ranks; return which ones do not come within the timeout, or nothing."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    # only gloo reports who is missing, and NCCL kills the processes that wait
    store = _get_default_store()
    if store is None:  # MPI has none
        return ""
    rank = dist.get_rank()
    here = f"tp_hf_config {store.add(f'tp_hf_config calls of rank {rank}', 1)}"
    notes = [f"{here}, rank {other}" for other in range(dist.get_world_size())]
    store.set(notes[rank], when)
    try:
        store.wait(notes)
    except RuntimeError:
        missing = [other for other, note in enumerate(notes) if not store.check([note])]
        if missing:
            store.set(f"{here}, given up", str(rank))
            seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]
            who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {listed(missing)}"
            return (
                f"rank {rank} waited {seconds:.0f} seconds for the other ranks at {when}, but "
                f"{who} did not arrive. {_SAME_POINT}"
            )
    if store.check([f"{here}, given up"]):
        other = store.get(f"{here}, given up").decode()
        return (
            f"rank {rank} arrived at {when} after rank {other} had stopped waiting for it. "
            f"{_SAME_POINT}"
        )
    return ""
