"""Export to ``"decilm"``: the Llama of several widths that vLLM and others serve as DeciLM.

It has an entry for each layer (``block_configs``): the width of the feed-forward, and how many
query heads read one key/value head.  All layers have the same number of query heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.building import Classes
from ..checkpoint.rotary import write_for_transformers_4
from ..model.build import Refusal
from ..model.config_json import config_json
from .exported import Ready, Request
from .llama_layers import Layer, llama_layers
from .output import writing_weights

if TYPE_CHECKING:
    from transformers import LlamaConfig

MULTIPLE = 256
"""Engines that know a layer's width as a ratio alone round it up to a multiple of this."""
_FILE = "configuration_decilm"
_SOURCE = '''\
"""The config of a Llama whose layers differ, as vLLM and others serve it: DeciLM.

Written by tp_hf_config, which pruned this model. It needs only Transformers.
"""

from transformers import LlamaConfig


class Block(dict):
    """What one layer has of its own; keys are attributes too."""

    def __getattr__(self, key):
        if key not in self:
            raise AttributeError(key)
        return Block(self[key]) if isinstance(self[key], dict) else self[key]


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        super().__init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs]
'''


def prepare(request: Request) -> Ready | Refusal:
    """Prove that a model is a Llama of several widths, and write down those of each layer.

    ``request``: what to export; with a multiple of 256, layers are padded to it, and their widths
    are given as ratios.

    Returns:
        The export, ready to be written; or a refusal that says what DeciLM does not express.
    """
    ratios = request.multiple_of is not None
    if request.multiple_of not in (None, MULTIPLE):
        return Refusal(
            f"multiple_of={request.multiple_of}: DeciLM's ratios stand for multiples of "
            f"{MULTIPLE}, and without any every layer keeps its own width"
        )
    llama = llama_layers(request.model, request.multiple_of)
    if isinstance(llama, Refusal):
        return llama
    config, layers = llama.config, llama.layers
    if len({layer.queries for layer in layers}) > 1:
        heads = " or ".join(map(str, sorted({layer.queries for layer in layers})))
        return Refusal(
            f"its layers have {heads} query heads, and DeciLM has one number for all layers. Prune "
            "the feed-forward alone, or export to='padded' or, for llama.cpp, to='gguf'"
        )
    blocks = [_block(layer, config.hidden_size if ratios else None) for layer in layers]
    generation = request.model.generation_config

    def write(folder: Path) -> None:
        _write(folder, _config(config, layers, blocks, request.model.dtype), llama.weights)
        if generation is not None:
            generation.save_pretrained(folder)

    return Ready(
        write,
        llama.fields,
        llama.parameters,
        llama.proof,
        loading="vllm.LLM(folder, trust_remote_code=True)",
    )


def _block(layer: Layer, hidden_size: int | None) -> dict[str, Any]:
    """Return the entry of a layer, as a ratio to the hidden size if that is given.

    Engines multiply the ratio by two thirds of the hidden size, and round the result up to a
    multiple of 256: the middle below the width leaves rounding errors no chance.
    """
    ffn: dict[str, Any] = {"no_op": False, "replace_with_linear": False}
    if hidden_size is None:
        ffn["intermediate_size"] = layer.ffn
    else:
        ffn["ffn_mult"] = 1.5 * (layer.ffn - MULTIPLE // 2) / hidden_size
    attention = {"no_op": False, "replace_with_linear": False}
    return {"attention": {**attention, "n_heads_in_group": layer.queries // layer.keys}, "ffn": ffn}


def _config(
    llama: LlamaConfig, layers: list[Layer], blocks: list[dict[str, Any]], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the config's JSON: a Llama's with the largest widths, and an entry for each layer."""
    return {
        **config_json(llama),
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_FILE}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "dtype": str(dtype).removeprefix("torch."),
        "intermediate_size": max(layer.ffn for layer in layers),
        "num_attention_heads": layers[0].queries,
        "num_key_value_heads": max(layer.keys for layer in layers),
        "block_configs": blocks,
    }


def _write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write the config, the file of its class and the weights."""
    from huggingface_hub import save_torch_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_for_transformers_4(folder, Classes(LlamaConfig, LlamaForCausalLM, 0))
    (folder / f"{_FILE}.py").write_text(_SOURCE, encoding="utf-8")
    with writing_weights():
        save_torch_state_dict(weights, folder)
