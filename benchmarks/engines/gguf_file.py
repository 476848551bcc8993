"""A GGUF file for llama.cpp from a pruned folder: Llama and BERT, tensors in float32.

llama.cpp's own converter is not on PyPI; ``gguf``, its reader and writer, is.  A Llama's metadata,
the tokenizer among it, comes from the GGUF file that the model was read from, with the widths
replaced; a BERT's from its folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    PoolingType,
    TokenType,
    get_tensor_name_map,
)
from safetensors.numpy import load_file

Tensors = Iterator[tuple[str, np.ndarray]]


def write(folder: Path, source: Path, target: Path) -> None:
    """Convert a folder; ``source`` is where the unpruned model came from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    if kind not in ("llama", "bert"):
        raise ValueError(f"no GGUF writer for {kind}")
    weights = {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    writer = GGUFWriter(target, kind)
    if kind == "llama":
        _llama(writer, config, GGUFReader(source))
    else:
        _bert(writer, config, folder)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for name, tensor in _renamed(weights, config):
        writer.add_tensor(name, tensor.astype(np.float32), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama(writer: GGUFWriter, config: dict[str, Any], source: GGUFReader) -> None:
    """The source's metadata with the widths of the config."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"no GGUF writer for rope_type {rope['rope_type']}")
    widths = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
    }
    for key, value in widths.items():
        writer.add_uint32(f"llama.{key}", value)
    written = {f"llama.{key}" for key in widths} | {"general.architecture", "general.file_type"}
    for name, field in source.fields.items():
        if name not in written and not name.startswith("GGUF."):
            kind, *inner = field.types
            sub = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)


def _bert(writer: GGUFWriter, config: dict[str, Any], folder: Path) -> None:
    """Widths from the config, the vocabulary from ``tokenizer.json``."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.MEAN)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("bert")
    writer.add_token_list([word if word in special else _phantom_space(word) for word in words])
    writer.add_token_types(
        [TokenType.CONTROL if word in special else TokenType.NORMAL for word in words]
    )
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_unk_token_id(vocabulary["[UNK]"])
    writer.add_bos_token_id(vocabulary["[CLS]"])
    writer.add_sep_token_id(vocabulary["[SEP]"])
    writer.add_pad_token_id(vocabulary["[PAD]"])
    writer.add_mask_token_id(vocabulary["[MASK]"])


def _phantom_space(word: str) -> str:
    """llama.cpp marks where a word begins, WordPiece where one goes on."""
    return word[2:] if word.startswith("##") else f"\u2581{word}"


def _renamed(weights: dict[str, np.ndarray], config: dict[str, Any]) -> Tensors:
    """The tensors under llama.cpp's names; what it does not use (BERT's pooler) is left out."""
    architecture = MODEL_ARCH[config["model_type"].upper()]
    names = get_tensor_name_map(architecture, config["num_hidden_layers"])
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config.get("num_key_value_heads", 0),
    }
    for name, tensor in weights.items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            if name.startswith("pooler."):
                continue
            raise ValueError(f"no GGUF name for {name}")
        part = name.partition("self_attn.")[2]
        yield new, interleaved(tensor, heads[part]) if part in heads else tensor


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves (transformers) as rotary pairs (llama.cpp)."""
    halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
