"""Reports that people read after every call are at most eight lines; the rest is one call away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import layer_zoo
import pytest
import small
import torch
import torch_pruning as tp
from planned import SMOLLM2

from tp_hf_config import HFConfigSyncHook, SyncReport, calibrate, drop_layers, plan
from tp_hf_config.pipeline.job import HELD_OUT, SECOND_TEXT, Copied, Layerwise, Pruned
from tp_hf_config.pipeline.proofs import Proof
from tp_hf_config.reports import MOST_LINES, Report

ENTRIES = pytest.mark.skipif(
    not layer_zoo.ENTRIES, reason="no per_layer_config in this Transformers"
)
MORE = "more lines: text(full=True), or --json in the shell"
PRUNED = Pruned(
    "LayerwiseLlamaForCausalLM",
    Path("out"),
    None,
    (SyncReport(1, fields={"intermediate_size": (1536, 1228)}),),
    (134_515_008, 118_548_288),
    Proof(1, 8 * 49_152),
    Copied(("tokenizer.json", "tokenizer_config.json")),
    {HELD_OUT: (16.2, 17.8), SECOND_TEXT: (14.1, 15.2)},
    layers_differ=Layerwise(
        {"intermediate_size": (1000, 1200)}, "AutoModelForCausalLM", "modeling_layerwise.py"
    ),
)


def lines_of(report: Report) -> list[str]:
    """The lines that ``print`` shows; all are in the full text, in the same order."""
    lines = str(report).split("\n")
    full = report.text(full=True).split("\n")
    if lines[-1].endswith(MORE):
        assert lines[-1] == f"... {len(full) - len(lines) + 1} {MORE}"
        assert lines[:-1] == full[: len(lines) - 1]
    else:
        assert lines == full
    assert len(lines) <= MOST_LINES
    return lines


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"pruning_ratio": 0.2}, ["intermediate_size"]),
        ({"pruning_ratio": 0.5, "iterative_steps": 4}, ["intermediate_size"]),
        (
            {"pruning_ratio": 0.2, "gqa": "group", "head_pruning_ratio": 0.34},
            ["num_key_value_heads + num_attention_heads", "intermediate_size"],
        ),
    ],
    ids=["uniform", "in steps", "heads"],
)
def test_of_a_plan(settings: dict[str, Any], widths: list[str]) -> None:
    planned = plan(SMOLLM2, prune="inner", **settings)
    lines = lines_of(planned)
    assert [row[0] for row in planned.rows()[1:]] == widths
    assert lines[2 + len(widths)].startswith("parameters: 134,515,008 -> ")
    moved = planned.grid is not None  # four steps to a half of 1536 are multiples of 64 anyway
    assert moved == (len(settings) != 2)
    assert lines[3 + len(widths) + moved].startswith("bytes: 538,060,032 -> ")
    full = planned.text(full=True)
    assert "\nestimated time on two CPU cores: about 33 s to calibrate, " in full
    assert "\nbytes to calibrate: 322,928,640 -> " in full
    assert "\nkept: hidden_size: pruned only if it is named" in full
    assert max(map(len, lines)) <= 119


@ENTRIES
def test_layers_that_are_pruned_alike_share_a_row() -> None:
    model = small.llama(num_hidden_layers=6)
    alike = plan(model, per_layer=True, ratios={"intermediate_size": 0.5})
    assert len(lines_of(alike)) == MOST_LINES
    assert [row[:3] for row in alike.rows()[1:]] == [
        ("intermediate_size (of 6 layers)", "64", "32")
    ]
    ratios = {"intermediate_size": 0.5, "per_layer_config.0.intermediate_size": 0.25}
    planned = plan(model, per_layer=True, ratios=ratios)
    assert len(lines_of(planned)) == MOST_LINES
    assert [row[:3] for row in planned.rows()[1:]] == [
        ("per_layer_config.0.intermediate_size", "64", "48"),
        ("intermediate_size (of 5 layers)", "64", "32"),
    ]


@pytest.mark.filterwarnings("ignore::tp_hf_config.CalibrationWarning")
@pytest.mark.parametrize(
    "per_layer", [False, pytest.param(True, marks=ENTRIES)], ids=["uniform", "layers differ"]
)
def test_of_a_step_with_refits(per_layer: bool) -> None:
    model = small.llama(num_hidden_layers=4)
    before = model.num_parameters()
    generator = torch.Generator().manual_seed(0)
    high = model.config.vocab_size
    batches = [torch.randint(high, (1, 16), generator=generator) for _ in range(16)]
    calibration = calibrate(model, batches)
    hook = HFConfigSyncHook(prune="intermediate_size", per_layer=per_layer, refit=calibration)
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=None,
        importance=calibration.importance(),
        pruning_ratio=0.5,
        pruning_ratio_dict={model.model.layers[0]: 0.25} if per_layer else {},
        hooks=[hook],
    )
    pruner.step()
    assert hook.last_report is not None
    lines = lines_of(hook.last_report)
    after = model.num_parameters()
    assert lines[1] == f"  parameters: {before:,} -> {after:,} ({after / before:.1%})"
    assert lines[2].startswith("  4 of 4 weights refitted in ")
    assert lines[3].startswith("    KL ")
    report = replace(hook.last_report, notes=[f"note {number}" for number in range(9)])
    assert lines_of(report)[:5] == [*lines[:4], "  note: note 0"]
    assert len(report.to_dict()["notes"]) == 9


def test_of_dropped_layers() -> None:
    lines = lines_of(drop_layers(small.llama(num_hidden_layers=4), [1, 2]))
    assert lines[0] == "model.layers: 2 of 4 layers dropped (1, 2)"


@pytest.mark.parametrize("notes", [(), ("one",)], ids=len)
def test_of_a_pruned_folder(notes: tuple[str, ...]) -> None:
    result = replace(PRUNED, notes=notes)
    lines = lines_of(result)
    assert lines[1] == "parameters: 134,515,008 -> 118,548,288 (88.1%)"
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {n}" for n in notes]
    assert "layers differ: AutoModelForCausalLM.from_pretrained(" in "\n".join(lines)
    assert "copied: tokenizer.json" in result.text(full=True)
