"""Hide what differs between the supported versions of Transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from .surroundings import replaced


@contextmanager
def plain_on_meta() -> Iterator[None]:
    """While open, forward passes on the meta device do not switch autocast and do not compile.

    Transformers 4, and code from the Hub, switch autocast off around rotary embeddings, which
    raises on the meta device. ModernBERT's parts are compiled there wherever Triton is installed.
    """
    original: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        on_meta = device_type == "meta"
        return nullcontext() if on_meta else original(device_type, *args, **kwargs)

    dynamo = sys.modules.get("torch._dynamo")  # imported only where something is to be compiled
    uncompiled = nullcontext() if dynamo is None else dynamo.config.patch(disable=True)
    with replaced(torch, "autocast", autocast), uncompiled:
        yield
