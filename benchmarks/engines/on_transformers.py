"""Transformers itself, in a fresh process or another version, without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from greedy import greedy
from pooled import pooled
from transformers import AutoModel, AutoModelForCausalLM


def generate(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, trust_remote_code=True
    ).eval()
    return greedy(model, question["ids"], question["new_tokens"])


def embed(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Mean pooled token vectors."""
    model = AutoModel.from_pretrained(folder).eval()
    return {"embeddings": [pooled(model, ids) for ids in question["ids"]]}
