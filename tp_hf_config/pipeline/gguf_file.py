"""Write a Llama whose layers may differ as a GGUF file, and compare the file with the Llama."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ..errors import listed
from .gguf_vocabulary import Vocabulary
from .llama_layers import Layer, LlamaLayers, rope_theta

_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
"""The dtype of a tensor -> its type in the file, and that of a file mostly of such tensors."""
_ROTARY_FACTORS = "rope_freqs.weight"


def write(
    path: Path, llama: LlamaLayers, vocabulary: Vocabulary, factors: Tensor | None, name: str
) -> None:
    """Write a GGUF file.

    Args:
        path: the file.
        llama: what it is to hold.
        vocabulary: the tokenizer.
        factors: what rotary frequencies are divided by; ``None``: 1.
        name: the model's name.
    """
    writer: Any = gguf.GGUFWriter(path, architecture(llama.layers))
    writer.add_name(name)
    writer.add_file_type(_TYPES[llama.weights["model.embed_tokens.weight"].dtype][1])
    _add_widths(writer, llama)
    _add_vocabulary(writer, vocabulary)
    if factors is not None:
        writer.add_tensor(_ROTARY_FACTORS, factors.numpy())
    for key, tensor in zip(_names(llama).values(), _tensors(llama), strict=True):
        kind, tensor = _TYPES[tensor.dtype][0], tensor.contiguous()
        if tensor.dtype == torch.bfloat16:  # which NumPy has not
            tensor = tensor.view(torch.uint8)
        writer.add_tensor(key, tensor.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(layers: list[Layer]) -> str:
    """Return llama.cpp's name of the architecture: a Llama with one width for all layers or not."""
    return "llama" if len(set(layers)) == 1 else "deci"


def difference(path: Path, llama: LlamaLayers, factors: Tensor | None) -> str | None:
    """Return how a file differs from what it is to hold, or ``None``.

    Args:
        path: the file.
        llama: the model: its widths by layer, and every bit of its tensors.
        factors: what rotary frequencies are divided by; ``None``: 1.
    """
    reader = gguf.GGUFReader(path)
    arch = architecture(llama.layers)
    for key, values in _by_layer(llama.layers).items():
        field = reader.get_field(f"{arch}.{key}")
        read = None if field is None else field.contents()
        if read != _one_or_all(values):
            return f"{arch}.{key} is {read}, expected {_one_or_all(values)}"
    names = _names(llama)
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    rotary = set() if factors is None else {_ROTARY_FACTORS}
    others = tensors.keys() ^ {*names.values(), *rotary}
    if others:
        return f"it has other tensors: {listed(sorted(others))}"
    for key, weight in llama.weights.items():
        dtype = _dtype(weight)
        data = tensors[names[key]].view(dtype)
        heads = _heads(key, llama.layers)
        original = data if heads is None else _in_halves(data, heads)
        if not torch.equal(original, weight.to(dtype)):
            return f"{names[key]} is not {key}"
    if factors is not None and not torch.equal(tensors[_ROTARY_FACTORS], factors):
        return f"{_ROTARY_FACTORS} is another"
    return None


def _add_widths(writer: Any, llama: LlamaLayers) -> None:
    """Add what llama.cpp builds the model from."""
    config = llama.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(llama.layers))
    writer.add_key_length(llama.head_dim)
    writer.add_value_length(llama.head_dim)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    by_layer = _by_layer(llama.layers)
    writer.add_feed_forward_length(_one_or_all(by_layer["feed_forward_length"]))
    writer.add_head_count(_one_or_all(by_layer["attention.head_count"]))
    writer.add_head_count_kv(_one_or_all(by_layer["attention.head_count_kv"]))


def _by_layer(layers: list[Layer]) -> dict[str, list[int]]:
    """Return key in the file, without the architecture -> its value in each layer."""
    return {
        "feed_forward_length": [layer.ffn for layer in layers],
        "attention.head_count": [layer.queries for layer in layers],
        "attention.head_count_kv": [layer.keys for layer in layers],
    }


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in vocabulary.types])
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, token in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _names(llama: LlamaLayers) -> dict[str, str]:
    """Return a Llama's name of a tensor -> llama.cpp's."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(llama.layers))
    suffixes = (".weight", ".bias")
    return {key: known.get_name(key, try_suffixes=suffixes) or key for key in llama.weights}


def _tensors(llama: LlamaLayers) -> Iterator[Tensor]:
    """Yield the tensors as llama.cpp wants them, in the order of the weights.

    It turns neighbouring channels of a head together, Transformers those half a head apart.
    """
    for key, weight in llama.weights.items():
        heads = _heads(key, llama.layers)
        yield (weight if heads is None else _in_pairs(weight, heads)).to(_dtype(weight))


def _dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in the file: norms and biases have to be float32, which holds the others."""
    return torch.float32 if weight.dim() == 1 else weight.dtype


def _heads(key: str, layers: list[Layer]) -> int | None:
    """Return the number of heads whose channels are turned; ``None`` for what is not turned."""
    parts = key.split(".")
    if parts[-2] not in ("q_proj", "k_proj"):
        return None
    layer = layers[int(parts[2])]
    return layer.queries if parts[-2] == "q_proj" else layer.keys


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Return channels of heads in another order: the two halves of a head interleaved."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Undo :func:`_in_pairs`."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
