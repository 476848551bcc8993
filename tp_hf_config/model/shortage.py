"""Tell what a class refuses from what this process had no time or no memory for."""

from __future__ import annotations

_TORCH_SAYS = "tried to allocate"
"""What torch says of a tensor that does not fit, on every device."""
_noted = False


def note_shortage(error: Exception) -> None:
    """Take note if an exception of a class says nothing of the class, before it becomes a refusal.

    A tensor that does not fit stays a refusal: the sizes that are tried may be too large for any
    machine. But on another machine it may fit, so from then on nothing that this process learns is
    put into the cache on disk.

    Raises:
        MemoryError: the exception, as it is.
        TimeoutError: the exception, as it is.
    """
    global _noted
    if isinstance(error, (MemoryError, TimeoutError)):
        raise error
    _noted = _noted or _TORCH_SAYS in str(error).lower()


def shortage_noted() -> bool:
    """True once a tensor did not fit into the memory of this process."""
    return _noted
