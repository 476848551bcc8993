"""Sentence embeddings from token vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


@torch.no_grad()
def pooled(model: Any, ids: list[int]) -> list[float]:
    """The mean of a model's token vectors, scaled to length one."""
    tokens = torch.tensor([ids])
    kinds = torch.zeros_like(tokens)
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), token_type_ids=kinds)
    return scaled(output.last_hidden_state[0])


def scaled(vectors: Any) -> list[float]:
    """The same from one sentence's token vectors."""
    mean = torch.as_tensor(vectors).float().mean(0)
    return [float(value) for value in F.normalize(mean, dim=0)]
