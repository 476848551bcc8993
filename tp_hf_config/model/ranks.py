"""Make sure that all processes of a distributed run prune the same, before any of them does."""

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
    """Go on if all ranks do the same; every rank has to call this at the same point.

    Args:
        kind: the error of the ranks that could go on.
        when: where this rank is, for messages: ``"step 1"``.
        parts: what is pruned or measured, and a digest of how, in order.
        failure: why this rank cannot go on; it is raised here, and on other ranks an error of
            ``kind`` that quotes it.
        more: the end of that error's message.

    Raises:
        TPHFConfigError: one cannot go on, does something else, is elsewhere or does not come, which
            is known once the process group's timeout is over.
    """
    text = "" if failure is None else in_one_line(failure)
    reason = _difference(when, tuple(parts), text) if are_several() else ""
    if failure is not None:
        raise failure
    if reason:
        raise kind(reason + more)


def gathered(value: _T) -> list[_T]:
    """Return the values of all ranks, in their order; every rank has to call this."""
    import torch.distributed as dist

    if not are_several():
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def summed(values: Tensor, device: torch.device | str) -> Tensor:
    """Return the sum of all ranks' tensors; every rank has to call this, and gets the same bits.

    Args:
        values: this rank's tensor, which may be overwritten.
        device: where the process group adds up.
    """
    import torch.distributed as dist

    total = values.to(device).contiguous()
    dist.reduce(total, 0)  # an all_reduce need not give all ranks the same bits
    dist.broadcast(total, 0)
    return total.to(values.device)


def are_several() -> bool:
    """True if this process is one of several in a process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _difference(when: str, parts: tuple[tuple[str, str], ...], failure: str) -> str:
    """Return why the ranks cannot go on together; empty: all do the same."""
    import torch.distributed as dist

    try:
        reason = _absence(when)
        if reason:
            return reason
        everyone = gathered((when, parts, failure))
    except RuntimeError as error:
        return f"rank {dist.get_rank()} lost the others at {when}: {in_one_line(error)}"
    first, first_parts, _ = everyone[0]
    for rank, (where, others, failed) in enumerate(everyone):
        if failed:
            return f"rank {rank} at {where}: {failed}"
        if where != first:
            return f"rank 0 is at {first}, and rank {rank} at {where}"
        if others != first_parts:
            pairs = zip(first_parts, others, strict=False)
            names = (mine[0] for mine, theirs in pairs if mine != theirs)
            return (
                f"rank {rank} decided otherwise than rank 0 at {first} "
                f"({next(names, 'one prunes more than the other')}). Every rank needs the same "
                "settings and the same importances: equal seeds, and statistics that are summed "
                "over all ranks"
            )
    return ""


def _absence(when: str) -> str:
    """Wait until every rank calls this; return which ones do not within the timeout, if any.

    Ranks leave a note in the process group's store, for no backend but gloo tells who is missing,
    and NCCL ends the process of those who wait.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

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
                f"rank {rank} waited {seconds:.0f} seconds for the others at {when}, and {who} did "
                f"not come. {_SAME_POINT}"
            )
    if store.check([f"{here}, given up"]):
        other = store.get(f"{here}, given up").decode()
        return (
            f"rank {rank} came to {when} when rank {other} had given up waiting for it. "
            f"{_SAME_POINT}"
        )
    return ""
