"""torchao: weights in 8 and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from perplexity import load, perplexity
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup


def int8(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """One scale for each output."""
    return _measured(folder, asked, Int8WeightOnlyConfig())


def int4(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """One scale for 32 weights."""
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return _measured(folder, asked, config)


def _measured(folder: Path, asked: dict[str, Any], config: Any) -> dict[str, Any]:
    model = load(folder, dtype=torch.bfloat16)
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    quantize_(model.model, config)
    left = sum(type(layer.weight) is torch.nn.Parameter for layer in layers)
    found = perplexity(lambda ids: model(ids).logits, asked["windows"])
    return {"perplexity": found, "left": left, "of": len(layers)}
