"""The examples that need no real weights run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import small
from transformers import AutoModelForCausalLM


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
