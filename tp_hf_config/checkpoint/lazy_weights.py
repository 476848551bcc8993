"""Read tensors from safetensors files one at a time, and write files in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model.lazy_tensor import LazyTensor, values_of
from ..model.recycled_memory import recycled_empty
from .folder import read_weights
from .headers import Header, Stored, read_safetensors
from .writing import write_whole

# as safetensors orders them in a file: the last one's data come first
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {name: rank for rank, name in enumerate(_DTYPES)}
_ALIGNED = 8  # bytes: the data begin at a multiple of this


def lazy_weights(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a folder's safetensors files; each is read when it is computed with.

    Files are opened for each read and closed again: a mapped file would stay in memory.

    Returns:
        Tensor name, as in the files -> lazy tensor.

    Raises:
        CheckpointError: there are no weights, they are not safetensors, or a file is damaged.
    """
    return _lazy(folder, read_weights(folder))


def load_lazily(model_class: Any, folder: Path, config: Any, **options: Any) -> tuple[Any, Any]:
    """Return a model whose weights are read from its files at each use, and how they loaded.

    ``folder``: a folder with safetensors files.
    ``options``: for ``from_pretrained``.

    Returns:
        The model, and what ``from_pretrained(output_loading_info=True)`` says.

    Raises:
        CheckpointError: see :func:`lazy_weights`.
    """
    loaded: tuple[Any, Any] = model_class.from_pretrained(
        None, config=config, state_dict=lazy_weights(folder), output_loading_info=True, **options
    )
    return loaded


def lazy_weights_of(file: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one safetensors file, as :func:`lazy_weights` does.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _lazy(file.parent, read_safetensors(file))


def _lazy(folder: Path, weights: Header) -> dict[str, LazyTensor]:
    """Return the tensors that a folder's header, or several as one, describe."""
    if weights.faults or weights.unsure:
        raise CheckpointError(f"{folder}: {weights.unsure or weights.faults[0]}")
    tensors: dict[str, LazyTensor] = {}
    for name, stored in weights.tensors.items():
        if stored.start is None or stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {name} ({stored.dtype or 'no dtype'} in {stored.file}) cannot be read "
                "by itself; expected safetensors files with plain numbers"
            )
        like = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device="meta")
        tensors[name] = LazyTensor(like, partial(_read, folder / stored.file, stored))
    return tensors


def _read(path: Path, stored: Stored) -> Tensor:
    """Return one tensor of a file.

    Raises:
        CheckpointError: the file has become shorter.
    """
    data = recycled_empty((stored.bytes,), torch.uint8)
    numbers: Any = data.numpy()
    rest = memoryview(numbers)
    with path.open("rb", buffering=0) as file:
        file.seek(stored.start or 0)
        while len(rest):
            count = file.readinto(rest)
            if not count:
                raise CheckpointError(f"{path} is cut off: {len(rest):,} bytes are missing")
            rest = rest[count:]
    return data.view(_DTYPES[stored.dtype]).view(stored.shape)


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, byte for byte as ``safetensors.torch.save_file`` does.

    Each tensor is read, written and freed; the next one is read meanwhile.

    Args:
        tensors: name -> tensor; lazy ones are read when it is their turn.
        path: the file.
        metadata: what the header says beside the tensors.
    """
    with Path(path).open("wb", buffering=0) as file:
        file.write(_head(tensors, metadata))
        for rest in _read_ahead(tensors[name] for name in _in_order(tensors)):
            while len(rest):  # a write of more than 2 GiB ends early
                rest = rest[file.write(rest) :]


def write_once(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that has its name once it is complete and on the disk.

    A file of this name that has the header and the size of what would be written stays: no other
    run may have written it.

    Args:
        tensors: name -> tensor.
        path: the file.
        metadata: what the header says beside the tensors.
    """
    path, head = Path(path), _head(tensors, metadata)
    size = len(head) + sum(tensor.nbytes for tensor in tensors.values())
    if path.is_file() and path.stat().st_size == size:
        with path.open("rb") as file:
            if file.read(len(head)) == head:
                return
    write_whole(path, lambda part: write_safetensors(tensors, part, metadata))


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Return what a safetensors file has before its tensors' data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in _in_order(tensors):
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of tensors in order; the next one is read while one is worked with."""
    waiting: Future[memoryview] | None = None
    with ThreadPoolExecutor(1) as reader:
        for tensor in tensors:
            following = reader.submit(_bytes_of, tensor)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values; of a lazy one, they are read."""
    numbers: Any = values_of(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def read_as_written(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Read what :func:`write_safetensors` reads, in its order, and write nothing."""
    for name in _in_order(tensors):
        values_of(tensors[name].detach())


class WritesOrReads:
    """Writes safetensors files; once one cannot be written, it reads what is left of all.

    So other ranks, which read along, are not left waiting.

    Attributes:
        failure: why a file could not be written; ``None`` if none failed.
        began: a file was begun.
    """

    def __init__(self) -> None:
        self.failure: OSError | None = None
        self.began = False

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        path: str | Path,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a file as :func:`write_safetensors` does, each tensor's bytes read in its turn."""
        self.began = True
        values = (_bytes_of(tensors[name]) for name in _in_order(tensors))
        parts: Iterator[bytes | memoryview] = chain([_head(tensors, metadata)], values)
        for part in parts:
            if self.failure is None:
                try:
                    with Path(path).open("ab") as file:
                        file.write(part)
                except OSError as error:
                    self.failure = error


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names as safetensors orders them in a file."""
    return sorted(tensors, key=lambda name: (-_RANKS[_NAMES[tensors[name].dtype]], name))


@contextmanager
def written_one_by_one(write: Callable[..., None] | None = None) -> Iterator[None]:
    """While open, ``save_pretrained`` writes its safetensors files by :func:`write_once`.

    safetensors takes the bytes of all of a file's tensors at once
    (``transformers/modeling_utils.py``, ``safe_save_file``).

    ``write``: what takes its place, if anything does.
    """
    from transformers import modeling_utils

    module: Any = modeling_utils
    original = module.safe_save_file
    module.safe_save_file = write or write_once
    try:
        yield
    finally:
        module.safe_save_file = original
