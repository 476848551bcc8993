"""The examples that need no real weights run as they stand."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import progress
import prune_smollm2
import pytest
import small
import torch
import zoo
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM


@pytest.mark.full
def test_two_processes_agree_and_one_saves(tmp_path: Path):
    done = subprocess.run(
        [
            sys.executable,
            *("-W", "ignore"),
            str(small.ROOT / "examples" / "accelerate_two_processes.py"),
            *("--out", str(tmp_path / "pruned")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(small.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    sync = "sync {}: 3 groups pruned (config graph); hidden_size {}, intermediate_size {}"
    assert told == [
        sync.format(1, "64 -> 56", "128 -> 112"),
        sync.format(2, "56 -> 48", "112 -> 96"),
        "2 processes agree: hidden size 48, FFN 96; the checkpoint has the outputs of the trained "
        f"model: {tmp_path / 'pruned'}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config
    assert (config.hidden_size, config.intermediate_size) == (48, 96)


class TestProgress:
    def lines(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
        """What a loop of four rounds, each so long, says where there is no terminal."""
        now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: now)
        console = Console(file=(printed := io.StringIO()), force_terminal=False)
        for _ in progress.track("abcd", "step 1/3 [recover]", console):
            now += seconds
        return printed.getvalue().splitlines()

    def test_a_long_loop_says_so_all_along(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.lines(monkeypatch, 5.0) == [
            "step 1/3 [recover]: 2 of 4, 10 s",
            "step 1/3 [recover]: 4 of 4, 20 s",
        ]
        assert len(self.lines(monkeypatch, 60.0)) == 4

    def test_a_short_one_says_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.lines(monkeypatch, 0.5) == ["step 1/3 [recover]: 4 of 4, 2 s"]

    def test_a_terminal_gets_a_bar(self) -> None:
        console = Console(file=(printed := io.StringIO()), force_terminal=True, width=80)
        assert list(progress.track([1, 2], "recover", console)) == [1, 2]
        assert "\x1b[" in printed.getvalue()
        assert "100%" in printed.getvalue()


def test_recovery_by_lora_leaves_a_plain_model() -> None:
    model = zoo.build("llama")
    teacher, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    ids = torch.arange(3, 19)[None]
    prune_smollm2.recover(model, teacher, [ids, ids], 1e-2, "recover", lora=2)
    after = model.state_dict()
    assert {name: each.shape for name, each in after.items()} == {
        name: each.shape for name, each in before.items()
    }
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert changed == linear  # embeddings and norms stay
