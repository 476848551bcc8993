"""Tensors that the config ties and that the files hold twice, with different numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from .assess import Assessment
from .headers import Stored

_PIECE = 4096
_PIECES = 16


def apart(
    folder: Path, found: Assessment, tensors: Mapping[str, Stored], prefix: str
) -> tuple[str, str] | None:
    """Two tied names whose data differ in the files; ``None``: none do, going by samples of it."""
    for group in dict.fromkeys(found.tied.values()):
        names = sorted(name for name in group if name in found.loaded.shapes)
        stored = [(name, _stored(name, tensors, prefix)) for name in names]
        known = [(name, one) for name, one in stored if one is not None and one.start is not None]
        for (first, a), (second, b) in itertools.pairwise(known):
            if (a.dtype, a.shape) != (b.dtype, b.shape) or _differ(folder, a, b):
                return first, second
    return None


def _stored(name: str, tensors: Mapping[str, Stored], prefix: str) -> Stored | None:
    for one in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if one in tensors:
            return tensors[one]
    return None


def _differ(folder: Path, a: Stored, b: Stored) -> bool:
    """Whether some pieces of two tensors of one size differ; pieces from everywhere in them."""
    last = max(a.bytes - _PIECE, 0)
    starts = sorted({last * part // (_PIECES - 1) for part in range(_PIECES)})
    try:
        with (folder / a.file).open("rb") as one, (folder / b.file).open("rb") as other:
            for start in starts:
                length = min(_PIECE, a.bytes - start)
                one.seek((a.start or 0) + start)
                other.seek((b.start or 0) + start)
                if one.read(length) != other.read(length):
                    return True
    except OSError:
        return False
    return False
