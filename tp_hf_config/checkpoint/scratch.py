"""Keep tensors that would fill memory in files, until nobody needs them."""

from __future__ import annotations

import atexit
import tempfile
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from torch import Tensor

from ..model.lazy_tensor import LazyTensor
from .lazy_weights import lazy_weights_of, write_safetensors

_NAME = "values"


def on_disk(values: Tensor) -> LazyTensor:
    """Return a lazy tensor whose values are in a temporary file, which goes with it."""
    path = _folder() / f"{uuid4().hex}.safetensors"
    write_safetensors({_NAME: values}, path)
    lazy = lazy_weights_of(path)[_NAME]
    weakref.finalize(lazy.read, _remove, path)
    return lazy


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@cache
def _folder() -> Path:
    """Return this process's folder; it goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="tp_hf_config-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
