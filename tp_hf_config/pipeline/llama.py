"""Find out whether a model is a Llama by another name, by building a Llama with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint.verify import live_outputs
from ..errors import in_one_line, listed
from ..fieldmap.learn_field_map import map_of
from ..model.build import Builder, Refusal, without_data
from ..model.config_json import config_json, with_values
from .padding_proof import ROUNDING, SameOutputs, compared, in_float64, outputs_of
from .roundtrip import runnable_inputs

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from ..forward.run_recipe import RunRecipe

_NOT_SETTINGS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
_BIASES = ("attention_bias", "mlp_bias")


def as_llama(model: PreTrainedModel) -> tuple[LlamaConfig, SameOutputs] | Refusal:
    """Return the config with which a Llama computes what a model does from the same weights.

    ``model``: a model with weights, all of its layers alike.

    Returns:
        The config and the comparison of the outputs; or a refusal: its tensors are others, it
        computes something else, or a setting of its own changes what it computes. A bias that only
        the Llama has is zero.
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
    """Yield inputs with the last positions that a config allows, if the model takes positions.

    What depends on positions alone, such as queries that are scaled from one on, shows there.
    """
    ids = inputs.get("input_ids")
    if ids is None or "position_ids" not in signature(model.forward).parameters:
        return
    first = max(config.max_position_embeddings - ids.shape[-1], 0)
    positions = torch.arange(first, first + ids.shape[-1])
    yield {**inputs, "position_ids": positions.expand_as(ids)}


def _outputs(model: Any, passes: Sequence[dict[str, Any]], recipe: RunRecipe) -> list[Tensor]:
    """Return the outputs of several passes of a model in float64, one after the other.

    A plain pass goes first: frequencies that a class computes once and keeps (longrope) are float32
    then, as those of a model that ran before are.
    """
    twin = in_float64(model, recipe)
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
        except Exception as error:  # the config class has many validators
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
            zeros = {
                n: torch.zeros(wanted[n], dtype=model.dtype) for n in wanted if n not in weights
            }
            _give_weights(llama, {**weights, **zeros})
            return llama
    return Refusal(reason)


def _give_weights(built: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model that was built without data its weights; they are not copied."""
    built.load_state_dict(weights, assign=True)
    built.tie_weights()  # type: ignore[operator]
