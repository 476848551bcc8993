"""ONNX Runtime: exported by optimum, then weights and activations in 8 bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from optimum.onnxruntime import ORTModelForCausalLM
from perplexity import perplexity, size_of


def int8(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Dynamic quantisation, one scale for each output."""
    with TemporaryDirectory() as exported, TemporaryDirectory() as target:
        model = ORTModelForCausalLM.from_pretrained(folder, export=True, use_cache=False)
        model.save_pretrained(exported)
        for file in Path(exported).iterdir():
            if file.suffix == ".json":
                (Path(target) / file.name).write_bytes(file.read_bytes())
        quantize_dynamic(
            Path(exported, "model.onnx"),
            Path(target, "model.onnx"),
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        again = ORTModelForCausalLM.from_pretrained(target, use_cache=False)

        def logits(ids: torch.Tensor) -> Any:
            return again(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

        found = perplexity(logits, asked["windows"])
        return {"perplexity": found, "bytes": size_of(Path(target), "*.onnx*")}
