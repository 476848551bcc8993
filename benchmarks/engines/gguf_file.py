"""A GGUF file for llama.cpp from the folder of a BERT, tensors in float32.

llama.cpp's own converter is not on PyPI; ``gguf``, its reader and writer, is.  Llamas are written
by ``tp_hf_config.export``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    PoolingType,
    TokenType,
    get_tensor_name_map,
)
from safetensors.numpy import load_file


def write(folder: Path, target: Path) -> None:
    """Convert a folder; what llama.cpp does not use (the pooler) is left out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "bert":
        raise ValueError(f"no GGUF writer for {config['model_type']}")
    names = get_tensor_name_map(MODEL_ARCH.BERT, config["num_hidden_layers"])
    writer = GGUFWriter(target, "bert")
    _bert(writer, config, folder)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is not None:
                data = tensor.astype(np.float32)
                writer.add_tensor(new, data, raw_dtype=GGMLQuantizationType.F32)
            elif not name.startswith("pooler."):
                raise ValueError(f"no GGUF name for {name}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
