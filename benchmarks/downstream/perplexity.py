"""Perplexity, the same in every environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def perplexity(logits_of: Callable[[Tensor], Any], windows: list[list[int]]) -> float:
    """Return the perplexity of windows of tokens, each from its second token on."""
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        logits = torch.as_tensor(logits_of(ids))[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(window) - 1
    return float(torch.tensor(total / count).exp())


def size_of(folder: Path, *patterns: str) -> int:
    """Return the bytes of the files that match."""
    return sum(f.stat().st_size for pattern in patterns for f in folder.glob(pattern))


def load(folder: Path, **settings: Any) -> Any:
    """Return a folder's model, with the code that comes with it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()
