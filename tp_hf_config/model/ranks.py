"""Make sure that all processes of a distributed run prune alike, before any of them prunes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import TPHFConfigError, in_one_line, listed

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


def gathered(value: _T) -> list[_T]:
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
        everyone = gathered((when, parts, failure))
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
