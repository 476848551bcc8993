"""Distinguish errors about a model class from those about memory or time."""

from __future__ import annotations

_TORCH_SAYS = "out of memory", "tried to allocate", "alloc_failed"  # torch's errors, of any device
_noted = False


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in text for said in _TORCH_SAYS)
    )


def raise_shortage(error: Exception) -> None:
    """Raise an error again if it is about memory or time, and so not about the model."""
    if isinstance(error, TimeoutError) or is_out_of_memory(error):
        raise error


def note_shortage(error: Exception) -> None:
    """Note an error about memory before it becomes a refusal; raise those about time again."""
    global _noted
    if isinstance(error, (MemoryError, TimeoutError)):
        raise error
    # still a refusal: sizes that are tried may fit on no machine. On another machine they may fit,
    # so this process writes nothing more to the disk cache
    _noted = _noted or is_out_of_memory(error)


def shortage_noted() -> bool:
    return _noted
