"""Hide what differs between the supported versions of Transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .surroundings import ONE_AT_A_TIME


def no_init_weights() -> Any:
    """Return Transformers' context manager that constructs a class without initial values."""
    try:
        from transformers import initialization as place
    except ImportError:  # transformers 4
        from transformers import modeling_utils as place  # type: ignore[no-redef]
    return place.no_init_weights()


@contextmanager
def plain_on_meta() -> Iterator[None]:
    """While open, forward passes on the meta device do not switch autocast and do not compile.

    Transformers 4 switches autocast off around rotary embeddings, which raises on the meta device
    ("unsupported scalarType"). It also compiles parts of ModernBERT wherever Triton is installed.
    """
    with ONE_AT_A_TIME:
        original: Any = torch.autocast

        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            on_meta = device_type == "meta"
            return nullcontext() if on_meta else original(device_type, *args, **kwargs)

        dynamo = sys.modules.get("torch._dynamo")  # imported only where something is to be compiled
        try:
            torch.autocast = autocast  # type: ignore[misc, assignment]
            with nullcontext() if dynamo is None else dynamo.config.patch(disable=True):
                yield
        finally:
            torch.autocast = original  # type: ignore[misc]
