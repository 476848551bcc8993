"""What is measured: jobs, how large they are, and the rows that they leave in ``.quality/``."""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tp_hf_config.reports import versions

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".quality"
_MATTERS = ("calibration", "graph", "hook", "planning")
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is measured; the defaults are what the page reports.

    Attributes:
        calibration: windows to measure a model on; those that are held out come on top.
        evaluation: windows of each text for perplexities.
        gradients: windows behind gradients, for Torch-Pruning's importances.
        tokens: how long the calibration texts are that are compared.
        paragraphs: what the embedder is measured on.
        sentences: of each text, for rank correlations.
        rounds: how often everything is timed, in turn.
        seed: of what is drawn.
    """

    calibration: int = 48
    evaluation: int = 8
    gradients: int = 12
    tokens: tuple[int, ...] = (3_072, 12_288)
    paragraphs: int = 800
    sentences: int = 256
    rounds: int = 3
    seed: int = 0

    @classmethod
    def of(cls, windows: int | None, seed: int) -> Scale:
        """The scale with so many windows of everything, to see that it works."""
        if windows is None:
            return cls(seed=seed)
        tokens = (256 * windows, 512 * windows)
        return cls(windows, windows, windows, tokens, 8 * windows, 8 * windows, 1, seed)


@dataclass(frozen=True)
class Job:
    """Something to measure.

    Attributes:
        part: the part of the benchmark.
        subject: what is varied first: a cut, a text.
        variant: what is varied next: an importance, a number of tokens.
        measure: measures it.
    """

    part: str
    subject: str
    variant: str
    measure: Callable[[], Row]

    @property
    def name(self) -> str:
        """What it is called on the command line's output, and its row's file."""
        return "-".join(filter(None, (self.part, self.subject, self.variant)))


class Rows:
    """The rows that were measured at a scale with these versions."""

    def __init__(self, scale: Scale):
        size = "" if scale == Scale(seed=scale.seed) else f"-{scale.calibration}-windows"
        self.folder = CACHE / f"{scale.seed}{size}-{'-'.join(versions().values())}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def place(self, job: Job) -> Path:
        """Where a job's row lies once it is measured."""
        return self.folder / f"{job.name}.json"

    def finished(self, job: Job) -> bool:
        """Whether there is a row; one that says why it could not be measured is none."""
        place = self.place(job)
        return place.exists() and "why" not in json.loads(place.read_text())

    def run(self, jobs: list[Job]) -> None:
        """Measure those jobs that are not finished, one after the other."""
        waiting = [job for job in jobs if not self.finished(job)]
        for number, job in enumerate(waiting, start=1):
            started = time.perf_counter()
            row: Row = {"part": job.part, "subject": job.subject, "variant": job.variant}
            try:
                row |= job.measure()
            except Exception as error:  # a peer's too: the others are measured nevertheless
                traceback.print_exc()
                row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row |= {
                "row_seconds": round(time.perf_counter() - started, 1),
                "date": datetime.date.today().isoformat(),
                "threads": torch.get_num_threads(),
                "source": source(),
            }
            self.place(job).write_text(json.dumps(row))
            end = row.get("why", "")
            print(
                f"{number} of {len(waiting)}: {job.name}, {row['row_seconds']} s {end}", flush=True
            )

    def all(self, jobs: list[Job]) -> list[Row]:
        """All rows that there are, in the order of the jobs."""
        places = (self.place(job) for job in jobs)
        return [json.loads(place.read_text()) for place in places if place.exists()]


def source() -> str:
    """What tells one state of the code behind the figures from another; versions alone do not."""
    digest = hashlib.sha256()
    package = ROOT / "tp_hf_config"
    for path in sorted(path for part in _MATTERS for path in (package / part).rglob("*.py")):
        digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:12]
