"""Measure every architecture of transformers: ``python benchmarks/support`` (``make support``).

Each (task, model type) pair is pruned at tiny size in a process of its own, its widths and then its
layers, and loaded again in another, all with limits of time and memory.  ``--columns layers`` (or
``widths``) measures one of them alone.  Writes ``docs/support.json`` and
``docs/support.md``.

A row says which state of the code it is of: of what a measurement runs, not the command line or
exports.  Rows of this state, in the table or in ``.support/`` where finished pairs lie, are not
measured again, so a run may be stopped at any time, or after ``--minutes``, and the next one goes
on.  Rows of other states stay in the table until then.

With ``--longer``, pairs that do not end in ``--seconds`` are measured once more, with so many
(those that did not end in the table either, at once).  Their rows tell what can be pruned; the
total of pairs that do not end counts them still.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from code_digest import code_digest
from measuring import LATE, PARTS, RESULT, attempts, learning, load_again, measure, read_result
from pairs import Pair, all_pairs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from table import a_field_of, did_not_end, is_late, ran, stored_rows, write

from tp_hf_config.reports import versions

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".support"
os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
os.environ["HF_MODULES_CACHE"] = str(CACHE / "modules")  # code of layers that differ
_WAITING = 10
PRELOADED = [
    "torch",
    "torch_pruning",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "tp_hf_config.pipeline.support",
]


@dataclass
class Running:
    """A pair that is being measured: first pruned, then loaded again."""

    pair: Pair
    parts: tuple[str, ...]
    folder: TemporaryDirectory[str]
    process: Any = None
    since: float = field(default_factory=time.monotonic)
    loading: bool = False

    @property
    def place(self) -> Path:
        """Where its result and pruned models lie."""
        return Path(self.folder.name)


class Runner:
    """Measures parts of pairs, their widths or their layers or both, so many pairs at a time."""

    def __init__(self, parts: Sequence[str], seed: int, jobs: int, seconds: int, memory: int):
        self.parts, self.seed, self.jobs = parts, seed, jobs
        self.seconds, self.memory = seconds, memory
        self.longer: int | None = None
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.code = code_digest(ROOT / "tp_hf_config", Path(__file__).parent.glob("*.py"))
        self.cache = CACHE / "-".join([str(seed), *versions().values(), self.code])
        self.cache.mkdir(parents=True, exist_ok=True)
        self.table = stored_rows(seed, ROOT)
        for name, row in self.table.items():
            path = self.cache / f"{name}.json"
            if row.get("code") == self.code and not path.exists():
                path.write_text(json.dumps(row))

    @property
    def limit(self) -> int:
        """The processor time of a process, in seconds."""
        return self.longer or self.seconds

    def done(self, pair: Pair) -> Path:
        """Where a pair's row lies when it is measured."""
        return self.cache / f"{pair.name}.json"

    def row(self, pair: Pair) -> dict[str, Any]:
        """What was measured of a pair; empty: nothing."""
        return dict(json.loads(self.done(pair).read_text())) if self.done(pair).exists() else {}

    def missing(self, pair: Pair) -> tuple[str, ...]:
        """The parts that are to be measured and were not; layers only of pairs that run."""
        row = self.row(pair)
        have = {"widths": bool(row), "layers": "layers" in row or (bool(row) and not ran(row))}
        return tuple(part for part in self.parts if not have[part])

    def forget(self, pair: Pair) -> None:
        """Remove what was measured; without a pair's widths, its layers are measured anew too."""
        row = self.row(pair)
        self.done(pair).unlink(missing_ok=True)
        if row and "widths" not in self.parts:
            self.done(pair).write_text(json.dumps({k: v for k, v in row.items() if k != "layers"}))

    def rows(self, pairs: list[Pair]) -> list[dict[str, Any]]:
        """What was measured of these pairs; of another state of the code where nothing was."""
        rows = (self.row(pair) or self.table.get(pair.name) for pair in pairs)
        return [row for row in rows if row]

    def run(self, pairs: list[Pair], minutes: float) -> None:
        """Measure those that are not done yet; begin none of them after so many minutes."""
        waiting = [(pair, missing) for pair in pairs if (missing := self.missing(pair))]
        random.Random(0).shuffle(waiting)  # so that the time left can be told
        if minutes < math.inf:  # the quickest first
            waiting.sort(key=lambda one: self.table.get(one[0].name, {}).get("seconds", math.inf))
        end = time.monotonic() + 60 * minutes
        running: list[Running] = []
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn()) as progress:
            task = progress.add_task("", total=len(pairs), completed=len(pairs) - len(waiting))
            while waiting or running:
                if time.monotonic() > end:
                    waiting.clear()
                while waiting and len(running) < self.jobs:
                    running.append(self._started(*waiting.pop(0)))
                for one in list(running):
                    if self._advance(one):
                        running.remove(one)
                        progress.advance(task)
                names = ", ".join(one.pair.type for one in running)
                progress.update(task, description=names[:40])
                time.sleep(0.05)

    def late(self, pairs: list[Pair], seconds: int) -> list[Pair]:
        """Those that did not end, and had less than so much time or ran with another state."""
        return [
            pair
            for pair in pairs
            if did_not_end(self.row(pair), seconds)
            or (not self.row(pair) and is_late(self.table.get(pair.name, {})))
        ]

    def run_longer(self, pairs: list[Pair], seconds: int, minutes: float) -> None:
        """Measure these anew, each with so many seconds."""
        self.longer = seconds
        for pair in pairs:
            self.forget(pair)
        self.run(pairs, minutes)

    def learn(self, pairs: list[Pair], minutes: float) -> None:
        """Measure how long learning and proving a field takes, for the rows without; so long."""
        waiting = [pair for pair in pairs if (row := self.row(pair)) and "field_seconds" not in row]
        random.Random(0).shuffle(waiting)  # so that some of them stand for all
        end = time.monotonic() + min(60 * minutes, threading.TIMEOUT_MAX / 2)
        with self.context.Pool(self.jobs, maxtasksperchild=1) as pool, Progress() as progress:
            task = progress.add_task("learning", total=len(waiting))
            answers = [
                pool.apply_async(learning, (pair, a_field_of(self.row(pair)))) for pair in waiting
            ]
            with suppress(multiprocessing.TimeoutError):
                for pair, answer in zip(waiting, answers, strict=True):
                    row = {**self.row(pair), **answer.get(max(0, end - time.monotonic()))}
                    self.done(pair).write_text(json.dumps(row))
                    progress.advance(task)

    def _started(self, pair: Pair, parts: tuple[str, ...]) -> Running:
        one = Running(pair, parts, TemporaryDirectory(prefix="support-"))
        row = self.row(pair) if "widths" not in parts else {}
        if row:
            (one.place / RESULT).write_text(json.dumps(row))
        self._start(one, parts)
        return one

    def _start(self, one: Running, parts: Sequence[str]) -> None:
        """Start a process that measures these parts."""
        arguments = (one.pair, parts, one.place, self.seed, self.limit, self.memory)
        one.process = self.context.Process(target=measure, args=arguments, daemon=True)
        one.process.start()

    def _advance(self, one: Running) -> bool:
        """Whether a pair is through; starts what comes next."""
        if one.process.is_alive():
            if time.monotonic() - one.since > _WAITING * self.limit:
                one.process.kill()  # it waits for something that uses no processor time
            return False
        if one.process.exitcode and not one.loading and self._goes_on_with_layers(one):
            return False
        result = read_result(one.place)
        if not one.loading and any(tried.get("folders") for tried in attempts(result)):
            arguments = (one.pair, one.place, len(PARTS) * self.limit, self.memory)
            one.process = self.context.Process(target=load_again, args=arguments, daemon=True)
            one.loading = True
            one.process.start()
            return False
        for tried in attempts(result):
            if tried.pop("folders", ()):
                tried.update(outcome="failed", why="loading again did not end")
        result["seconds"] = round(time.monotonic() - one.since, 1)
        named = {"task": one.pair.task, "type": one.pair.type, "class": one.pair.class_name}
        state = {"code": self.code, "limit": self.seconds}
        if self.longer is not None and result.get("processor_seconds", math.inf) > self.seconds:
            state["longer"] = self.longer
        self.done(one.pair).write_text(json.dumps({**named, **state, **result}))
        one.folder.cleanup()
        return True

    def _goes_on_with_layers(self, one: Running) -> bool:
        """Note why a process died; start another for layers if it died before them."""
        result = read_result(one.place) or {"stage": "class", "widths": []}
        killed = one.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        reason = f"no end within {self.limit} s" if killed else "the process died"
        layers = result.get("layers")
        if layers is None:
            result["why"] = f"{reason} ({result['stage']})"
        elif layers["why"] == LATE:
            layers["why"] = f"{reason} (layers)"
        (one.place / RESULT).write_text(json.dumps(result))
        goes_on = layers is None and "layers" in one.parts and ran(result)
        if goes_on:
            self._start(one, ("layers",))
        return goes_on


def main() -> None:
    """Measure all pairs, or some."""
    parser = argparse.ArgumentParser(prog="benchmarks/support", description=__doc__)
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seconds", type=int, default=120, help="processor time of one process")
    parser.add_argument("--longer", type=int, help="once more so many, where that was too little")
    parser.add_argument("--gib", type=float, default=13, help="memory limit of one process")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and the sample")
    parser.add_argument("--types", nargs="+", help="only these model types")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--sample", type=int, help="only so many types, drawn with the seed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="the next run goes on then")
    parser.add_argument("--columns", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument(
        "--learning", action="store_true", help="measure how long it takes to learn"
    )
    parser.add_argument("--written", action="store_true", help="measure nothing more, write")
    parser.add_argument("--again", action="store_true", help="measure what was measured before too")
    options = parser.parse_args()
    pairs = all_pairs()
    if options.sample is not None:
        types = sorted({pair.type for pair in pairs})
        options.types = random.Random(options.seed).sample(types, options.sample)
    if options.types is not None:
        pairs = [pair for pair in pairs if pair.type in options.types]
    if options.tasks is not None:
        pairs = [pair for pair in pairs if pair.task in options.tasks]
    limits = (options.jobs, options.seconds, int(options.gib * 2**30))
    runner = Runner([part for part in PARTS if part in options.columns], options.seed, *limits)
    if options.again:
        for pair in pairs:
            runner.forget(pair)
    if options.learning:
        runner.learn(pairs, options.minutes)
    elif not options.written:
        late = [] if options.longer is None else runner.late(pairs, options.longer)
        runner.run([pair for pair in pairs if pair not in late], options.minutes)
        if options.longer is not None:
            runner.run_longer(runner.late(pairs, options.longer), options.longer, options.minutes)
    whole = not options.types and not options.tasks
    write(runner.rows(pairs), len(pairs), options.seed, ROOT if whole else None)


if __name__ == "__main__":
    main()
