"""Shared by all tests: two threads, and a collector that reloads saved models elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reload_child
import torch

THREADS = 2
torch.set_num_threads(THREADS)


class Collector:
    """Saves models, and has one fresh process reload all that wait when the first is asked for."""

    def __init__(self, root: Path):
        self._root = root
        self._folders: dict[str, Path] = {}
        self._results: dict[str, dict[str, Any]] = {}

    def add(self, name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Save a model, what goes in and what it computes now.

        Args:
            name: what to call it; to be given to :meth:`result`.
            model: a live model in eval mode.
            inputs: for its forward pass; ``input_ids`` is also what it generates from.
        """
        folder = self._root / f"{len(self._folders):03d}"
        model.save_pretrained(folder)
        case = {
            "class": type(model).__name__,
            "inputs": inputs,
            "outputs": reload_child.outputs_of(model, inputs),
            "tokens": reload_child.tokens_of(model, inputs),
        }
        torch.save(case, folder / reload_child.CASE)
        self._folders[name] = folder

    def result(self, name: str) -> dict[str, Any]:
        """What the fresh process found; see ``reload_child.reload`` for the keys."""
        if name not in self._results:
            self._run()
        return self._results[name]

    def _run(self) -> None:
        waiting = {n: f for n, f in self._folders.items() if n not in self._results}
        results = self._root / "results.json"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(
            [
                sys.executable,
                str(Path(reload_child.__file__)),
                str(torch.get_num_threads()),
                str(results),
                *map(str, waiting.values()),
            ],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(results.read_text())
        self._results |= {name: found[str(folder)] for name, folder in waiting.items()}


@pytest.fixture(scope="session")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Collector:
    """One collector for the whole run."""
    return Collector(tmp_path_factory.mktemp("saved"))
