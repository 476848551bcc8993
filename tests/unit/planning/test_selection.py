"""What is pruned where no width is named: what goes together, and what that leaves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import small
import tiny
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from masked_original import assert_same_as_masked

from tp_hf_config import (
    HFConfigSyncHook,
    PrunerSettingsWarning,
    UnsupportedModelError,
    Width,
    plan,
)
from tp_hf_config.fieldmap.model_view import view_of
from tp_hf_config.graph.prunable import widths_of

pytestmark = pytest.mark.skipif(
    small.TRANSFORMERS < (5,), reason="Transformers 4 has other fields in these configs"
)
_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Case(NamedTuple):
    """A class with widths that share a dimension, and what goes and stays by default."""

    make: Callable[[], hf.PreTrainedModel]
    goes: dict[str, int]
    stays: dict[str, str]


def mamba() -> hf.PreTrainedModel:
    config = hf.MambaConfig(**_TEXT, state_size=8, time_step_rank=12, intermediate_size=48)
    return hf.MambaForCausalLM(config)


def deepseek() -> hf.PreTrainedModel:
    config = hf.DeepseekV2Config(
        **_TEXT,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        moe_intermediate_size=40,
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        tie_word_embeddings=False,
    )
    return hf.DeepseekV2ForCausalLM(config)


def dinov2() -> hf.PreTrainedModel:
    config = hf.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return hf.Dinov2ForImageClassification(config)


def fields_of(model: hf.PreTrainedModel, **settings: Any) -> set[str]:
    """The fields that a pruner with these settings prunes where none is named."""
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        hooks=[HFConfigSyncHook(prune="inner")],
        **settings,
    )
    return {field[-1] for fields in pruner.DG.fields for field in fields}


def stays(dim: str, field: str, other: str) -> str:
    return (
        f"it sets dimension 0 of {dim}.weight together with {field}. To prune it too, make "
        f'another pruner afterwards: prune=("{other}",)'
    )


CASES = {
    "mamba": Case(
        mamba,
        {"intermediate_size": 24},
        {},
    ),
    "deepseek_v2": Case(
        deepseek,
        {"intermediate_size": 24, "moe_intermediate_size": 20},
        {
            "n_shared_experts": stays(
                "model.layers.1.mlp.shared_experts.gate_proj",
                "moe_intermediate_size",
                "n_shared_experts",
            )
        },
    ),
    "dinov2": Case(
        dinov2,
        {"hidden_size": 32},
        {"mlp_ratio": stays("dinov2.encoder.layer.0.mlp.fc1", "hidden_size", "mlp_ratio")},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_default_takes_what_goes_together_and_says_what_it_leaves(name: str) -> None:
    case = CASES[name]
    model = case.make().eval()
    tiny.randomise(model)
    original = copy.deepcopy(model)
    planned = plan(model)
    hook = HFConfigSyncHook(strict=True, prune="inner")
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        hooks=[hook],
    )
    pruner.step()
    pruner.step()
    assert planned.values == case.goes
    assert {name: planned.kept[name] for name in case.stays} == case.stays
    assert not any("of its own" in planned.kept[n] for n in planned.kept.keys() - case.stays)
    first, second = hook.reports
    assert first.notes == [f"{name} is kept: {reason}" for name, reason in case.stays.items()]
    assert second.notes == []
    assert {name: new for name, (_, new) in second.fields.items()} == case.goes
    rand = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = (
        {"pixel_values": torch.rand(2, 3, 32, 32, generator=rand)}
        if model.main_input_name == "pixel_values"
        else {"input_ids": torch.randint(3, 99, (2, 7), generator=rand)}
    )
    assert_same_as_masked(original, model, inputs)


def test_what_was_asked_for_comes_before_the_default() -> None:
    """Whole heads of a ViT hold a share of the hidden size, which stays a width of its own then."""
    model = dinov2()
    heads = {layer: count for _, layer, count in view_of(model).head_layers()}
    fields = fields_of(model, prune_head_dims=True, num_heads=heads)
    assert fields == {"head_dim", "hidden_size"}
    planned = plan(model, prune_num_heads=True, head_pruning_ratio=0.5)
    assert planned.values == {"num_attention_heads": 2, "hidden_size": 32}


def test_heads_go_where_no_other_width_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    def heads_alone(*args: Any) -> tuple[Width, ...]:
        return tuple(
            one if one.fields == (("num_attention_heads",),) else replace(one, reason="not seen")
            for one in widths_of(*args)
        )

    monkeypatch.setattr("tp_hf_config.planning.selection.widths_of", heads_alone)
    heads = {"prune_num_heads": True, "head_pruning_ratio": 0.5}
    assert fields_of(dinov2(), **heads) == {"num_attention_heads"}
    with pytest.raises(UnsupportedModelError, match="no width is proved"):
        fields_of(dinov2())


def test_a_width_that_is_named_is_never_left() -> None:
    with pytest.raises(UnsupportedModelError) as raised:
        plan(dinov2(), prune=("hidden_size", "mlp_ratio"))
    assert str(raised.value) == (
        "Dinov2ForImageClassification: hidden_size and mlp_ratio both set dimension 0 of "
        "dinov2.encoder.layer.0.mlp.fc1.weight. Prune them one after the other, each with a pruner "
        "of its own."
    )


INNER = {
    "gpt2": ["n_inner"],
    "deepseek_v3": ["intermediate_size", "moe_intermediate_size"],
    "mamba2": ["num_heads", "hidden_size"],  # no inner width: all that is inside
    "bert": ["intermediate_size"],
    "t5": ["d_ff"],
    "siglip": ["text_config.intermediate_size", "vision_config.intermediate_size"],
    "swin": ["embed_dim"],
    "wav2vec2": ["intermediate_size"],
}


@pytest.mark.parametrize("name", INNER)
def test_where_nothing_is_named_inner_widths_go_alone(name: str) -> None:
    planned = plan(zoo.build(name), pruning_ratio=0.25)
    assert [*planned.values] == INNER[name]


def test_inner_alone_means_inner_widths() -> None:
    model = small.llama()
    names = [*small.inside(model)]
    assert names == ["hidden_size", "intermediate_size"]
    assert plan(model).kept["hidden_size"] == "pruned only if it is named"
    fields = functools.partial(fields_of, model)
    first = model.model.layers[0]
    assert fields() == {"intermediate_size"}
    assert fields(root_module_types=[torch.nn.Linear]) == {"intermediate_size"}
    assert fields(pruning_ratio_dict={first.mlp: 0.5}) == {"intermediate_size"}
    with pytest.warns(PrunerSettingsWarning, match="^pruning_ratio_dict= has no effect for"):
        assert fields(pruning_ratio_dict={first.mlp.down_proj: 0.5}) == {"intermediate_size"}
    with pytest.warns(PrunerSettingsWarning, match="intermediate_size is kept at "):
        assert fields(root_module_types=[torch.nn.Embedding]) == set()
    with pytest.warns(PrunerSettingsWarning, match="intermediate_size is kept at "):
        assert fields(ignored_layers=[first.mlp.up_proj]) == set()
