"""Make sure that all processes of a distributed run prune the same, before any of them does."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import in_one_line
from .build import Refusal


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

    Every rank has to call this. With the gloo backend a rank that does not come is named once the
    process group's timeout is over.
    """
    import torch.distributed as dist

    if not _are_several():
        return Refusal(mine.failure) if mine.failure else None
    everyone: list[Decision] = [mine] * dist.get_world_size()
    try:
        if dist.get_backend() == "gloo":
            dist.monitored_barrier(timeout=_timeout(), wait_all_ranks=True)
        dist.all_gather_object(everyone, mine)
    except RuntimeError as error:
        return Refusal(
            f"rank {dist.get_rank()} waited for the others at {mine.when}, and they did not come: "
            f"{in_one_line(error)}. Every rank has to prune at the same point of the program"
        )
    for rank, decision in enumerate(everyone):
        if decision.failure:
            return Refusal(f"rank {rank} at {decision.when}: {decision.failure}")
    return next(
        (
            Refusal(_apart(everyone[0], decision, rank))
            for rank, decision in enumerate(everyone)
            if decision != everyone[0]
        ),
        None,
    )


def smallest(number: int) -> int:
    """Return the smallest of all ranks' numbers; every rank has to call this."""
    import torch.distributed as dist

    if not _are_several():
        return number
    everyone = [number] * dist.get_world_size()
    dist.all_gather_object(everyone, number)
    return min(everyone)


def _are_several() -> bool:
    """True if this process is one of several in a process group."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _timeout() -> datetime.timedelta | None:
    """Return the timeout of the process group; a monitored barrier's own is always half an hour."""
    import torch.distributed as dist

    group: Any = dist.group.WORLD
    try:
        timeout: datetime.timedelta = group._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return timeout


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
