"""Prune models larger than memory: tensors are computed into mapped files.

safetensors maps the files that it reads, so stored weights need no memory of their own: the system
reads pages when they are used, and drops them when memory is short. While :func:`paged` is open,
this is also true of weights that are cut, stacked or cast.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError

_SMALLEST = 1 << 20  # bytes
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def paged(folder: Path | None) -> Iterator[None]:
    """While open, :func:`in_file` puts tensors into files of a folder; ``None``: into memory.

    The files have no names, so they vanish with their tensors, even if the process is killed.
    Windows does not allow that; there the system pages memory to its own file.
    """
    token = _folder.set(None if os.name == "nt" else folder)
    try:
        yield
    finally:
        _folder.reset(token)


def is_paged() -> bool:
    return _folder.get() is not None


def in_file(values: Tensor) -> Tensor:
    """Move a large CPU tensor into a mapped file; while nothing is paged, return it as it is."""
    stays = values.untyped_storage().filename or not _goes_into_file(values, values.nbytes)
    return values if stays else copied(values)


def _goes_into_file(like: Tensor, size: int) -> bool:
    return is_paged() and like.device.type == "cpu" and size >= _SMALLEST


def copied(values: Tensor) -> Tensor:
    """Copy a tensor, into a new mapped file if it is large and on the CPU and weights are paged."""
    if not _goes_into_file(values, values.nbytes):
        return values.clone()
    return new_empty(values, values.shape).copy_(values)


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """``like.new_empty(shape)``, in a new mapped file under the conditions of :func:`copied`."""
    size = math.prod(shape) * like.element_size()
    if not _goes_into_file(like, size):
        return like.new_empty(shape)
    folder = _folder.get()
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):  # else writing to a full disk would kill the process
            os.posix_fallocate(handle, 0, size)
        storage: Any = torch.UntypedStorage.from_file(name, True, size)
    except OSError as error:
        raise CheckpointError(
            f"a temporary file of {size:,} bytes cannot be written to {folder}: {error}"
        ) from error
    finally:
        os.close(handle)
        os.unlink(name)
    flat: Tensor = torch.empty(0, dtype=like.dtype).set_(storage)
    return flat.view(tuple(shape))


class _ConversionsInFiles(TorchFunctionMode):
    """Puts results of the operations that Transformers converts weights with into files."""

    _COPYING = (torch.stack, torch.cat, Tensor.contiguous, Tensor.to)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func not in self._COPYING or (
            isinstance(source, Tensor) and source.data_ptr() == result.data_ptr()
        ):
            return result
        return in_file(result)


@contextmanager
def conversions_in_files() -> Iterator[None]:
    """Put weights that Transformers stacks, splits or casts into files, if paged."""
    if not is_paged():
        yield
        return
    # a mode applies to its own thread only, and mapped files need no threads to be read
    with patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"), _ConversionsInFiles():
        yield
