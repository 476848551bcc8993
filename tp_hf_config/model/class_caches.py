"""Keep experiments, and passes without data, out of the caches of model classes.

Some classes cache what they compute from sizes alone (positions of patches, sinusoids) for all
their models, by the dtype that is asked for. In an experiment the result is float64 whatever was
asked for; in a pass without data it may have no numbers, or those of memory that was never
written. A live model with as many patches would read it. Transformers uses no cache while torch
compiles (``pytorch_utils.compile_compatible_method_lru_cache``), so these passes tell it that torch
does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .surroundings import ONE_AT_A_TIME

_IS_COMPILING = "is_torchdynamo_compiling"


@contextmanager
def without_caches() -> Iterator[None]:
    """While open, Transformers' classes compute what they would otherwise take from a cache."""
    from transformers import pytorch_utils

    asks: Any = pytorch_utils
    with ONE_AT_A_TIME:
        original = getattr(asks, _IS_COMPILING)
        setattr(asks, _IS_COMPILING, lambda: True)
        try:
            yield
        finally:
            setattr(asks, _IS_COMPILING, original)
