"""The page of sizes after quantisation: what it says was measured, and the code computes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import small
import torch
import transformers as hf
from planned import SMOLLM2, changed
from torch import nn

from tp_hf_config.planning.quantised import quantised_bytes

benchmark = small.module_of(small.ROOT / "benchmarks" / "quantised.py")
NUMBERS = json.loads(benchmark.NUMBERS.read_text(encoding="utf-8"))
ROWS: list[dict[str, Any]] = NUMBERS["rows"]


def shaped(row: dict[str, Any]) -> nn.Module:
    """A model of these widths on the meta device."""
    widths = {"hidden_size": row["hidden_size"], "intermediate_size": row["intermediate_size"][0]}
    with torch.device("meta"):
        if row["model"] == benchmark.SMOLLM2:
            return hf.LlamaForCausalLM(changed(SMOLLM2, head_dim=64, **widths))
        return hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                vocab_size=262144,
                num_hidden_layers=18,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
                **widths,
            )
        )


def test_every_model_was_measured_in_every_format() -> None:
    measured = [
        (row["model"], row["hidden_size"], tuple(row["intermediate_size"]), row["format"])
        for row in ROWS
    ]
    assert measured == [
        (case.model, case.hidden, case.ffn, name)
        for case in benchmark.CASES
        for name in ("gguf-f16", *benchmark.FORMATS)
    ]


def test_computed_sizes_are_those_of_files() -> None:
    shares = [benchmark.off(row) for row in ROWS]
    assert all(share is None or abs(share) < benchmark.MOST for share in shares), shares
    refused = [row for row, share in zip(ROWS, shares, strict=True) if share is None]
    assert refused
    assert all("no tensor type fallback" in row["file"] for row in refused)


@pytest.mark.parametrize(
    "case", [case for case in benchmark.CASES if len(case.ffn) == 1], ids=lambda case: case.folder
)
def test_the_code_still_computes_them(case: Any) -> None:
    rows = [
        row
        for row in ROWS
        if row["model"] == case.model
        and row["hidden_size"] == case.hidden
        and row["intermediate_size"] == list(case.ffn)
    ]
    model = shaped(rows[0])
    for row in rows:
        found = quantised_bytes(model, row["format"])
        told = row["without_tokenizer"]
        assert getattr(found, "reason", found) == (row["computed"] if told is None else told)


def test_the_page_has_these_numbers() -> None:
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(NUMBERS)
