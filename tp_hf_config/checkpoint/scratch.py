"""Keep tensors that would fill memory in files, until nobody needs them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import cast
from uuid import uuid4

from torch import Tensor

from ..errors import CheckpointError
from ..model.lazy_tensor import LazyTensor
from .lazy_weights import lazy_weights_of, write_safetensors

_NAME = "values"


def on_disk(values: Tensor) -> LazyTensor:
    """Return a lazy tensor whose values are in a temporary file, which goes with it.

    A matrix whose columns lie in memory one after the other is read so too: products of it differ
    in their last bits from those of the same matrix by rows.
    """
    if values.ndim == 2 and not values.is_contiguous() and values.T.is_contiguous():
        return cast(LazyTensor, on_disk(values.T).T)
    path = _folder() / f"{uuid4().hex}.safetensors"
    try:
        write_safetensors({_NAME: values}, path)
    except OSError as error:
        _remove(path)
        raise CheckpointError(
            f"a temporary file of {values.nbytes:,} bytes cannot be written to {path.parent}: "
            f"{error}. Set TMPDIR to a folder on a disk with more room"
        ) from error
    lazy = lazy_weights_of(path)[_NAME]
    weakref.finalize(lazy.read, _remove, path)
    return lazy


def free_on_disk() -> int:
    """Return how many bytes temporary files can take."""
    return shutil.disk_usage(_folder()).free


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@cache
def _folder() -> Path:
    """Return this process's folder; it goes when the process ends."""
    # Windows does not remove a file that is still mapped
    folder = tempfile.TemporaryDirectory(prefix="tp_hf_config-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return Path(folder.name)
