"""Prove that a model computes what a Llama does, by building a Llama; layers may differ.

Such a model is exported to ``"decilm"``: the Llama of several widths that vLLM and others serve as
DeciLM. Its config has an entry for each layer (``block_configs``): the width of the feed-forward,
and how many query heads read one key/value head. All layers have the same number of query heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.building import Classes
from ..checkpoint.loading import write_for_transformers_4
from ..checkpoint.verify import live_outputs
from ..errors import in_one_line, listed
from ..fieldmap.learn_field_map import map_of
from ..model.build import Builder, Refusal, without_data
from ..model.config_json import config_json, with_values
from .job import Written
from .output import writing_weights
from .padding import padded_alike
from .proofs import (
    ROUNDING,
    NotProvedError,
    SameOutputs,
    compared,
    first_run,
    in_float64,
    outputs_of,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from ..forward.run_recipe import RunRecipe

_NOT_SETTINGS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
# part of a layer -> the setting for biases in it
_BIASES = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
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


def as_llama(model: PreTrainedModel) -> tuple[LlamaConfig, SameOutputs]:
    """Return the config with which a Llama computes the same from the same weights, and the proof.

    All layers have to be alike. Refused: other tensors or outputs, or settings of its own that can
    change what it computes.
    """
    data = config_json(model.config, use_diff=False)
    llama = _built(model, data)
    recipe = map_of(model).recipe
    inputs, _ = first_run(model, recipe)
    inputs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    passes = [inputs, *_at_the_end(model, inputs, llama.config)]
    expected = _outputs(model, passes, recipe)
    same = compared(expected, _outputs(llama, passes, recipe))
    if not same.difference <= ROUNDING:
        raise NotProvedError(
            f"a Llama with its weights computes something else: outputs are {same.difference:.0e} "
            "off"
        )
    builder = Builder(model)
    known = config_json(llama.config, use_diff=False)
    own = (k for k, v in data.items() if k not in known and type(v) is int and v > 1)
    for key in own:
        other = builder.build(with_values(data, {(key,): 1}), buffers=True)
        if not isinstance(other, Refusal):
            _give_weights(other, model.state_dict())
            found = _outputs(other, passes, recipe)
            if compared(expected, found).difference <= ROUNDING:
                continue
        raise NotProvedError(
            f"{key} {data[key]} can change what it computes, and a Llama has no such setting. "
            f"Where it is to be given up, set config.{key} = None"
        )
    return llama.config, same


def _at_the_end(
    model: PreTrainedModel, inputs: Mapping[str, Any], config: LlamaConfig
) -> Iterator[dict[str, Any]]:
    """Yield inputs with the last positions: there, position-dependent scaling of queries shows."""
    ids = inputs.get("input_ids")
    if ids is None or "position_ids" not in signature(model.forward).parameters:
        return
    first = max(config.max_position_embeddings - ids.shape[-1], 0)
    positions = torch.arange(first, first + ids.shape[-1])
    yield {**inputs, "position_ids": positions.expand_as(ids)}


def _outputs(model: Any, passes: Sequence[dict[str, Any]], recipe: RunRecipe) -> list[Tensor]:
    twin = in_float64(model, recipe)
    # frequencies that a class computes once and keeps (longrope) become float32, as in a model
    # that ran before
    live_outputs(twin, passes[0])
    return [output for inputs in passes for output in outputs_of(twin, inputs, recipe)]


def _built(model: PreTrainedModel, data: Mapping[str, Any]) -> Any:
    """Return a Llama with the settings and weights of a model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = model.state_dict()
    names = LlamaConfig().to_dict().keys() - set(_NOT_SETTINGS)
    settings = {key: value for key, value in data.items() if key in names}
    for part, name in _BIASES.items():
        settings[name] = any(f".{part}." in key and key.endswith("_proj.bias") for key in weights)
    try:
        config = LlamaConfig(**settings)
    except Exception as error:  # from one of the config class's validators
        raise NotProvedError(in_one_line(error)) from error
    empty = without_data(LlamaForCausalLM, config)
    if isinstance(empty, Refusal):
        raise NotProvedError(empty.reason)
    weights = _with_zero_biases(weights, config)
    shapes, wanted = (
        {(name, value.shape) for name, value in tensors.items()}
        for tensors in (weights, empty.state_dict())
    )
    if shapes != wanted:
        other = sorted({name for name, _ in shapes ^ wanted})
        raise NotProvedError(f"a Llama has other tensors: {listed(other)}")
    llama: Any = Builder(empty).build(config_json(config, use_diff=False), buffers=True)
    _give_weights(llama, weights)
    return llama


def _give_weights(built: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Assign weights, without a copy, to a model built on the meta device."""
    built.load_state_dict(weights, assign=True)
    built.tie_weights()  # type: ignore[operator]


class Layer(NamedTuple):
    ffn: int
    queries: int
    keys: int


@dataclass(frozen=True)
class LlamaLayers:
    """A model that computes what a Llama does; its weights have a Llama's names."""

    config: LlamaConfig  # with the largest widths of all layers
    head_dim: int
    weights: dict[str, Tensor]  # on the CPU, without a tied head
    layers: list[Layer]
    proof: SameOutputs

    def written(self, loading: str) -> Written:
        """Return what an export of it wrote."""
        names = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        fields = dict(zip(names, zip(*self.layers, strict=True), strict=True))
        differing = {name: (own,) * 2 for name, own in fields.items() if len(set(own)) > 1}
        parameters = sum(value.numel() for value in self.weights.values())
        return Written(parameters, self.proof, differing, loading)


def llama_layers(model: PreTrainedModel) -> LlamaLayers:
    """Prove that a model whose layers differ is a Llama, and return its parts."""
    config, proof = as_llama(padded_alike(model)[0])
    head_dim = int(config.head_dim or config.hidden_size // config.num_attention_heads)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    weights = _with_zero_biases(weights, config)
    layers: list[Layer] = []
    for number in range(config.num_hidden_layers):
        ffn, queries, keys = (
            len(weights[f"model.layers.{number}.{name}_proj.weight"])
            for name in ("mlp.up", "self_attn.q", "self_attn.k")
        )
        layers.append(Layer(ffn, queries // head_dim, keys // head_dim))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return LlamaLayers(config, head_dim, weights, layers, proof)


def _with_zero_biases(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Add zeros for the biases that only a Llama has (Qwen2 has none in o_proj)."""
    result = dict(weights)
    biased = tuple(part for part, name in _BIASES.items() if getattr(config, name))
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        if key == "weight" and layer.rpartition(".")[0].endswith(biased):
            zeros = torch.zeros(len(value), dtype=value.dtype, device=value.device)
            result.setdefault(f"{layer}.bias", zeros)
    return result


def write_decilm(model: PreTrainedModel, folder: Path) -> Written:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = llama_layers(model)
    config, layers = llama.config, llama.layers
    if len({layer.queries for layer in layers}) > 1:
        heads = " or ".join(map(str, sorted({layer.queries for layer in layers})))
        raise NotProvedError(
            f"its layers have {heads} query heads, and DeciLM has one number for all layers. Prune "
            "the feed-forward alone, or export to='padded' or, for llama.cpp, to='gguf'"
        )
    data = json.dumps(_deci_config(config, layers, model.dtype), indent=2)
    (folder / "config.json").write_text(data + "\n", encoding="utf-8")
    write_for_transformers_4(folder, Classes(LlamaConfig, LlamaForCausalLM, 0))
    (folder / f"{_FILE}.py").write_text(_SOURCE, encoding="utf-8")
    save_weights(llama.weights, folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return llama.written("vllm.LLM(folder, trust_remote_code=True)")


def _deci_config(llama: LlamaConfig, layers: list[Layer], dtype: torch.dtype) -> dict[str, Any]:
    whole = {"no_op": False, "replace_with_linear": False}
    return {
        **config_json(llama),
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_FILE}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "dtype": str(dtype).removeprefix("torch."),
        "intermediate_size": max(layer.ffn for layer in layers),
        "num_attention_heads": layers[0].queries,
        "num_key_value_heads": max(layer.keys for layer in layers),
        "block_configs": [
            {
                "attention": {**whole, "n_heads_in_group": layer.queries // layer.keys},
                "ffn": {**whole, "intermediate_size": layer.ffn},
            }
            for layer in layers
        ],
    }


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    with writing_weights():
        save_torch_state_dict(weights, folder)
