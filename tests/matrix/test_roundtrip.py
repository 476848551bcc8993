"""Every model, pruned in every way, against values written out here; saved, and reloaded elsewhere.

Three things are asked of each case: the config says what it should and nothing else, the right
units went (see ``masked_original``), and a fresh process that knows nothing of this library gets
the same model from the saved folder.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import small
import tiny
import torch
import torch_pruning as tp
from cases import some_in_make_test
from masked_original import assert_same_as_masked
from reloading import assert_reloaded

from tp_hf_config import HFConfigSyncHook

FFN = dict.fromkeys(tiny.NAMES, "intermediate_size") | {"opt": "ffn_dim", "t5": "d_ff"}
HIDDEN = dict.fromkeys(tiny.NAMES, "hidden_size") | {"t5": "d_model"}
LLAMAS = ("llama", "llama-gqa", "llama-tied")
BERTS = ("bert", "bert-cls", "roberta", "roberta-cls", "vit")

# A quarter of 64 and of 128 goes, in one step or in three. The classes that take multiples of their
# heads only (Llama), or whose heads shrink with the hidden size (BERT, ViT, OPT), go down to four.
HIDDEN_AT_ONCE = (48,)
HIDDEN_IN_THREE = dict.fromkeys(tiny.NAMES, (58, 53, 48)) | dict.fromkeys(
    (*LLAMAS, *BERTS, "opt"), (56, 52, 48)
)
FFN_AT_ONCE = (96,)
FFN_IN_THREE = (117, 106, 96)
# What has to be written beside the hidden size, so that the class does not derive it from that.
HEAD_DIM_UNSET = ("qwen2", "phi3", "vit" if small.TRANSFORMERS >= (5,) else "mistral")

TIES = {
    "llama-tied": [["lm_head.weight", "model.embed_tokens.weight"]],
    "gemma": [["lm_head.weight", "model.embed_tokens.weight"]],
    "opt": [["lm_head.weight", "model.decoder.embed_tokens.weight"]],
    "roberta": [
        ["lm_head.bias", "lm_head.decoder.bias"],
        ["lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"],
    ],
    "t5": [
        [
            "decoder.embed_tokens.weight",
            "encoder.embed_tokens.weight",
            "lm_head.weight",
            "shared.weight",
        ]
    ],
}
GENERATING = (
    *LLAMAS,
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "phi3",
    "opt",
    "t5",
)


@dataclass(frozen=True)
class Case:
    """One model, pruned in one way."""

    model: str
    mode: str
    steps: int
    interactive: bool

    def __str__(self) -> str:
        how = "interactive" if self.interactive else "plain"
        return f"{self.model}-{self.mode}-{self.steps}-{how}"


@dataclass
class Run:
    """A pruned model, and what it was before."""

    original: Any
    model: Any
    hook: HFConfigSyncHook
    before: dict[str, dict[str, Any]]
    configs: dict[str, Any]
    steps: list[dict[str, Any]]
    """After each step: the fields that differ from before, with their values."""


def fields(case: Case, model: Any) -> tuple[str, ...]:
    """What a case prunes."""
    if case.mode == "ffn":
        return (FFN[case.model],)
    if case.mode == "hidden":
        return (HIDDEN[case.model],)
    return small.inside(model)


@functools.cache
def run_of(case: Case) -> Run:
    """Prune a case's model; once, for all tests that ask about it."""
    model = tiny.build(case.model)
    original = copy.deepcopy(model)
    configs = {name: m.config for name, m in model.named_modules() if "config" in vars(m)}
    before = {name: config.to_diff_dict() for name, config in configs.items()}
    hook = HFConfigSyncHook(prune=fields(case, model))
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.25,
        iterative_steps=case.steps,
        hooks=[hook],
    )
    steps: list[dict[str, Any]] = []
    for _ in range(case.steps):
        if case.interactive:
            for group in pruner.step(interactive=True):
                group.prune()
        else:
            pruner.step()
        steps.append(changes(before[""], model.config.to_diff_dict()))
    return Run(original, model, hook, before, configs, steps)


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The fields of two ``to_diff_dict()`` that differ, with their new values."""
    keys = before.keys() | after.keys()
    return {key: after.get(key) for key in keys if before.get(key) != after.get(key)}


def widths(case: Case) -> list[dict[str, int]]:
    """The fields that hidden and FFN pruning change, after each step."""
    hidden = HIDDEN_AT_ONCE if case.steps == 1 else HIDDEN_IN_THREE[case.model]
    ffn = FFN_AT_ONCE if case.steps == 1 else FFN_IN_THREE
    expected: list[dict[str, int]] = []
    for step in range(case.steps):
        fields = {}
        if case.mode != "hidden":
            fields[FFN[case.model]] = ffn[step]
        if case.mode != "ffn":
            fields[HIDDEN[case.model]] = hidden[step]
            if case.model in HEAD_DIM_UNSET:
                fields["head_dim"] = 16
            if case.model == "opt":
                fields["word_embed_proj_dim"] = hidden[step]
        expected.append(fields)
    return expected


OF_EVERY_KIND = ("llama", "llama-gqa", "phi3", "gemma", "bert", "vit", "t5")
FEW = ("llama-tied", "roberta-cls", "t5")
ALL_CASES = some_in_make_test(
    (
        Case(model, mode, steps, interactive)
        for model in tiny.NAMES
        for mode in ("ffn", "hidden", "default")
        for steps, interactive in ((1, False), (3, False), (3, True))
    ),
    lambda case: (
        case.interactive and case.model in OF_EVERY_KIND
        if case.mode == "default"
        else case.steps == 1 and case.mode == "hidden" and case.model in FEW
    ),
)


@pytest.mark.parametrize("case", ALL_CASES)
def test_config_units_and_reload(case: Case, collector: Any) -> None:
    run = run_of(case)
    expected = widths(case)
    assert run.steps == expected
    for name, config in run.configs.items():
        assert run.model.get_submodule(name).config is config, f"{name} has another config object"
        # an encoder's own config object, a copy of the model's, says the same
        assert changes(run.before[name], config.to_diff_dict()) == expected[-1], name
    for report in run.hook.reports:
        assert report.error is None
        assert report.proof
        assert report.notes == []
    assert len(run.hook.reports) == len(expected)
    assert_same_as_masked(run.original, run.model, tiny.inputs(run.original))
    result = collector.reloaded(run.model, tiny.inputs(run.model))
    assert_reloaded(result)
    assert result["new_tokens"] == (4 if case.model in GENERATING else 0)
    ties = TIES.get(case.model, [])
    assert result["ties"] == ties
    for names in ties:
        assert len(set(names) & set(result["stored"])) == 1, f"{names} stored more than once"


@pytest.mark.parametrize(
    "name", some_in_make_test(tiny.NAMES, lambda name: name in ("llama", "bert"))
)
def test_interactive_and_plain_steps_leave_the_same_weights(name: str) -> None:
    plain, interactive = (run_of(Case(name, "default", 3, how)).model for how in (False, True))
    other = interactive.state_dict()
    assert plain.state_dict().keys() == other.keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, other[key]), key
