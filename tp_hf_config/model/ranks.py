"""Make sure that all processes of a distributed run prune the same, before any of them does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import in_one_line, listed
from .build import Refusal

_T = TypeVar("_T")
_SAME_POINT = "Every rank has to prune at the same point of the program"


@dataclass(frozen=True)
class Decision:
    """What one rank is about to do.

    Attributes:
        when: where it is, for messages: ``"step 1"``.
        parts: what is pruned or measured, and a digest of how, in order.
        failure: why this rank cannot go on; empty if it can.
    """

    when: str
    parts: tuple[tuple[str, str], ...] = ()
    failure: str = ""


def differing(mine: Decision) -> Refusal | None:
    """Return why the ranks cannot go on together; ``None``: all have decided the same.

    Every rank has to call this. A rank that does not come is named once the process group's timeout
    is over.
    """
    import torch.distributed as dist

    if not are_several():
        return Refusal(mine.failure) if mine.failure else None
    try:
        refusal = _wait_for_all(mine.when)
        if refusal is not None:
            return refusal
        everyone = gathered(mine)
    except RuntimeError as error:
        return Refusal(
            f"rank {dist.get_rank()} lost the others at {mine.when}: {in_one_line(error)}"
        )
    for rank, decision in enumerate(everyone):
        if decision.failure:
            return Refusal(f"rank {rank} at {decision.when}: {decision.failure}")
        if decision != everyone[0]:
            return Refusal(_apart(everyone[0], decision, rank))
    return None


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


def _wait_for_all(when: str) -> Refusal | None:
    """Wait until every rank calls this; return which ones do not within the timeout.

    Ranks leave a note in the process group's store, for no backend but gloo tells who is missing,
    and NCCL ends the process of those who wait.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    if store is None:  # MPI has none
        return None
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
            who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {listed(missing)}"
            seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]
            return Refusal(
                f"rank {rank} waited {seconds:.0f} seconds for the others at "
                f"{when}, and {who} did not come. {_SAME_POINT}"
            )
    if store.check([f"{here}, given up"]):
        other = store.get(f"{here}, given up").decode()
        return Refusal(
            f"rank {rank} came to {when} when rank {other} had given up waiting for it. "
            f"{_SAME_POINT}"
        )
    return None


def _apart(first: Decision, other: Decision, rank: int) -> str:
    """Return how a rank's decision differs from that of rank 0."""
    if first.when != other.when:
        return f"rank 0 is at {first.when}, and rank {rank} at {other.when}"
    pairs = zip(first.parts, other.parts, strict=False)
    names = (mine[0] for mine, theirs in pairs if mine != theirs)
    where = next(names, "one prunes more than the other")
    return (
        f"rank {rank} decided otherwise than rank 0 at {first.when} ({where}). Every rank needs "
        "the same settings and the same importances: equal seeds, and statistics that are summed "
        "over all ranks"
    )
