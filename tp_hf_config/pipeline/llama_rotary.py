"""The frequencies of a Llama's rotary embeddings, as llama.cpp is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.build import Refusal

if TYPE_CHECKING:
    from transformers import LlamaConfig

_CLOSE = 1e-6
"""How far float32 frequencies may be from the default's and still count as those."""


def rotary_factors(config: LlamaConfig) -> Tensor | Refusal | None:
    """Return by what llama.cpp divides the frequencies of the rotary embeddings.

    Returns:
        A factor for each pair of channels, as scaled embeddings (Llama 3) have; ``None`` if all
        are 1; or a refusal: they depend on the length of the text, or scale attention too.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    kind = str(getattr(rotary, "rope_type", "default"))
    if "dynamic" in kind or kind == "longrope":
        return Refusal(
            f"rope_type {kind!r}: its frequencies depend on the length of the text, and a GGUF "
            "file has one factor for each"
        )
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    if scaling != 1:
        return Refusal(
            f"rope_type {kind!r} scales attention by {scaling:.4g}, which a GGUF file of a Llama "
            "does not say"
        )
    frequencies = rotary.inv_freq.double().cpu()
    size = 2 * len(frequencies)
    default = rope_theta(config) ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = default / frequencies
    if torch.allclose(factors, torch.ones_like(factors), rtol=_CLOSE, atol=0):
        return None
    return factors.float()


def rope_theta(config: LlamaConfig) -> float:
    """Return the base of the rotary frequencies, which Transformers 4 keeps in another place."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or config.rope_theta)
