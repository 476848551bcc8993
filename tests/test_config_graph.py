"""The graph made from the config: thirty classes, every width that the library offers or refuses.

Each width that is offered is pruned alone.  Asked of each: the config says the expected number, the
pruned model computes what the original does with the removed units at zero, and a fresh process
loads it with the same outputs.  Each width that is refused is refused for the reason written here.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any, NamedTuple

import masking
import pytest
import torch
import torch_pruning as tp
import zoo
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    prunable,
    pruner_kwargs,
)


class Case(NamedTuple):
    """Half of a width pruned alone, in so many steps."""

    model: str
    field: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}-{self.field}-{self.steps}"


# TABLES
# Model -> width -> the fields that have changed when half of it is gone at once.
HALF: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "qwen2": {
        "hidden_size": {"head_dim": 16, "hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"head_dim": 16, "num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "qwen3": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "gemma2": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "gemma3": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "phi3": {
        "hidden_size": {"head_dim": 16, "hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"head_dim": 16, "num_attention_heads": 2},
    },
    "gpt2": {"n_embd": {"n_embd": 32}, "n_inner": {"n_inner": 48}},
    "gpt_neox": {"intermediate_size": {"intermediate_size": 48}},
    "bloom": {"hidden_size": {"hidden_size": 32}},
    "falcon": {"ffn_hidden_size": {"ffn_hidden_size": 48}},
    "opt": {
        "ffn_dim": {"ffn_dim": 48},
        "hidden_size": {"hidden_size": 32},
        "word_embed_proj_dim": {"word_embed_proj_dim": 24},
    },
    "mixtral": {
        "hidden_size": {"head_dim": 16, "hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"head_dim": 16, "num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "qwen3_moe": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "moe_intermediate_size": {"moe_intermediate_size": 20},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "gpt_oss": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"num_attention_heads": 2},
        "num_key_value_heads + num_attention_heads": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    },
    "deepseek_v3": {
        "hidden_size": {"hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "kv_lora_rank": {"kv_lora_rank": 10},
        "moe_intermediate_size": {"moe_intermediate_size": 20},
        "q_lora_rank": {"q_lora_rank": 12},
    },
    "bert": {"hidden_size": {"hidden_size": 32}, "intermediate_size": {"intermediate_size": 48}},
    "distilbert": {"dim": {"dim": 32}, "hidden_dim": {"hidden_dim": 48}},
    "deberta_v2": {"intermediate_size": {"intermediate_size": 48}},
    "modernbert": {"intermediate_size": {"intermediate_size": 48}},
    "t5": {
        "d_ff": {"d_ff": 48},
        "d_kv": {"d_kv": 6},
        "d_model": {"d_model": 32},
        "num_heads": {"num_heads": 2},
    },
    "bart": {
        "d_model": {"d_model": 32},
        "decoder_ffn_dim": {"decoder_ffn_dim": 40},
        "encoder_ffn_dim": {"encoder_ffn_dim": 48},
    },
    "whisper": {
        "d_model": {"d_model": 32},
        "decoder_ffn_dim": {"decoder_ffn_dim": 40},
        "encoder_ffn_dim": {"encoder_ffn_dim": 48},
    },
    "vit": {
        "head_dim": {"head_dim": 8},
        "hidden_size": {"head_dim": 16, "hidden_size": 32},
        "intermediate_size": {"intermediate_size": 48},
        "num_attention_heads": {"head_dim": 16, "num_attention_heads": 2},
    },
    "swin": {"embed_dim": {"embed_dim": 8}},
    "convnext": {
        "hidden_sizes[0]": {"hidden_sizes": [8, 24]},
        "hidden_sizes[1]": {"hidden_sizes": [16, 12]},
    },
    "clip": {
        "projection_dim": {"projection_dim": 20},
        "text_config.hidden_size": {"text_config.hidden_size": 24},
        "text_config.intermediate_size": {"text_config.intermediate_size": 48},
        "vision_config.hidden_size": {"vision_config.hidden_size": 32},
        "vision_config.intermediate_size": {"vision_config.intermediate_size": 48},
    },
    "siglip": {
        "text_config.hidden_size": {"text_config.hidden_size": 32},
        "text_config.intermediate_size": {"text_config.intermediate_size": 48},
        "vision_config.intermediate_size": {"vision_config.intermediate_size": 48},
    },
    "wav2vec2": {
        "conv_dim[0]": {"conv_dim": [12, 32]},
        "conv_dim[1]": {"conv_dim": [24, 16]},
        "intermediate_size": {"intermediate_size": 48},
    },
}
# (Model, width) -> its value after each of three steps: a sixth, a third, half of it gone, rounded
# down to what the class takes.
THREE: dict[tuple[str, str], tuple[Any, ...]] = {
    ("llama", "hidden_size"): (52, 40, 32),
    ("llama", "intermediate_size"): (80, 64, 48),
    ("qwen2", "hidden_size"): (53, 42, 32),
    ("qwen2", "intermediate_size"): (80, 64, 48),
    ("qwen3", "hidden_size"): (53, 42, 32),
    ("qwen3", "intermediate_size"): (80, 64, 48),
    ("gemma2", "hidden_size"): (52, 40, 32),
    ("gemma2", "intermediate_size"): (80, 64, 48),
    ("gemma3", "hidden_size"): (52, 40, 32),
    ("gemma3", "intermediate_size"): (80, 64, 48),
    ("phi3", "hidden_size"): (53, 42, 32),
    ("phi3", "intermediate_size"): (80, 64, 48),
    ("gpt2", "n_embd"): (52, 40, 32),
    ("gpt2", "n_inner"): (80, 64, 48),
    ("gpt_neox", "intermediate_size"): (80, 64, 48),
    ("bloom", "hidden_size"): (52, 40, 32),
    ("falcon", "ffn_hidden_size"): (80, 64, 48),
    ("opt", "ffn_dim"): (80, 64, 48),
    ("opt", "hidden_size"): (52, 40, 32),
    ("mixtral", "hidden_size"): (52, 40, 32),
    ("mixtral", "intermediate_size"): (80, 64, 48),
    ("qwen3_moe", "hidden_size"): (52, 40, 32),
    ("qwen3_moe", "intermediate_size"): (80, 64, 48),
    ("gpt_oss", "hidden_size"): (52, 40, 32),
    ("gpt_oss", "intermediate_size"): (80, 64, 48),
    ("deepseek_v3", "hidden_size"): (52, 40, 32),
    ("deepseek_v3", "intermediate_size"): (80, 64, 48),
    ("bert", "hidden_size"): (52, 40, 32),
    ("bert", "intermediate_size"): (80, 64, 48),
    ("distilbert", "dim"): (52, 40, 32),
    ("distilbert", "hidden_dim"): (80, 64, 48),
    ("deberta_v2", "intermediate_size"): (80, 64, 48),
    ("modernbert", "intermediate_size"): (80, 64, 48),
    ("t5", "d_ff"): (80, 64, 48),
    ("t5", "d_model"): (53, 42, 32),
    ("bart", "d_model"): (52, 40, 32),
    ("bart", "encoder_ffn_dim"): (80, 64, 48),
    ("whisper", "d_model"): (52, 40, 32),
    ("whisper", "encoder_ffn_dim"): (80, 64, 48),
    ("vit", "hidden_size"): (52, 40, 32),
    ("vit", "intermediate_size"): (80, 64, 48),
    ("swin", "embed_dim"): (12, 10, 8),
    ("convnext", "hidden_sizes[0]"): ([13, 24], [10, 24], [8, 24]),
    ("clip", "projection_dim"): (33, 26, 20),
    ("clip", "text_config.hidden_size"): (40, 32, 24),
    ("siglip", "text_config.hidden_size"): (52, 40, 32),
    ("siglip", "text_config.intermediate_size"): (80, 64, 48),
    ("wav2vec2", "conv_dim[0]"): ([20, 32], [16, 32], [12, 32]),
}
# Model -> width -> a part of the reason for which it is refused.
_NOT = "units are not interchangeable in"
_RUN = "the tiny copy does not run"
REFUSED: dict[str, dict[str, str]] = {
    "llama": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
    },
    "qwen2": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
    },
    "qwen3": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
    },
    "gemma2": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
    },
    "gemma3": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
    },
    "phi3": {
        "head_dim": _NOT + " model.layers.*.self_attn.qkv_proj.weight",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.qkv_proj.weight",
    },
    "gpt_neox": {
        "hidden_size": _NOT + " gpt_neox.layers.*.attention.query_key_value.",
    },
    "falcon": {
        "hidden_size": _NOT + " transformer.h.*.self_attention.dense.weight",
    },
    "mixtral": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
        "num_local_experts": _NOT + " model.layers.*.mlp.",
    },
    "qwen3_moe": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
        "num_local_experts": _NOT + " model.layers.*.mlp.",
    },
    "gpt_oss": {
        "head_dim": _NOT + " model.layers.*.self_attn.",
        "num_key_value_heads": _NOT + " model.layers.*.self_attn.",
        "num_local_experts": _NOT + " model.layers.*.mlp.experts.",
    },
    "deepseek_v3": {
        "n_routed_experts": "no permutation of units is neutral in model.layers.*.mlp.experts.",
        "n_shared_experts": "n_shared_experts is 1 in the tiny copy",
        "num_attention_heads": "model.layers.0.self_attn.num_key_value_groups would be 0",
        "qk_nope_head_dim": "it sets no parameter that the outputs depend on",
        "qk_rope_head_dim": _NOT + " model.layers.*.self_attn.",
        "v_head_dim": _NOT + " model.layers.*.self_attn.",
    },
    "mamba2": {
        "conv_kernel": _NOT + " backbone.layers.*.mixer.conv1d.weight",
        "n_groups": _NOT + " backbone.layers.*.mixer.",
        "state_size": _NOT + " backbone.layers.*.mixer.",
    },
    "deberta_v2": {
        "attention_head_size": _NOT + " deberta.encoder.layer.*.attention.self.value_proj.",
        "hidden_size": _NOT,
        "num_attention_heads": _NOT + " deberta.encoder.layer.*.attention.self.value_proj.",
        "pooler_hidden_size": _NOT + " pooler.dense.",
    },
    "modernbert": {
        "hidden_size": _NOT + " model.layers.*.attn.Wqkv.weight",
    },
    "whisper": {
        "num_mel_bins": _NOT + " model.encoder.conv1.weight",
    },
    "vit": {
        "num_channels": _NOT + " vit.embeddings.patch_embeddings.projection.weight",
        "patch_size": _NOT + " vit.embeddings.patch_embeddings.projection.weight",
    },
    "swin": {
        "num_channels": _NOT + " swin.embeddings.patch_embeddings.projection.weight",
        "num_heads[0]": _NOT + " swin.encoder.layers.*.blocks.*.attention.relative_position_bias",
        "num_heads[1]": _NOT + " swin.encoder.layers.*.blocks.*.attention.relative_position_bias",
        "patch_size": _NOT + " swin.embeddings.patch_embeddings.projection.weight",
    },
    "convnext": {
        "num_channels": _NOT + " convnext.embeddings.patch_embeddings.weight",
        "patch_size": _NOT + " convnext.embeddings.patch_embeddings.weight",
    },
    "clip": {
        "vision_config.num_channels": _NOT + " vision_model.embeddings.patch_embedding.weight",
        "vision_config.patch_size": _NOT + " vision_model.embeddings.patch_embedding.weight",
    },
    "siglip": {
        "text_config.projection_size": _NOT + " text_model.head.",
        "vision_config.hidden_size": _NOT + " vision_model.head.",
        "vision_config.num_channels": _NOT + " vision_model.embeddings.patch_embedding.weight",
        "vision_config.patch_size": _NOT + " vision_model.embeddings.patch_embedding.weight",
    },
    "wav2vec2": {
        "conv_kernel[0]": _NOT + " wav2vec2.feature_extractor.conv_layers.*.conv.weight",
        "conv_kernel[1]": _NOT + " wav2vec2.feature_extractor.conv_layers.*.conv.weight",
        "hidden_size": _NOT + " wav2vec2.feature_projection.projection.",
        "num_conv_pos_embeddings": _NOT
        + " wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.",
    },
    "qwen2_vl": {
        "text_config.hidden_size": _RUN + ": 'NoneType' object has no attribute 'device'",
        "text_config.intermediate_size": _RUN + ": 'NoneType' object has no attribute 'device'",
        "text_config.vocab_size": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.embed_dim": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.hidden_size": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.in_channels": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.mlp_ratio": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.patch_size": _RUN + ": 'NoneType' object has no attribute 'device'",
        "vision_config.temporal_patch_size": _RUN + ": 'NoneType' object has no attribute 'device'",
    },
}
# END OF TABLES
# What goes in and comes out of a model keeps its width.
ENDS = ("num_labels", "vocab_size")
# The child generates from ``input_ids``, which this class has not: the model in it is saved.
WITHOUT_HEAD = ("whisper",)
# The masked original, by values.


def kept_channels(before: torch.Tensor, after: torch.Tensor) -> list[torch.Tensor]:
    """For each dimension of a parameter, the original positions that are left, found by value.

    The parameters are random, so that a value stands for its place; the library's own record is
    not looked at.
    """
    if before.shape == after.shape:
        assert torch.equal(before, after), "other values"
        return [torch.arange(size) for size in before.shape]
    values, order = before.flatten().sort()
    unique = torch.ones(len(values), dtype=torch.bool)
    unique[1:] &= values[1:] != values[:-1]
    unique[:-1] &= values[1:] != values[:-1]
    where = torch.searchsorted(values, after.flatten()).clamp(max=len(values) - 1)
    assert torch.equal(values[where], after.flatten()), "values that the original has not"
    places = torch.stack(torch.unravel_index(order[where], before.shape))
    sure = unique[where].view(after.shape)
    result = []
    for dim, size in enumerate(after.shape):
        rows = places[dim].view(after.shape).movedim(dim, 0).reshape(size, -1)
        known = sure.movedim(dim, 0).reshape(size, -1)
        result.append(torch.tensor([int(row[k][0]) for row, k in zip(rows, known, strict=True)]))
    expected = before
    for dim, left in enumerate(result):
        assert bool((left.diff() > 0).all()), "channels in another order"
        expected = expected.index_select(dim, left)
    assert torch.equal(expected, after), "channels of different origin"
    return result


def masked(original: nn.Module, pruned: nn.Module) -> nn.Module:
    """The original at full width with the removed units at zero, its norms over the kept ones."""
    model = copy.deepcopy(original)
    after = dict(pruned.named_parameters(remove_duplicate=False))
    names = dict(original.named_parameters(remove_duplicate=False))
    assert names.keys() == after.keys()
    for name, module in list(model.named_modules()):
        prefix = f"{name}." if name else ""
        left = {
            key: kept_channels(names[prefix + key].detach(), after[prefix + key].detach())
            for key, parameter in module._parameters.items()
            if parameter is not None
        }
        if masking.is_norm(module) and not isinstance(module, nn.GroupNorm):
            channels = left["weight"][0]
            if len(channels) < len(module.weight):
                _narrow(module, channels)
            continue
        for key, dims in left.items():
            parameter = module._parameters[key]
            for dim, channels in enumerate(dims):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[channels] = False
                with torch.no_grad():
                    parameter.index_fill_(dim, gone.nonzero().view(-1), 0.0)
    return model


def _narrow(norm: nn.Module, left: torch.Tensor) -> None:
    """Make a norm look at the kept channels only and give zeros elsewhere."""
    narrow = copy.deepcopy(norm)
    for key, parameter in narrow._parameters.items():
        if parameter is not None:
            narrow._parameters[key] = nn.Parameter(parameter.detach()[left])
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (len(left),)
    norm.narrow = narrow  # a submodule, so that .double() reaches it
    axis = 1 if getattr(norm, "data_format", "") == "channels_first" else -1

    def forward(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        cut = [one.index_select(axis, left) for one in (x, *others)]
        return torch.zeros_like(x).index_copy_(axis, left, narrow(*cut))

    norm.forward = forward


def take_scales(model: nn.Module, pruned: nn.Module) -> None:
    """Numbers that follow widths (attention scales), as the class computes them for the new ones.

    Read from a model freshly built from the pruned config, so that a number that the hook forgot
    to refresh shows as a difference.
    """
    fresh = dict(type(pruned)(copy.deepcopy(pruned.config)).named_modules())
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if name in fresh and (isinstance(value, float) or key == "model_dim"):
                setattr(module, key, getattr(fresh[name], key))
        if name in fresh and "embed_scale" in module._buffers:
            module.embed_scale = fresh[name].embed_scale.to(module.embed_scale.dtype)


def eager(model: Any) -> Any:
    """In float64, experts computed one by one: fused kernels know float32 only."""
    model = model.double()
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def assert_same_as_masked(original: Any, pruned: Any, inputs: dict[str, torch.Tensor]) -> None:
    reference = masked(original, pruned)
    take_scales(reference, pruned)
    expected = masking.outputs(eager(reference), inputs)
    got = masking.outputs(eager(copy.deepcopy(pruned)), inputs)
    assert expected.keys() == got.keys()
    for name, value in got.items():
        full = masking.without_zero_channels(expected[name], value.shape[-1])
        assert full.shape == value.shape, f"{name}: {full.shape} != {value.shape}"
        error = ((value - full).norm() / full.norm()).item()
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"  # norms compute in float32


class Run(NamedTuple):
    """A pruned model, what it was, and the fields that changed after each step."""

    original: Any
    model: Any
    steps: list[dict[str, Any]]


@functools.cache
def table_of(name: str) -> dict[str, str | None]:
    """Every width that the library lists for a model, and the reason where it is refused."""
    return {width.name: width.reason for width in prunable(zoo.build(name)).widths}


@functools.cache
def run_of(case: Case) -> Run:
    """Prune a case's model; once, for all tests that ask about it."""
    model = zoo.build(case.model)
    original = copy.deepcopy(model)
    hook = HFConfigSyncHook(graph="config")
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=(case.field.split(" + ")[0],), graph="config"),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=case.steps,
        hooks=[hook],
    )
    for _ in range(case.steps):
        pruner.step()
    assert all(report.proof and report.error is None for report in hook.reports)
    steps = [{key: new for key, (_, new) in report.fields.items()} for report in hook.reports]
    return Run(original, model, steps)


CASES = [
    pytest.param(case, id=str(case))
    for name, fields in HALF.items()
    for field in fields
    for case in (Case(name, field, 1), Case(name, field, 3))
    if case.steps == 1 or (name, field) in THREE
]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_width_is_offered_or_refused_for_a_known_reason(name: str) -> None:
    found = {width: reason for width, reason in table_of(name).items() if width not in ENDS}
    offered = {width for width, reason in found.items() if reason is None}
    assert offered == HALF.get(name, {}).keys()
    refused = {width: reason for width, reason in found.items() if reason is not None}
    assert refused.keys() == REFUSED.get(name, {}).keys()
    for width, fragment in REFUSED.get(name, {}).items():
        assert fragment in refused[width]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_width_raises_before_pruning(name: str) -> None:
    model = zoo.build(name)
    offered = [width for width, reason in table_of(name).items() if reason is None]
    for field, fragment in REFUSED[name].items():
        if not any(field in width.split(" + ") for width in offered):
            with pytest.raises(UnsupportedModelError) as caught:
                pruner_kwargs(model, prune=(field,), graph="config")
            assert fragment in str(caught.value)


def test_a_count_that_would_vanish_is_refused_by_the_sync_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tp_hf_config.offers.vanished_counts", lambda old, new: [])
    monkeypatch.setattr("tp_hf_config.offers._experiments", weakref.WeakKeyDictionary())
    with pytest.raises(ConfigSyncError, match=r"makes model.layers.0.self_attn.num_key_value_gr"):
        run_of(Case("deepseek_v3", "num_attention_heads", 1))


@pytest.mark.parametrize("case", CASES)
def test_config_says_what_was_pruned(case: Case) -> None:
    run = run_of(case)
    if case.steps == 1:
        assert run.steps == [HALF[case.model][case.field]]
    else:
        key = case.field.partition("[")[0]
        assert [step.get(key) for step in run.steps] == list(THREE[case.model, case.field])
    sizes = dict(type(run.model)(copy.deepcopy(run.model.config)).named_parameters())
    for name, parameter in run.model.named_parameters():
        assert parameter.shape == sizes[name].shape, name


@pytest.mark.parametrize("case", CASES)
def test_the_pruned_model_is_the_masked_original(case: Case) -> None:
    run = run_of(case)
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, collector: Any) -> dict[str, Exception]:
    """All models whose reload is going to be asked about are saved, before the first is.

    Returns:
        Why a case could not be saved; it fails in its own test, not in that of another.
    """
    failures: dict[str, Exception] = {}
    for item in request.session.items:
        if getattr(item, "function", None) is test_a_fresh_process_gets_the_same_model:
            case = item.callspec.params["case"]
            try:
                model = run_of(case).model
                if case.model in WITHOUT_HEAD:
                    model = model.model
                collector.add(f"config graph {case}", model, zoo.inputs(model))
            except Exception as error:
                failures[str(case)] = error
    return failures


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_gets_the_same_model(
    case: Case, saved: dict[str, Exception], collector: Any
) -> None:
    if str(case) in saved:
        raise saved[str(case)]
    result = collector.result(f"config graph {case}")
    assert "error" not in result, result["error"]
    assert result["loading"] == {}, "keys that are missing, left over or of another shape"
    assert result["outputs"]
    assert result["different"] == []
    assert result["same_tokens"]
    assert result["same_config"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", ("hidden_size", "intermediate_size", "num_key_value_heads")),
        ("gpt_oss", ("hidden_size", "intermediate_size", "num_key_value_heads")),
        ("deepseek_v3", ("hidden_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank")),
        ("bert", ("hidden_size", "intermediate_size")),
        ("whisper", ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")),
        ("convnext", ("hidden_sizes[0]", "hidden_sizes[1]")),
        ("clip", ("text_config.hidden_size", "vision_config.hidden_size", "projection_dim")),
    ],
)
def test_several_widths_at_once(name: str, fields: tuple[str, ...]) -> None:
    model = zoo.build(name)
    original = copy.deepcopy(model)
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune=fields, graph="config"),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        hooks=[HFConfigSyncHook(graph="config")],
    )
    pruner.step()
    pruner.step()
    assert_same_as_masked(original, model, zoo.inputs(original))


def test_the_masked_comparison_can_fail() -> None:
    """One value that is not the original's, or a forgotten scale, is seen."""
    run = run_of(Case("gemma2", "hidden_size", 1))
    inputs = zoo.inputs(run.original)
    wrong = copy.deepcopy(run.model)
    with torch.no_grad():
        wrong.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    with pytest.raises(AssertionError, match="values that the original has not"):
        assert_same_as_masked(run.original, wrong, inputs)
    wrong = copy.deepcopy(run.model)
    with torch.no_grad():
        weight = wrong.model.layers[0].mlp.up_proj.weight
        weight[:, [0, 1]] = weight[:, [1, 0]]
    with pytest.raises(AssertionError, match="another order"):
        assert_same_as_masked(run.original, wrong, inputs)
    wrong = copy.deepcopy(run.model)
    wrong.model.embed_tokens.embed_scale *= 2
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_as_masked(run.original, wrong, inputs)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("t5", ("d_kv", "num_heads")), ("vit", ("head_dim", "num_attention_heads"))],
)
def test_two_widths_of_one_dimension_are_refused(name: str, fields: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{fields[0]} and {fields[1]} both set"):
        pruner_kwargs(zoo.build(name), prune=fields, graph="config")
