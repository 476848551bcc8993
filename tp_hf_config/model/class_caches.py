"""Keep experiments, and passes without data, out of the caches of model classes.

Some classes cache what they compute from sizes alone (positions of patches, sinusoids) for all
their models, by the dtype that is asked for. In an experiment the result is float64 whatever was
asked for; in a pass without data it may have no numbers, or those of memory that was never
written. A live model with as many patches would read it. Transformers uses no cache while torch
compiles (``pytorch_utils.compile_compatible_method_lru_cache``), so these passes tell it that torch
does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from .surroundings import replaced


def without_caches() -> AbstractContextManager[None]:
    """While open, Transformers' classes compute what they would otherwise take from a cache.

    There is no other way: the caches of functions are shared by all models of a class.
    """
    from transformers import pytorch_utils

    return replaced(pytorch_utils, "is_torchdynamo_compiling", lambda: True)
