"""The field map of layers with own fields, made from the stock class's: what probing learns."""

from __future__ import annotations

from typing import Any

import layer_zoo
import pytest

from tp_hf_config import UnsupportedModelError
from tp_hf_config.fieldmap.learn_field_map import build_live, learn
from tp_hf_config.fieldmap.model_view import layer_map, uniform_map
from tp_hf_config.graph.layer_fields import layers_listed
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.config_json import config_json, with_values
from tp_hf_config.model.layer_entries import KEY

pytestmark = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="this Transformers reads no per_layer_config from a config"
)
# Class -> values of single layers, which the others do not have.
OTHERS: dict[str, dict[tuple[str | int, ...], int]] = {
    "llama": {(KEY, "1", "intermediate_size"): 50, (KEY, "0", "num_attention_heads"): 2},
    "phi3": {
        (KEY, "0", "intermediate_size"): 50,
        (KEY, "1", "num_attention_heads"): 2,
        ("head_dim",): 16,
    },
    "qwen3_moe": {(KEY, "1", "moe_intermediate_size"): 24, (KEY, "1", "num_attention_heads"): 2},
    "deepseek_v3": {(KEY, "0", "kv_lora_rank"): 12, (KEY, "1", "q_lora_rank"): 10},
    "bert": {(KEY, "1", "intermediate_size"): 50},
    "t5": {(KEY, "1", "d_ff"): 50},
    "gpt2": {(KEY, "0", "n_inner"): 50},
    "qwen2_vl": {("text_config", KEY, "1", "intermediate_size"): 50},
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_is_what_probing_every_layer_learns(name: str) -> None:
    model: Any = layer_zoo.build(name)
    with layers_listed(model):
        builder = build_live(model)[0]
        data = with_values(config_json(model.config, use_diff=False), OTHERS[name])
        full = builder.build(data)
        assert not isinstance(full, Refusal), full.reason
        uniform = uniform_map(builder, data)
        made = layer_map(builder, data, uniform, uniform.depth)
        learned = learn(builder, builder.config(data), full)
    assert made is not None
    assert made.values == learned.values
    assert made.splits.heads == learned.splits.heads
    both = made.expressions.keys() & learned.expressions.keys()
    others = made.expressions.keys() ^ learned.expressions.keys()
    assert all(isinstance(which, str) for _, which in others)  # probes' passes may break off
    assert all(made.expressions[key] == learned.expressions[key] for key in both)


def test_a_layers_own_field_sets_its_own_tensors_alone() -> None:
    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        builder = build_live(model)[0]
        data = config_json(model.config, use_diff=False)
        uniform = uniform_map(builder, data)
        made = layer_map(builder, data, uniform, uniform.depth)
    assert made is not None
    own = (KEY, "1", "intermediate_size")
    names = {name for (name, _), e in made.expressions.items() if own in e.fields}
    assert names == {f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert made.fields_of("model.layers.0.mlp.up_proj.weight", 0) == {
        (KEY, "0", "intermediate_size")
    }
    assert ("intermediate_size",) not in made.values


def test_it_is_learned_once_whatever_single_layers_lose() -> None:
    model: Any = layer_zoo.build("llama")
    with layers_listed(model):
        builder = build_live(model)[0]
        data = config_json(model.config, use_diff=False)
        after_a_step = with_values(data, {(KEY, "0", "intermediate_size"): 24})
        assert uniform_map(builder, after_a_step) is uniform_map(builder, data)


@pytest.mark.parametrize(("name", "for_all", "heads"), [("llama", 4, 4), ("mistral", 3, 2)])
def test_numbers_with_which_the_stock_class_does_not_run(
    name: str, for_all: int, heads: int
) -> None:
    """Llama runs with four for all; three are no multiple of two key/value heads: as layer 0."""
    model: Any = layer_zoo.build(name)
    with layers_listed(model):
        builder = build_live(model)[0]
        data = config_json(model.config, use_diff=False)
        first = {(KEY, "0", "num_attention_heads"): 2}
        data = with_values(data, {("num_attention_heads",): for_all, **first})
        uniform = uniform_map(builder, data)
        made = layer_map(builder, data, uniform, uniform.depth)
        learned = learn(builder, builder.config(data), builder.build(data))
    assert uniform.values["num_attention_heads",] == heads
    assert made is not None
    assert made.values == learned.values
    assert made.splits.heads == learned.splits.heads


@pytest.mark.parametrize(
    ("layers", "for_all", "heads"), [("0", 3, 2), ("0", 4, 4), ("01", 3, None)]
)
def test_numbers_that_the_stock_class_refuses(layers: str, for_all: int, heads: int | None) -> None:
    """Three heads do not divide 64: all have the number for all, or are like another layer."""
    model: Any = layer_zoo.build("llama")
    three = {(KEY, layer, "num_attention_heads"): 3 for layer in layers}
    with layers_listed(model):
        builder = build_live(model)[0]
        data = config_json(model.config, use_diff=False)
    data = with_values(data, {(KEY, "1", "num_attention_heads"): 2, **three})
    data = with_values(data, {("num_attention_heads",): for_all})
    if heads is None:
        with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM: .* is not a multiple"):
            uniform_map(builder, data)
    else:
        assert uniform_map(builder, data).values["num_attention_heads",] == heads
