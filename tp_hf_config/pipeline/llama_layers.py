"""A model as a Llama whose layers may differ: its config, its tensors, the widths of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..model.build import Refusal
from ..model.config_json import FieldPath, with_values
from ..model.layer_class import layer_lists
from .exported import Fields
from .llama import as_llama
from .padded import padded_alike
from .padding import LayerWidths, layer_widths, pad
from .padding_proof import SameOutputs, prove_padding

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

_CLOSE = 1e-6
"""How far float32 frequencies may be from the default's and still count as those."""


class Layer(NamedTuple):
    """The widths of one layer: feed-forward, query heads, key/value heads."""

    ffn: int
    queries: int
    keys: int


@dataclass(frozen=True)
class LlamaLayers:
    """A model that computes what a Llama does, layer by layer.

    Attributes:
        config: the Llama's, with the largest widths of all layers.
        weights: its tensors on the CPU, under a Llama's names; a tied head is not among them.
        layers: the widths of each layer.
        fields: the fields in which layers differ, before and after padding.
        proof: the comparison of a Llama's outputs with the model's.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    layers: list[Layer]
    fields: Fields
    proof: SameOutputs

    @property
    def head_dim(self) -> int:
        """The size of one head."""
        return _head_dim(self.config)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(value.numel() for value in self.weights.values())


def llama_layers(model: PreTrainedModel, multiple_of: int | None = None) -> LlamaLayers | Refusal:
    """Prove that a model is a Llama, whose layers may differ, and collect what it consists of.

    ``multiple_of``: pad the feed-forward of every layer to a multiple of this.

    Returns:
        The Llama; or a refusal that says why it is none.
    """
    differ = bool(layer_lists(type(model)))
    if multiple_of is not None and not differ:
        return Refusal(
            f"multiple_of={multiple_of} pads layers that differ, and these are alike. Prune to "
            "multiples: round_to= of the pruner"
        )
    padded = padded_alike(model) if differ else None
    if isinstance(padded, Refusal):
        return padded
    llama = as_llama(model if padded is None else padded[0].model)
    wide = model if multiple_of is None else _in_multiples(model, multiple_of)
    if isinstance(llama, Refusal):
        return llama
    if isinstance(wide, Refusal):
        return wide
    config, proof = llama
    before = _layers(model.state_dict(), config)
    weights = {name: value.detach().cpu() for name, value in wide.state_dict().items()}
    layers = _layers(weights, config)
    weights = _with_zero_biases(weights, config)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    fields = {
        "intermediate_size": (tuple(b.ffn for b in before), tuple(n.ffn for n in layers)),
        "num_attention_heads": (tuple(b.queries for b in before), tuple(n.queries for n in layers)),
        "num_key_value_heads": (tuple(b.keys for b in before), tuple(n.keys for n in layers)),
    }
    own = {name: values for name, values in fields.items() if len({*values[0], *values[1]}) > 1}
    return LlamaLayers(config, weights, layers, own, proof)


def _in_multiples(model: PreTrainedModel, multiple_of: int) -> PreTrainedModel | Refusal:
    """Return a model whose layers have a feed-forward of such a multiple, each its own."""
    widths = layer_widths(model)
    data = with_values(widths.data, _rounded_up(widths, multiple_of))
    padded = pad(model, widths, type(model), data)
    if isinstance(padded, Refusal):
        return padded
    proof = prove_padding(model, padded)
    return proof if isinstance(proof, Refusal) else padded.model


def _rounded_up(widths: LayerWidths, multiple_of: int) -> dict[FieldPath, int]:
    """Return the fields of single layers that count channels, not heads, rounded up."""
    return {
        width.fields[0]: -(-widths.values[width.fields[0]] // multiple_of) * multiple_of
        for width in widths.widths
        if len(width.fields) == 1 and width.groups[0].count.run == 1
    }


def _layers(weights: Mapping[str, Tensor], config: LlamaConfig) -> list[Layer]:
    """Return the widths of each layer, by the shapes of a Llama's tensors."""
    layers: list[Layer] = []
    head_dim = _head_dim(config)
    for number in range(config.num_hidden_layers):
        ffn, queries, keys = (
            len(weights[f"model.layers.{number}.{name}_proj.weight"])
            for name in ("mlp.up", "self_attn.q", "self_attn.k")
        )
        layers.append(Layer(ffn, queries // head_dim, keys // head_dim))
    return layers


def _head_dim(config: LlamaConfig) -> int:
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


def _with_zero_biases(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Return weights with zeros for the biases that a Llama has beside them (Qwen2's of o_proj)."""
    result = dict(weights)
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        part = layer.split(".")[-2:-1]
        if key == "weight" and part and biased.get(part[0]):
            result.setdefault(f"{layer}.bias", torch.zeros(len(value), dtype=value.dtype))
    return result


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
