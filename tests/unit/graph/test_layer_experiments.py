"""The tiny model of a class whose layers have fields of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers as hf

from tp_hf_config.fieldmap.field_map import Depth
from tp_hf_config.fieldmap.learn_field_map import build_live
from tp_hf_config.fieldmap.model_view import uniform_map
from tp_hf_config.graph.experiments import LayerFindings, experiments_of
from tp_hf_config.graph.layer_fields import layers_listed
from tp_hf_config.model.build import Refusal
from tp_hf_config.model.config_json import config_json


@pytest.mark.skipif(not hasattr(hf, "Gemma4TextConfig"), reason="it came with Transformers 5")
def test_entries_that_the_stock_class_has_are_tiny_too() -> None:
    """Gemma 4 numbers its layers with as many digits as the last of them has: ``05``."""
    config = hf.Gemma4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        hidden_size_per_layer_input=0,
        num_hidden_layers=11,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
    )
    model = hf.Gemma4ForCausalLM(config).eval()
    with layers_listed(model):
        builder, data = build_live(model)[0], config_json(model.config, use_diff=False)
        uniform = uniform_map(builder, data)
        stock = experiments_of(uniform).tiny
        assert not isinstance(stock, Refusal)
        full = replace(uniform, builder=builder, data=data, depth=Depth(data))
        tiny = LayerFindings(full, uniform, stock).tiny_model()
    entries = tiny.field_map.data["per_layer_config"]
    head_dims = {int(number): entry["head_dim"] for number, entry in entries.items()}
    assert len(head_dims) == 11
    of_kinds = {number in (5, 10): head_dim for number, head_dim in head_dims.items()}
    assert head_dims == {number: of_kinds[number in (5, 10)] for number in range(11)}
    assert of_kinds[True] != of_kinds[False]
    attention = tiny.model.model.layers[5].self_attn
    assert attention.q_norm.weight.shape == (of_kinds[True],)
