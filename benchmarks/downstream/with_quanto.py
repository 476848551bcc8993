"""optimum-quanto: weights in 8 and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from optimum.quanto import QTensor, freeze, qint4, qint8, quantize
from perplexity import load, perplexity


def int8(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """One scale for each output."""
    return _measured(folder, asked, qint8)


def int4(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """One scale for up to 128 weights, as it divides."""
    return _measured(folder, asked, qint4)


def _measured(folder: Path, asked: dict[str, Any], kind: Any) -> dict[str, Any]:
    model = load(folder, dtype=torch.float32)
    quantize(model, weights=kind, exclude="lm_head")
    freeze(model)
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    left = sum(not isinstance(layer.weight, QTensor) for layer in layers)
    found = perplexity(lambda ids: model(ids).logits, asked["windows"])
    return {"perplexity": found, "left": left, "of": len(layers)}
