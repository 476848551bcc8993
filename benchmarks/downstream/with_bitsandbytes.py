"""bitsandbytes on a CPU: weights in 8 bits, and in 4 (NF4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from perplexity import load, perplexity
from transformers import BitsAndBytesConfig


def int8(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """LLM.int8()."""
    return _measured(folder, asked, BitsAndBytesConfig(load_in_8bit=True))


def nf4(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """NF4, as QLoRA has it."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return _measured(folder, asked, config)


def _measured(folder: Path, asked: dict[str, Any], config: Any) -> dict[str, Any]:
    model = load(folder, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    own = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    left = sum(not isinstance(layer, own) for layer in layers)
    found = perplexity(lambda ids: model(ids).logits, asked["windows"])
    return {"perplexity": found, "left": left, "of": len(layers)}
