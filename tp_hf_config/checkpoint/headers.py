"""Read the names, dtypes and shapes of a weights file's tensors; no tensor is read.

A header is checked before it is trusted: a file from anywhere may be cut off, or lie.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .words import and_more, short

_POINTS = b"version https://git-lfs"
_POINTER = "is a pointer of Git LFS, not the weights. Fetch them: git lfs pull"
_MOST = 100_000_000  # bytes of a header; safetensors allows no more
_BITS = {  # per element, by the dtype in a safetensors header
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a weights file.

    Attributes:
        dtype: as the file calls it (``BF16``).
        shape: its shape.
        file: the file's name.
        start: the byte of the file at which the tensor's data begin; ``None``: not known.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    start: int | None = None

    @property
    def bytes(self) -> int:
        """Return the size of the tensor's data in bytes, or 0 if the dtype is not known."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8


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


def header_bytes(path: Path) -> bytes:
    """Return the header of a safetensors file as it is written: JSON that nobody has checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, _MOST))


def _is_pointer(path: Path) -> bool:
    """True if a file is what Git has of a large file until it is fetched."""
    with path.open("rb") as file:
        return file.read(len(_POINTS)) == _POINTS


def read_safetensors(path: Path) -> Header:
    """Return a safetensors file's header, checked against the file's size and against itself."""
    name = path.name
    try:
        if _is_pointer(path):
            return unreadable(f"{name} {_POINTER}")
        size = path.stat().st_size
        content = _header(path, size)
    except OSError as error:
        return unreadable(f"{name} cannot be read: {error.strerror or error}")
    if isinstance(content, str):
        return unreadable(f"{name} {content}")
    header, begin = content
    tensors: dict[str, Stored] = {}
    spans: dict[str, tuple[int, int]] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        parsed = _entry(entry)
        if isinstance(parsed, str):
            return unreadable(f"{name}: {short(key)} {parsed}")
        dtype, shape, span = parsed
        spans[key] = span
        tensors[key] = Stored(dtype, shape, name, begin + span[0])
    faults = [f"{name}: {fault}" for fault in _misplaced(tensors, spans, size - begin)]
    if not faults:
        faults += [f"{name}: safetensors refuses it: {r}" for r in _refused(path)]
    return Header(tensors, tuple(faults))


def _header(path: Path, size: int) -> tuple[dict[str, Any], int] | str:
    """Return a header's JSON and the byte where the data begin, or what is wrong (a string).

    ``size``: its size in bytes.
    """
    if size < 8:
        return f"has {size} bytes, fewer than the 8 that say how long its header is: it is cut off"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST:
            return f"says that its header has {length:,} bytes; at most {_MOST:,} are allowed"
        if 8 + length > size:
            return f"is cut off: its header should have {length:,} bytes, the file has {size:,}"
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        return "has a header that is nested too deeply"
    except ValueError as error:
        return f"has a header that is not JSON: {error}"
    if not isinstance(header, dict):
        return f"has a header that is a {type(header).__name__}; expected an object of tensors"
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; raise a ValueError if a name occurs twice."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is there twice")
    return entries


def _entry(entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]] | str:
    """Return dtype, shape and byte range of one tensor, or what is wrong (a string)."""
    if not isinstance(entry, dict):
        return f"is described by a {type(entry).__name__}; expected dtype, shape and data_offsets"
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(dtype, str):
        return "has no dtype"
    if not _are_counts(shape):
        return "has a shape that is not a list of whole numbers"
    if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        return "has data_offsets that are not a beginning and an end"
    return dtype, tuple(shape), (span[0], span[1])


def _are_counts(value: Any) -> bool:
    """True if a value is a list of whole numbers that are not negative and fit into 64 bits."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _misplaced(
    tensors: Mapping[str, Stored], spans: Mapping[str, tuple[int, int]], room: int
) -> Iterator[str]:
    """Yield where byte ranges, sizes and the file's length disagree: the first of each kind.

    Args:
        tensors: the tensors, by name.
        spans: first byte and end of each tensor's data, counted from where the data begin.
        room: how many bytes of data the file has.
    """
    wrong = [
        name
        for name, (start, end) in spans.items()
        if tensors[name].dtype in _BITS and end - start != tensors[name].bytes
    ]
    if wrong:
        first, (start, end) = tensors[wrong[0]], spans[wrong[0]]
        yield (
            f"{short(wrong[0])} takes {end - start:,} bytes, but {first.dtype} {list(first.shape)} "
            f"takes {first.bytes:,}{and_more(wrong)}"
        )
    beyond = [name for name, (_, end) in spans.items() if end > room]
    if beyond:
        last = max(end for _, end in spans.values())
        yield (
            f"it is cut off: {short(beyond[0])} ends at byte {spans[beyond[0]][1]:,} of the data"
            f"{and_more(beyond)}; {last:,} bytes are expected, {room:,} are there"
        )
    edge = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != edge:
            yield f"{short(name)} {'overlaps the one before' if start < edge else 'leaves a hole'}"
            return
        edge = end
    if edge < room:
        yield f"{room - edge:,} bytes at its end belong to no tensor"


def _refused(path: Path) -> Iterator[str]:
    """Yield why the safetensors library refuses a file: it loads the file, so its word is final."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt"):
            pass
    except SafetensorError as error:
        yield str(error)
    except (OSError, RuntimeError, MemoryError):
        return  # the file cannot be mapped: what the header says stands


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
