"""The graph made from the config: thirty classes, every width that the library offers or refuses.

Each width that is offered is pruned alone.  Asked of each: the config says the expected number, the
pruned model computes what the original does with the removed units at zero, and a fresh process
loads it with the same outputs.  Each width that is refused is refused for the reason written here.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small
import torch
import torch_pruning as tp
import transformers as hf
import zoo
from cases import some_in_make_test
from masked_original import WITHOUT_HEAD, assert_same_as_masked
from memories import forget
from reloading import assert_reloaded

from tp_hf_config import (
    ConfigSyncError,
    HFConfigSyncHook,
    UnsupportedModelError,
    prunable,
)


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


TABLE = _rows("widths.json")
# What Transformers 4 has otherwise; null: it has no such width. Its configs check no widths, so
# every hidden size goes; its routed experts (but GPT-OSS's) are layers of their own, so their
# number is no width; ViT has no head_dim; Swin writes its hidden_size down; DeepSeek-V3 writes
# qk_head_dim down, which then no longer follows qk_nope_head_dim.
if small.TRANSFORMERS < (5,):
    for _model, _changes in _rows("widths_4.json").items():
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


class Run(NamedTuple):
    """A pruned model, what it was, and the fields that changed after each step."""

    original: Any
    model: Any
    steps: list[dict[str, Any]]


@functools.cache
def table_of(name: str) -> dict[str, str | None]:
    """Every width that the library lists for a model, and the reason where it is refused."""
    return {width.name: width.reason for width in prunable(zoo.build(name)).widths}


def pruner_of(
    model: Any, prune: Sequence[str], steps: int = 1
) -> tuple[tp.pruner.MetaPruner, HFConfigSyncHook]:
    """A pruner of half of these widths, and its hook."""
    hook = HFConfigSyncHook(prune=prune)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=steps,
        hooks=[hook],
    )
    return pruner, hook


@functools.cache
def run_of(case: Case) -> Run:
    """Prune a case's model; once, for all tests that ask about it."""
    model = zoo.build(case.model)
    original = copy.deepcopy(model)
    pruner, hook = pruner_of(model, case.field.split(" + "), case.steps)
    for _ in range(case.steps):
        pruner.step()
    assert all(report.proof and report.error is None for report in hook.reports)
    steps = [{key: new for key, (_, new) in report.fields.items()} for report in hook.reports]
    return Run(original, model, steps)


THREE_STEPS = ("llama", "bert", "gpt_oss", "t5")
CASES = some_in_make_test(
    (
        Case(name, field, steps)
        for name, fields in OFFERED.items()
        for field in fields
        for steps in (1, 3)
    ),
    lambda case: case.steps == 1 or case.model in THREE_STEPS,
)


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
                pruner_of(model, prune=names[:1])
            assert fragment in str(caught.value)


def test_a_count_that_would_vanish_is_refused_by_the_sync_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tp_hf_config.fieldmap.field_map.vanished_counts", lambda old, new: [])
    monkeypatch.setattr("tp_hf_config.planning.trajectory.run_failure", lambda *_: None)
    monkeypatch.setattr("tp_hf_config.twin.find_groups.rehearse", lambda *_: None)
    monkeypatch.setenv("TP_HF_CONFIG_CACHE", "off")
    forget(monkeypatch)
    monkeypatch.setattr("tp_hf_config.fieldmap.learn_field_map.non_size_followers", lambda *_: {})
    with pytest.raises(
        ConfigSyncError, match=r"widths has model.layers.0.self_attn.num_key_value_groups 0"
    ):
        run_of(Case("deepseek_v3", "num_attention_heads", 1))


@pytest.mark.parametrize("case", CASES)
def test_a_width_pruned_alone(case: Case, collector: Any) -> None:
    """The config says so, the model is the masked original, and a fresh process loads the same."""
    run = run_of(case)
    assert run.steps == TABLE[case.model][case.field][str(case.steps)]
    sizes = dict(type(run.model)(copy.deepcopy(run.model.config)).named_parameters())
    for name, parameter in run.model.named_parameters():
        assert parameter.shape == sizes[name].shape, name
    assert_same_as_masked(run.original, run.model, zoo.inputs(run.original))
    saved = run.model.model if case.model in WITHOUT_HEAD else run.model
    assert_reloaded(collector.reloaded(saved, zoo.inputs(saved)))


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
    pruner, _ = pruner_of(model, fields, steps=2)
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
        example_inputs=None,
        prune_num_heads=True,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.25,
        hooks=[hook := HFConfigSyncHook(prune=("intermediate_size",))],
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
    with pytest.raises(AssertionError, match="values that the original has not there"):
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
        pruner_of(zoo.build(name), prune=fields)
