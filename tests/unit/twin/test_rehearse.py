"""A cut is rehearsed on the tiny model: what only looks like units of a field is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_pruning as tp
import transformers as hf
from masked import masked_difference

from tp_hf_config import (
    HFConfigSyncHook,
    prunable,
    supports,
)
from tp_hf_config.fieldmap.field_map import ungrouped_change
from tp_hf_config.fieldmap.learn_field_map import map_of
from tp_hf_config.graph.prunable import widths_of
from tp_hf_config.model.build import Builder, Refusal
from tp_hf_config.model.config_json import FieldPath, config_json
from tp_hf_config.pipeline.support import subject
from tp_hf_config.twin.find_groups import find_groups
from tp_hf_config.twin.masked_check import _channel_axis, rehearse
from tp_hf_config.twin.tiny.tiny_model import TinyModel, tiny_model
from tp_hf_config.twin.width_scalars import CutDim, DualWidth


def qwen3_5_moe() -> hf.PreTrainedModel:
    """As many key heads of linear attention as dimensions in one: 8 either way."""
    config = hf.Qwen3_5MoeTextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=8,
        linear_num_value_heads=16,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    torch.manual_seed(0)
    return hf.Qwen3_5MoeForCausalLM(config).eval()


def test_one_dimension_of_every_head_is_not_taken_for_a_head() -> None:
    widths = {width.name: width for width in prunable(qwen3_5_moe()).widths}
    heads = widths["linear_num_key_heads"]
    assert heads.reason is not None
    assert widths["linear_key_head_dim"].reason is None


def test_a_factor_of_a_product_is_known_by_what_the_pruner_prunes() -> None:
    tiny = tiny_model(map_of(qwen3_5_moe()))
    assert isinstance(tiny, TinyModel)
    model = subject(tiny, 0).model
    original = subject(tiny, 0).model
    before = dict(model.config.to_dict())  # type: ignore[union-attr, operator]
    hook = HFConfigSyncHook(prune=("linear_key_head_dim",))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        hooks=[hook],
    )
    pruner.step()
    half = before["linear_key_head_dim"] // 2
    assert hook.last_report is not None
    changed = {name: new for name, (_, new) in hook.last_report.fields.items()}
    assert changed == {"linear_key_head_dim": half}
    fresh = Builder(model).build_real(config_json(model.config))  # type: ignore[arg-type]
    assert masked_difference(original, model, fresh, tiny.inputs) is None  # type: ignore[arg-type]


def test_a_width_that_a_squeeze_follows_in_steps_is_refused() -> None:
    config = hf.RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], groups_width=8
    )
    model = hf.RegNetForImageClassification(config).eval()
    widths = {width.name: width.reason for width in prunable(model).widths}
    assert "has [2, 8, 1, 1], the class builds [1, 8, 1, 1]" in str(widths["embedding_size"])
    field_map = map_of(model)
    less: dict[FieldPath, int] = {("embedding_size",): 9}
    fewer = field_map.build_at(less)
    assert not isinstance(fewer, Refusal)
    squeeze = "regnet.encoder.stages.0.layers.0.layer.2.attention.0.weight"
    change = ungrouped_change(field_map, less, fewer, set())
    assert f"of {squeeze} would change from 4 to 2" in str(change)
    moving = {(name, dim) for name, shape in field_map.shapes.items() for dim in range(len(shape))}
    assert ungrouped_change(field_map, less, fewer, moving) is None


def test_outputs_that_depend_on_no_parameter_are_left_out_of_the_proof() -> None:
    config = hf.TimeSeriesTransformerConfig(
        prediction_length=4,
        context_length=12,
        lags_sequence=[1, 2],
        num_time_features=1,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
    )
    widths = {
        width.name: width.reason
        for width in prunable(hf.TimeSeriesTransformerModel(config).eval()).widths
    }
    assert widths["encoder_ffn_dim"] is None
    assert widths["decoder_ffn_dim"] is None


def test_vectors_that_no_output_depends_on_go_along_with_the_residual_stream() -> None:
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = hf.Dinov2ForImageClassification(config).eval()
    token = "dinov2.embeddings.mask_token"
    (width,) = (width for width in prunable(model).widths if width.name == "hidden_size")
    assert width.reason is None
    assert width.unobserved_parameters == (token,)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hook = HFConfigSyncHook(prune=("hidden_size",))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        hooks=[hook],
    )
    with torch.no_grad():  # every channel told apart
        for name in (token, "dinov2.layernorm.bias"):
            model.get_parameter(name).copy_(torch.arange(32.0).view_as(before[name]))
    pruner.step()
    assert hook.last_report is not None
    assert f"cut in the same way, though no output depends on it: {token}" in hook.last_report.graph
    kept = model.get_parameter("dinov2.layernorm.bias")
    assert len(kept) == 24
    assert torch.equal(model.get_parameter(token).flatten(), kept)


def test_a_tiny_image_leaves_attention_more_than_one_token() -> None:
    """Over one token, dimensions of different heads could change places."""
    config = hf.HieraConfig(
        embed_dim=24, image_size=[64, 64], depths=[1, 1, 1, 2], num_heads=[1, 2, 4, 6]
    )
    widths = prunable(hf.HieraForImageClassification(config).eval()).widths
    (width,) = (width for width in widths if width.name == "embed_dim")
    inner = "hiera.encoder.stages.3.layers.1.attn.qkv.bias"
    (group,) = (g for g in width.groups if any(dim.name == inner for dim in g.dims))
    assert width.reason is None
    assert (
        group.count.channel_groups == 6
    )  # four units of eight channels are one head of 32 dimensions


def test_channels_are_told_from_an_axis_as_long() -> None:
    """ConvNeXt's norms take channels first, and an image can be as wide as there are channels."""
    channels = CutDim(4, torch.tensor([0, 2]))
    first = torch.ones(2, 4, 3, 4)
    first[:, channels.removed] = 0
    assert _channel_axis(first, channels) == 1
    assert _channel_axis(first.movedim(1, -1), channels) == -1
    assert _channel_axis(torch.ones(2, 5, 4), channels) == -1
    assert _channel_axis(torch.ones(2, 4, 5), channels) == 1
    heads = torch.ones(2, 5, 4, 3)
    assert _channel_axis(heads, channels) == 2


def test_a_parameter_that_holds_nothing_goes_along() -> None:
    """Without register tokens DINOv3 has a tensor of none of them, as wide as the others."""
    config = hf.DINOv3ViTConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=0,
    )
    model = hf.DINOv3ViTModel(config).eval()
    widths = {width.name: width for width in prunable(model).widths}
    width = widths["num_attention_heads + hidden_size"]
    assert width.reason is None
    assert "embeddings.register_tokens" in width.unobserved_parameters


def test_a_width_reshapes_as_it_was_and_scales_as_it_is() -> None:
    hidden, heads = DualWidth(32, 16), DualWidth(4, 2)
    each = hidden // heads
    assert (each, each.new) == (8, 8)
    assert (hidden // 2, (hidden // 2).new) == (16, 8)
    assert (heads * each, (heads * each).new, (3 * heads).new) == (32, 16, 6)
    assert (hidden**0.5, math.sqrt(hidden)) == (4.0, 4.0)


def test_a_rehearsal_that_shows_nothing_proves_nothing() -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    )
    tiny = tiny_model(map_of(hf.LlamaForCausalLM(config)))
    assert isinstance(tiny, TinyModel)
    finding = next(one for one in find_groups(tiny) if one.fields == (("intermediate_size",),))
    assert finding.reason is None
    assert rehearse(tiny, finding) is None
    tiny.model.get_parameter("model.layers.0.mlp.down_proj.weight").data.mul_(1e-14)
    del vars(tiny)["outputs"]  # those of before
    nothing = (
        "a smaller intermediate_size changes no output of the tiny model, so the "
        "outputs do not show whether the right units were removed"
    )
    assert rehearse(tiny, finding) == Refusal(nothing)


def test_a_width_that_cannot_be_rehearsed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    )
    tiny = tiny_model(map_of(hf.LlamaForCausalLM(config)))
    assert isinstance(tiny, TinyModel)
    finding = next(one for one in find_groups(tiny) if one.fields == (("intermediate_size",),))
    monkeypatch.setattr(Builder, "build_unfilled", lambda *_: Refusal("no."))
    assert rehearse(tiny, finding) == Refusal(
        "the tiny model cannot be built with a smaller intermediate_size, so pruning it cannot be "
        "checked: no."
    )


def test_a_smaller_build_takes_what_is_not_cut_from_the_tiny_model() -> None:
    """A vision tower is neither drawn nor copied for each of a text model's widths."""
    config = hf.MarianConfig(  # its tables of positions are not saved, two names share its tokens
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    tiny = tiny_model(map_of(hf.MarianMTModel(config)))
    assert isinstance(tiny, TinyModel)
    built: list[torch.nn.Module] = []
    build = Builder.build_unfilled

    def noted(self: Builder, data: dict[str, Any]) -> torch.nn.Module | Refusal:
        smaller = build(self, data)
        assert isinstance(smaller, torch.nn.Module)
        built.append(smaller)
        return smaller

    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    findings = find_groups(tiny)
    assert any(
        ("computed from the config it holds other values") in str(finding.reason)
        for finding in findings
    )
    for finding in findings:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Builder, "build_unfilled", noted)
            if finding.reason is None:
                assert rehearse(tiny, finding) is None
    assert len(built) == 2  # encoder_ffn_dim, decoder_ffn_dim
    for smaller in built:
        own = dict(tiny.model.named_parameters(remove_duplicate=False))
        others = dict(smaller.named_parameters(remove_duplicate=False))
        assert others["model.shared.weight"] is others["model.decoder.embed_tokens.weight"]
        for name, parameter in others.items():
            shared = parameter.data_ptr() == own[name].data_ptr()
            assert shared is (parameter.shape == own[name].shape)
            assert parameter.isfinite().all()
    assert all(value.equal(before[name]) for name, value in tiny.model.state_dict().items())


def test_states_that_a_forward_pass_leaves_in_the_model_are_no_obstacle() -> None:
    found = supports(hf.RecurrentGemmaConfig(), model_class=hf.RecurrentGemmaForCausalLM)
    outcomes = {width.fields: width.outcome for width in found.widths}
    assert outcomes["hidden_size",] == outcomes["intermediate_size",] == "works"


def test_a_smaller_build_with_other_layers_shows_nothing() -> None:
    """Jamba's layers of a single expert are plain ones: to look for these was a ``KeyError``."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2}
    mamba = {"attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "expert_layer_period": 2}
    config = hf.JambaConfig(**sizes, **heads, **mamba, **experts, expert_layer_offset=1)
    reasons = {width.name: width.reason for width in widths_of(hf.JambaForCausalLM(config))}
    assert reasons["num_experts"] is not None
    assert " the class then builds model.layers.1.feed_forward." in reasons["num_experts"]
