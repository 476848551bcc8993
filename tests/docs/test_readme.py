"""The README's code runs as it stands, and gives what it shows."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path
from typing import Any

import doc_blocks
import model_folders
import pytest
import small
import torch
from planned import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from tp_hf_config import plan, prunable
from tp_hf_config.cli.commands import app
from tp_hf_config.cli.main import PROGRAM

README = (small.ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = [block for block in doc_blocks.blocks(README, "README.md") if block.language == "python"]
SHOWN = [block for block in PYTHON if block.code.startswith(">>> ")]
RUN = [block for block in PYTHON if block not in SHOWN]


def test_the_first_example_runs_in_a_fresh_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names a model of the Hub; a folder of that name beside it stands for it."""
    model_folders.save("llama-gqa", tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    doc_blocks.run_python(RUN[0], names)
    pruned = names["model"].eval()
    assert (pruned.config.hidden_size, pruned.config.intermediate_size) == (64, 112)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["HuggingFaceTB", "smaller"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "smaller")("w1 w2", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(ids.input_ids).logits, pruned(ids.input_ids).logits)


@pytest.mark.parametrize("block", RUN[1:], ids=lambda block: block.where)
def test_every_other_block_runs_alone(
    block: doc_blocks.Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folders.save("llama-gqa", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    printed = doc_blocks.run_python(block, {})
    assert ["intermediate_size", "works"] in [line.split() for line in printed.splitlines()]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.where)
def test_what_is_shown_of_smollm2_is_what_comes(block: doc_blocks.Block) -> None:
    names = {"model": SMOLLM2, "prunable": prunable}
    example = doctest.DocTestParser().get_doctest(block.code, names, block.where, "README.md", 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    assert runner.run(example, out=told.append).failed == 0, "".join(told)


def test_what_the_shell_says_of_smollm2_is_what_comes() -> None:
    (shown,) = (b.code for b in doc_blocks.blocks(README, "README.md") if b.language == "text")
    came = f"{plan(SMOLLM2, pruning_ratio=0.125)}\n"
    assert doctest.OutputChecker().check_output(shown, came, doctest.ELLIPSIS), came


def test_its_commands_are_commands() -> None:
    """What begins a line with the program's name is parsed; nothing of it is run."""
    typed = re.findall(rf"^{PROGRAM} (.*)$", README, re.MULTILINE)
    commands = ["plan", "prune", "verify"]
    for line, name in zip(typed, commands, strict=True):
        command, *arguments = shlex.split(line, comments=True)
        assert command == name
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_no_block_of_code_is_passed_over() -> None:
    assert len(RUN) == 2
    assert len(SHOWN) == 1
    assert README.count(">>> ") == sum(block.code.count(">>> ") for block in SHOWN)
