"""OpenVINO, exported and run by optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greedy import greedy
from optimum.intel import OVModelForCausalLM, OVModelForFeatureExtraction
from pooled import pooled

# By itself it computes in bfloat16 where the processor can, and keeps keys and values in 8 bits.
FLOAT32 = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens."""
    model = OVModelForCausalLM.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config=FLOAT32
    )
    return greedy(model, question["ids"], question["new_tokens"])


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors."""
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    model = OVModelForFeatureExtraction.from_pretrained(
        folder, export=True, load_in_8bit=False, ov_config=config
    )
    return {"embeddings": [pooled(model, ids) for ids in question["ids"]]}
