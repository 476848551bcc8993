"""The graph made from the config: thirty classes, every width that the library offers or refuses.

Each width that is offered is pruned alone.  Asked of each: the config says the expected number, the
pruned model computes what the original does with the removed units at zero, and a fresh process
loads it with the same outputs.  Each width that is refused is refused for the reason written here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import masking
import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from reloading import assert_reloaded, save_first
from torch import nn

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    prunable,
    pruner_kwargs,
)
from tp_hf_config.masked import kept_along
from tp_hf_config.reference import Refusal


class Case(NamedTuple):
    """Half of a width pruned alone, in so many steps."""

    model: str
    field: str
    steps: int

    def __str__(self) -> str:
        return f"{self.model}-{self.field}-{self.steps}"


# Model -> width -> the fields that have changed after each step when half of it goes in one step
# ("1") and in three ("3"), or a part of the reason for which it is refused.
def _rows(name: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name(name).read_text())
    return rows


TABLE = _rows("config_graph_widths.json")
# What Transformers 4 has otherwise; null: it has no such width. Its configs check no widths, so
# every hidden size goes; its routed experts (but GPT-OSS's) are layers of their own, so their
# number is no width; ViT has no head_dim; Swin writes its hidden_size down; DeepSeek-V3 writes
# qk_head_dim down, which then no longer follows qk_nope_head_dim.
if small.TRANSFORMERS < (5,):
    for _model, _changes in _rows("config_graph_widths_4.json").items():
        TABLE[_model] = {
            width: what for width, what in (TABLE[_model] | _changes).items() if what is not None
        }
OFFERED = {
    name: [w for w, what in rows.items() if isinstance(what, dict)] for name, rows in TABLE.items()
}
REFUSED = {
    name: {width: what for width, what in rows.items() if isinstance(what, str)}
    for name, rows in TABLE.items()
}
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
    found = kept_along(before, after)
    assert not isinstance(found, Refusal), found.reason
    return [side.left for side in found]


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
                masking.over_kept_channels(module, channels)
            continue
        for key, dims in left.items():
            parameter = module._parameters[key]
            for dim, channels in enumerate(dims):
                gone = torch.ones(parameter.shape[dim], dtype=torch.bool)
                gone[channels] = False
                with torch.no_grad():
                    parameter.index_fill_(dim, gone.nonzero().view(-1), 0.0)
    return model


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


@contextlib.contextmanager
def closed(model: nn.Module, pruned: nn.Module) -> Iterator[None]:
    """While routers of ``model`` never choose the experts that ``pruned`` has not."""
    gone: list[torch.Tensor] = []
    plain = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        out = plain(x, weight, *rest)
        return out.index_fill(-1, gone[-1], -1e9) if gone else out

    handles = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and "weight" in module._parameters:
            rows = module.weight.abs().sum(1) == 0
            if len(pruned.get_submodule(name).weight) < len(rows):
                where = rows.nonzero().flatten()
                bias = module._buffers.get("e_score_correction_bias")
                if bias is not None:
                    bias[where] = -1e9
                handles += [
                    module.register_forward_pre_hook(lambda *_, where=where: gone.append(where)),
                    module.register_forward_hook(lambda *_: gone.__delitem__(-1)),
                ]
    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = plain
        for handle in handles:
            handle.remove()


def eager(model: Any) -> Any:
    """In float64, experts computed one by one: fused kernels know float32 only."""
    model = model.double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def assert_same_as_masked(original: Any, pruned: Any, inputs: dict[str, torch.Tensor]) -> None:
    reference = masked(original, pruned)
    take_scales(reference, pruned)
    masking.take_head_dims(reference, pruned)
    if small.TRANSFORMERS < (5,) and original.config.model_type == "gemma2":
        # it scales embeddings by the config's hidden size as it runs
        factor = (pruned.config.hidden_size / original.config.hidden_size) ** 0.5
        reference.model.embed_tokens.register_forward_hook(lambda *given: given[-1] * factor)
    with closed(reference, pruned):
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
        **pruner_kwargs(model, prune=case.field.split(" + "), graph="config"),
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
    for name, fields in OFFERED.items()
    for field in fields
    for case in (Case(name, field, 1), Case(name, field, 3))
]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_width_is_offered_or_refused_for_a_known_reason(name: str) -> None:
    found = {width: reason for width, reason in table_of(name).items() if width not in ENDS}
    offered = {width for width, reason in found.items() if reason is None}
    assert offered == set(OFFERED[name])
    refused = {width: reason for width, reason in found.items() if reason is not None}
    assert refused.keys() == REFUSED[name].keys()
    for width, fragment in REFUSED[name].items():
        assert fragment in refused[width]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_width_raises_before_pruning(name: str) -> None:
    model = zoo.build(name)
    offered = [width for width, reason in table_of(name).items() if reason is None]
    for field, fragment in REFUSED[name].items():
        names = field.split(" + ")
        if not any(one in width.split(" + ") for width in offered for one in names):
            with pytest.raises(UnsupportedModelError) as caught:
                pruner_kwargs(model, prune=names[:1], graph="config")
            assert fragment in str(caught.value)


def test_a_count_that_would_vanish_is_refused_by_the_sync_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tp_hf_config.limits.vanished_counts", lambda old, new: [])
    monkeypatch.setattr("tp_hf_config.course.stopping", lambda *_: None)
    monkeypatch.setattr("tp_hf_config.groups.rehearse", lambda *_: None)
    monkeypatch.setattr("tp_hf_config.offers._experiments", weakref.WeakKeyDictionary())
    monkeypatch.setattr("tp_hf_config.learn._known", OrderedDict())
    monkeypatch.setattr("tp_hf_config.study.Study.dragged", lambda *_: {})
    with pytest.raises(ConfigSyncError, match=r"makes model.layers.0.self_attn.num_key_value_gr"):
        run_of(Case("deepseek_v3", "num_attention_heads", 1))


@pytest.mark.parametrize("case", CASES)
def test_config_says_what_was_pruned(case: Case) -> None:
    run = run_of(case)
    assert run.steps == TABLE[case.model][case.field][str(case.steps)]
    sizes = dict(type(run.model)(copy.deepcopy(run.model.config)).named_parameters())
    for name, parameter in run.model.named_parameters():
        assert parameter.shape == sizes[name].shape, name


@pytest.mark.parametrize("case", CASES)
def test_the_pruned_model_is_the_masked_original(case: Case) -> None:
    run = run_of(case)
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, collector: Any) -> dict[str, Exception]:

    def save(case: Case) -> None:
        model = run_of(case).model
        if case.model in WITHOUT_HEAD:
            model = model.model
        collector.add(f"config graph {case}", model, zoo.inputs(model))

    return save_first(request.session, test_a_fresh_process_gets_the_same_model, save)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_gets_the_same_model(
    case: Case, saved: dict[str, Exception], collector: Any
) -> None:
    if str(case) in saved:
        raise saved[str(case)]
    result = collector.result(f"config graph {case}")
    assert_reloaded(result)


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


def test_a_part_that_the_model_was_built_without_is_no_group() -> None:
    """A tiny BERT has a pooler, whose units are a group of their own; this one has none."""
    config = zoo.build("bert").config
    torch.manual_seed(0)
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    widths = {width.name: width for width in prunable(model).widths}
    # one stream, and the heads of each layer
    assert len(widths["hidden_size"].groups) == 1 + 2 * config.num_hidden_layers
    heads = widths["num_attention_heads + hidden_size"]
    assert len(heads.groups) == 1 + config.num_hidden_layers
    pruner = tp.pruner.MetaPruner(
        model,
        **pruner_kwargs(model, prune_num_heads=True, prune=("intermediate_size",)),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.25,
        hooks=[hook := HFConfigSyncHook(graph="config")],
    )
    pruner.step()
    assert hook.last_report.fields == {
        "num_attention_heads": (4, 3),
        "hidden_size": (64, 48),
        "intermediate_size": (96, 48),
    }


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
