"""Asks one tool about one folder, in a process of its own, and compares what it says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
Answer = dict[str, Any]


def ask(
    python: Path, module: Path, task: str, folder: Path, question: Path, seconds: int
) -> Answer:
    """What a tool answers about a folder: what its module's function returns, or an error."""
    with TemporaryDirectory() as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        command = [python, WORKER, module, task, folder, question, answer]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # so that what it starts ends with it
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        if answer.exists():
            return dict(json.loads(answer.read_text(encoding="utf-8")))
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        how = f"no end within {seconds} s" if code is None else f"the process died ({code})"
        return {"died": f"{how}: {said[-1]}" if said else how}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started and left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def compare(expected: Answer, given: Answer, within: tuple[float, float]) -> dict[str, Any]:
    """What an answer comes to beside that of transformers.

    ``outcome`` is "same", "near-tie" (another token where the two best are closer than what may
    differ), "differs", "refused" (the engine's words are in ``why``) or "died"; ``off`` the largest
    difference of a log-probability or of an embedding's component; ``after`` what an engine said
    first and what had to be set then.
    """
    found = _compared(expected, given, within)
    return {**found, "after": given["after"]} if "after" in given else found


def _compared(expected: Answer, given: Answer, within: tuple[float, float]) -> dict[str, Any]:
    for key, outcome in (("error", "refused"), ("died", "died")):
        if key in given:
            return {"outcome": outcome, "why": given[key]}
    if "embeddings" in expected:
        off = _largest(expected["embeddings"], given["embeddings"])
        return {"outcome": "same" if off <= within[1] else "differs", "off": off}
    pairs = list(zip(expected["tokens"], given["tokens"], strict=True))
    alike = [sum(1 for _ in takewhile(_equal, zip(*pair, strict=True))) for pair in pairs]
    scores = "log_probabilities"
    off = _largest(
        [row[:length] for row, length in zip(expected[scores], alike, strict=True)],
        [row[:length] for row, length in zip(given[scores], alike, strict=True)],
    )
    wrong = [
        {"prompt": i, "token": length, "gap": expected["gaps"][i][length]}
        for i, length in enumerate(alike)
        if length < len(expected["tokens"][i])
    ]
    if not wrong:
        return {"outcome": "same" if off <= within[0] else "differs", "off": off}
    tie = all(one["gap"] <= 2 * within[0] for one in wrong)
    return {"outcome": "near-tie" if tie else "differs", "off": off, "first": wrong}


def _equal(pair: Sequence[int]) -> bool:
    return pair[0] == pair[1]


def _largest(expected: list[list[float]], given: list[list[float]]) -> float:
    """The largest difference; lists of other lengths are an error, and so is what is no number."""
    differences = [
        abs(a - b)
        for one, other in zip(expected, given, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    if any(difference != difference for difference in differences):
        return float("inf")
    return max(differences, default=0.0)
