"""Experiments leave nothing in the caches of model classes.

Some classes keep what they compute of sizes alone (positions of patches, sinusoids) for all their
models, by the dtype asked for: in an experiment that is float64 whatever was asked for, and a live
model of as many patches would read it. Transformers looks whether torch compiles before it takes a
cache (``pytorch_utils.compile_compatible_method_lru_cache``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import pytorch_utils

_ASKS: Any = pytorch_utils
_IS_COMPILING = "is_torchdynamo_compiling"


@contextmanager
def without_caches() -> Iterator[None]:
    """While it lasts, Transformers' classes compute anew what they would take from a cache."""
    original = getattr(_ASKS, _IS_COMPILING)
    setattr(_ASKS, _IS_COMPILING, lambda: True)
    try:
        yield
    finally:
        setattr(_ASKS, _IS_COMPILING, original)
