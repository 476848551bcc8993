"""llm-compressor: W4A16, the scheme that vLLM's Marlin kernels run."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from perplexity import load, perplexity, size_of


def w4a16(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Round to the nearest of 16 values, one scale for 128 weights; save, and load it again."""
    model = load(folder, dtype=torch.bfloat16)
    recipe = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    with TemporaryDirectory() as name:
        model.save_pretrained(name, save_compressed=True)
        again = load(Path(name), dtype=torch.bfloat16)
        found = perplexity(lambda ids: again(ids).logits, asked["windows"])
        return {"perplexity": found, "bytes": size_of(Path(name), "*.safetensors")}
