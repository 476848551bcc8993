"""Read the names, dtypes and shapes of a weights file's tensors; no tensor is read."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .words import short

_POINTS = b"version https://git-lfs"
_POINTER = "is a pointer of Git LFS, not the weights. Fetch them: git lfs pull"


@dataclass(frozen=True)
class Stored:
    """One tensor of a weights file.

    Attributes:
        dtype: as the file calls it (``BF16``).
        shape: its shape.
        file: the file's name.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""


@dataclass(frozen=True)
class Header:
    """What could be read of a weights file's header.

    Attributes:
        tensors: name -> tensor.
        faults: what is wrong with the file, one sentence each.
        complete: True if the name of every tensor is known, whatever is wrong with their data.
        unsure: why the file cannot be judged; ``None`` if it can.
    """

    tensors: dict[str, Stored]
    faults: tuple[str, ...] = ()
    complete: bool = True
    unsure: str | None = None


def unreadable(reason: str) -> Header:
    """Return the header of a file that cannot be read: no tensors, and the reason as its fault."""
    return Header({}, (reason,), complete=False)


def _is_pointer(path: Path) -> bool:
    """True if a file is what Git has of a large file until it is fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTS)) == _POINTS


def read_safetensors(path: Path) -> Header:
    """Return a safetensors file's header, as the safetensors library reads and checks it."""
    name = path.name
    try:
        if _is_pointer(path):
            return unreadable(f"{name} {_POINTER}")
        with safe_open(path, framework="np") as file:  # "pt" would map the whole file for writing
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return Header(
                {key: Stored(p.get_dtype(), tuple(p.get_shape()), name) for key, p in parts.items()}
            )
    except SafetensorError as error:
        return unreadable(f"{name}: safetensors refuses it: {short(error)}")
    except MemoryError as error:
        return Header({}, complete=False, unsure=f"{name} cannot be mapped: {short(error)}")
    except OSError as error:
        return unreadable(f"{name} cannot be read: {error.strerror or error}")


def read_pickle(path: Path) -> Header:
    """Return the tensors of a ``torch.save`` file without their data; its code is not run."""
    import torch
    from transformers.utils.import_utils import check_torch_load_is_safe

    name = path.name
    try:
        check_torch_load_is_safe()
    except ValueError:
        why = f"{name}: torch {torch.__version__} reads pickles unsafely; torch 2.6 or newer does"
        return Header({}, complete=False, unsure=f"{why} not. Save it as safetensors, or update.")
    try:
        if _is_pointer(path):
            return unreadable(f"{name} {_POINTER}")
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(2)
            if start in (b"", b"PK"):
                return unreadable(f"{name} is cut off: it is not a whole torch.save file")
            why = f"{name} is not in torch.save's zip format, and is not unpickled"
            return Header({}, complete=False, unsure=f"{why}. Save it as safetensors.")
        loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return unreadable(
            f"{name} holds more than tensors, and is not unpickled: that could run code"
        )
    except (Exception, RecursionError) as error:  # a broken file may lead to any exception
        return unreadable(f"{name} cannot be read: {short(str(error) or type(error).__name__)}")
    if not isinstance(loaded, dict):
        return unreadable(f"{name} holds a {type(loaded).__name__}; expected tensors by name")
    return Header(
        {
            key: Stored(str(value.dtype).removeprefix("torch."), tuple(value.shape), name)
            for key, value in loaded.items()
            if isinstance(key, str) and isinstance(value, torch.Tensor)
        }
    )
