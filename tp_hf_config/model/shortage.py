"""Tell what a class refuses from what this process had no time or no memory for."""

from __future__ import annotations

_TORCH_SAYS = "out of memory", "tried to allocate", "alloc_failed"
"""What torch says of a tensor that does not fit, on the CPU and on other devices."""
_noted = False


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception says that memory ran out, the process's or a device's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in text for said in _TORCH_SAYS)
    )


def raise_shortage(error: Exception) -> None:
    """Raise an exception of a model at its own size again if it says nothing of the model.

    Raises:
        Exception: the exception, as it is: memory ran out, or time.
    """
    if isinstance(error, TimeoutError) or is_out_of_memory(error):
        raise error


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
    _noted = _noted or is_out_of_memory(error)


def shortage_noted() -> bool:
    """True once a tensor did not fit into the memory of this process."""
    return _noted
