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
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.building import Classes
from ..checkpoint.rotary import write_for_transformers_4
from ..checkpoint.verify import live_outputs
from ..errors import in_one_line, listed
from ..fieldmap.learn_field_map import map_of
from ..model.build import Builder, Refusal, without_data
from ..model.config_json import config_json, with_values
from .job import ByLayer, Ready
from .output import writing_weights
from .padding import layer_widths, pad, padded_alike
from .proofs import ROUNDING, SameOutputs, compared, in_float64, outputs_of, runnable_inputs

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from ..forward.run_recipe import RunRecipe

_NOT_SETTINGS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
_BIASES = ("attention_bias", "mlp_bias")
# engines that know a layer's width only as a ratio round it up to a multiple of this
MULTIPLE = 256
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


def as_llama(model: PreTrainedModel) -> tuple[LlamaConfig, SameOutputs] | Refusal:
    """Return the config with which a Llama computes the same from the same weights, and the proof.

    All layers have to be alike. Refused: other tensors or outputs, or settings of its own that can
    change what it computes.
    """
    data = config_json(model.config, use_diff=False)
    llama = _built(model, data)
    if isinstance(llama, Refusal):
        return llama
    recipe = map_of(model).recipe
    inputs = runnable_inputs(model, recipe)
    if isinstance(inputs, Refusal):
        return inputs
    inputs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    passes = [inputs, *_at_the_end(model, inputs, llama.config)]
    expected = _outputs(model, passes, recipe)
    same = compared(expected, _outputs(llama, passes, recipe))
    if not same.difference <= ROUNDING:
        return Refusal(
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
        return Refusal(
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
    """Return the float64 outputs of several passes."""
    twin = in_float64(model, recipe)
    # frequencies that a class computes once and keeps (longrope) become float32, as in a model
    # that ran before
    live_outputs(twin, passes[0])
    return [output for inputs in passes for output in outputs_of(twin, inputs, recipe)]


def _built(model: PreTrainedModel, data: Mapping[str, Any]) -> Any:
    """Return a Llama with the settings and weights of a model, or why there is none."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = LlamaConfig().to_dict().keys() - set(_NOT_SETTINGS)
    settings = {key: value for key, value in data.items() if key in names}
    weights = model.state_dict()
    reason = ""
    for biases in product((False, True), repeat=len(_BIASES)):
        try:
            config = LlamaConfig(**{**settings, **dict(zip(_BIASES, biases, strict=True))})
        except Exception as error:  # from one of the config class's validators
            return Refusal(in_one_line(error))
        empty = without_data(LlamaForCausalLM, config)
        if isinstance(empty, Refusal):
            return empty
        wanted = {name: value.shape for name, value in empty.state_dict().items()}
        apart = [name for name, value in weights.items() if wanted.get(name) != value.shape]
        lacking = [name for name in wanted.keys() - weights.keys() if not name.endswith(".bias")]
        reason = reason or f"a Llama has other tensors: {listed(sorted({*apart, *lacking}))}"
        if not apart and not lacking:
            llama: Any = Builder(empty).build(config_json(config, use_diff=False), buffers=True)
            zeros = {  # biases that only the Llama has
                n: torch.zeros(wanted[n], dtype=model.dtype) for n in wanted if n not in weights
            }
            _give_weights(llama, {**weights, **zeros})
            return llama
    return Refusal(reason)


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
    weights: dict[str, Tensor]  # on the CPU, without a tied head
    layers: list[Layer]
    fields: ByLayer  # those in which layers differ, before and after padding
    proof: SameOutputs

    @property
    def head_dim(self) -> int:
        return _head_dim(self.config)

    @property
    def parameters(self) -> int:
        return sum(value.numel() for value in self.weights.values())


def llama_layers(model: PreTrainedModel, multiple_of: int | None = None) -> LlamaLayers | Refusal:
    """Prove that a model whose layers differ is a Llama, and return its parts; or refuse."""
    padded = padded_alike(model)
    if isinstance(padded, Refusal):
        return padded
    llama = as_llama(padded[0])
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
    """Pad each layer's own feed-forward to a multiple."""
    widths = layer_widths(model)
    multiples = {
        width.fields[0]: -(-widths.values[width.fields[0]] // multiple_of) * multiple_of
        for width in widths.widths
        if len(width.fields) == 1 and width.groups[0].count.run == 1  # channels, not heads
    }
    padded = pad(model, widths, type(model), with_values(widths.data, multiples))
    return padded if isinstance(padded, Refusal) else padded[0]


def _layers(weights: Mapping[str, Tensor], config: LlamaConfig) -> list[Layer]:
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
    """Add zeros for the biases that only a Llama has (Qwen2 has none in o_proj)."""
    result = dict(weights)
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    for name, value in weights.items():
        layer, _, key = name.rpartition(".")
        part = layer.split(".")[-2:-1]
        if key == "weight" and part and biased.get(part[0]):
            result.setdefault(f"{layer}.bias", torch.zeros(len(value), dtype=value.dtype))
    return result


def prepare_decilm(model: PreTrainedModel, multiple_of: int | None) -> Ready | Refusal:
    """Prove that a model is a Llama of several widths, and return the export; or refuse."""
    if multiple_of not in (None, MULTIPLE):
        return Refusal(
            f"multiple_of={multiple_of}: DeciLM's ratios stand for multiples of "
            f"{MULTIPLE}, and without any every layer keeps its own width"
        )
    llama = llama_layers(model, multiple_of)
    if isinstance(llama, Refusal):
        return llama
    config, layers = llama.config, llama.layers
    if len({layer.queries for layer in layers}) > 1:
        heads = " or ".join(map(str, sorted({layer.queries for layer in layers})))
        return Refusal(
            f"its layers have {heads} query heads, and DeciLM has one number for all layers. Prune "
            "the feed-forward alone, or export to='padded' or, for llama.cpp, to='gguf'"
        )
    blocks = [_block(layer, config.hidden_size if multiple_of else None) for layer in layers]
    generation = model.generation_config

    def write(folder: Path) -> tuple[int, SameOutputs]:
        _write_decilm(folder, _deci_config(config, layers, blocks, model.dtype), llama.weights)
        if generation is not None:
            generation.save_pretrained(folder)
        return llama.parameters, llama.proof

    return Ready(write, llama.fields, loading="vllm.LLM(folder, trust_remote_code=True)")


def _block(layer: Layer, hidden_size: int | None) -> dict[str, Any]:
    """Return the entry of a layer, with its width as a ratio if ``hidden_size`` is given."""
    ffn: dict[str, Any] = {"no_op": False, "replace_with_linear": False}
    if hidden_size is None:
        ffn["intermediate_size"] = layer.ffn
    else:
        # engines multiply it by 2/3 of the hidden size and round up to a multiple of 256; half a
        # multiple less makes that safe from rounding errors
        ffn["ffn_mult"] = 1.5 * (layer.ffn - MULTIPLE // 2) / hidden_size
    attention = {"no_op": False, "replace_with_linear": False}
    return {"attention": {**attention, "n_heads_in_group": layer.queries // layer.keys}, "ffn": ffn}


def _deci_config(
    llama: LlamaConfig, layers: list[Layer], blocks: list[dict[str, Any]], dtype: torch.dtype
) -> dict[str, Any]:
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


def _write_decilm(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    from huggingface_hub import save_torch_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_for_transformers_4(folder, Classes(LlamaConfig, LlamaForCausalLM, 0))
    (folder / f"{_FILE}.py").write_text(_SOURCE, encoding="utf-8")
    with writing_weights():
        save_torch_state_dict(weights, folder)
