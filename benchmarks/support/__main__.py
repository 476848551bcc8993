"""Measure every architecture of transformers: ``python benchmarks/support`` (``make support``).

Each (task, model type) pair is pruned at tiny size in a process of its own and loaded again in
another, both with time and memory limits.  What can be done with its layers is measured after that,
in processes of its own, of the pairs that ran; ``--columns layers`` measures that alone.  Finished
pairs lie in ``.support/`` and are not measured again by the next run with the same versions and
seed.  Writes ``docs/support.json``, ``docs/support.md`` and the totals in the README.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measuring import RESULT, attempts, learning, load_again, measure
from pairs import Pair, all_pairs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from table import kept, ran, write

from tp_hf_config.schema import versions

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".support"
os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
os.environ["HF_MODULES_CACHE"] = str(CACHE / "modules")  # code of layers that differ
PARTS = ("widths", "layers")
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
    folder: TemporaryDirectory[str]
    process: Any
    since: float = field(default_factory=time.monotonic)
    loading: bool = False

    def result(self) -> dict[str, Any]:
        """What is known so far."""
        return dict(json.loads((Path(self.folder.name) / RESULT).read_text()))


class Runner:
    """Measures one part of pairs, their widths or their layers, so many at a time."""

    def __init__(self, part: str, seed: int, jobs: int, seconds: int, memory: int):
        self.part, self.seed, self.jobs = part, seed, jobs
        self.seconds, self.memory = seconds, memory
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.cache = CACHE / f"{seed}-{'-'.join(versions().values())}"
        self.cache.mkdir(parents=True, exist_ok=True)

    def done(self, pair: Pair) -> Path:
        """Where a pair's result lies when it is measured."""
        kind = "" if self.part == PARTS[0] else f".{self.part}"
        return self.cache / f"{pair.name}{kind}.json"

    def run(self, pairs: list[Pair]) -> None:
        """Measure those that are not done yet."""
        waiting = [pair for pair in pairs if not self.done(pair).exists()]
        random.Random(0).shuffle(waiting)  # so that the time left can be told
        running: list[Running] = []
        columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn()) as progress:
            task = progress.add_task("", total=len(pairs), completed=len(pairs) - len(waiting))
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running.append(self._started(waiting.pop(0)))
                for one in list(running):
                    if self._advance(one):
                        running.remove(one)
                        progress.advance(task)
                names = ", ".join(one.pair.type for one in running)
                progress.update(task, description=names[:40])
                time.sleep(0.05)

    def learn(self, pairs: list[Pair]) -> None:
        """Measure again how long learning takes, for the rows that there are."""
        done = [pair for pair in pairs if self.done(pair).exists()]
        with self.context.Pool(self.jobs) as pool, Progress() as progress:
            task = progress.add_task("learning", total=len(done))
            for pair, seconds in zip(done, pool.imap(learning, done), strict=True):
                row = json.loads(self.done(pair).read_text())
                if seconds is not None:
                    self.done(pair).write_text(json.dumps({**row, "learn_seconds": seconds}))
                progress.advance(task)

    def _started(self, pair: Pair) -> Running:
        folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="support-")
        arguments = (pair, self.part, Path(folder.name), self.seed, self.seconds, self.memory)
        process = self.context.Process(target=measure, args=arguments, daemon=True)
        process.start()
        return Running(pair, folder, process)

    def _advance(self, one: Running) -> bool:
        """Whether a pair is through; starts what comes next."""
        if one.process.is_alive():
            if time.monotonic() - one.since > _WAITING * self.seconds:
                one.process.kill()  # it waits for something that uses no processor time
            return False
        result: dict[str, Any] = {"stage": "class"}
        if (Path(one.folder.name) / RESULT).exists():
            result = one.result()
        if one.process.exitcode and result.get("stage") != "done":
            killed = one.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            reason = f"no end within {self.seconds} s" if killed else "the process died"
            result["why"] = f"{reason} ({result['stage']})"
            (Path(one.folder.name) / RESULT).write_text(json.dumps(result))
        if not one.loading and any(tried["folders"] for tried in attempts(result)):
            arguments = (one.pair, Path(one.folder.name), self.seconds, self.memory)
            one.process = self.context.Process(target=load_again, args=arguments, daemon=True)
            one.loading = True
            one.process.start()
            return False
        for tried in attempts(result):
            if tried.pop("folders", ()):
                tried.update(outcome="failed", why="loading again did not end")
        result["seconds"] = round(time.monotonic() - one.since, 1)
        named = {"task": one.pair.task, "type": one.pair.type, "class": one.pair.class_name}
        self.done(one.pair).write_text(json.dumps({**named, **result}))
        one.folder.cleanup()
        return True


def _has_run(widths: Runner, pair: Pair) -> bool:
    """Whether a pair's widths were measured, and it ran."""
    return widths.done(pair).exists() and ran(json.loads(widths.done(pair).read_text()))


def _row(widths: Runner, layers: Runner, pair: Pair) -> dict[str, Any]:
    """What was measured of a pair."""
    row: dict[str, Any] = json.loads(widths.done(pair).read_text())
    if layers.done(pair).exists():
        found = json.loads(layers.done(pair).read_text())
        keys = ("why", "lists", "differ", "dropped", "seconds")
        row["layers"] = {key: found[key] for key in keys if key in found}
    return row


def main() -> None:
    """Measure all pairs, or some."""
    parser = argparse.ArgumentParser(prog="benchmarks/support", description=__doc__)
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seconds", type=int, default=120, help="processor time of one process")
    parser.add_argument("--gib", type=float, default=13, help="memory limit of one process")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and the sample")
    parser.add_argument("--types", nargs="+", help="only these model types")
    parser.add_argument("--tasks", nargs="+", help="only these tasks")
    parser.add_argument("--sample", type=int, help="only so many types, drawn with the seed")
    parser.add_argument("--columns", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--learning", action="store_true", help="measure learning alone, of rows")
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
    widths, layers = (Runner(part, options.seed, *limits) for part in PARTS)
    if options.learning:
        widths.learn(pairs)
    for runner in (widths, layers) if not options.learning and not options.written else ():
        if runner.part in options.columns:
            chosen = [pair for pair in pairs if runner is widths or _has_run(widths, pair)]
            if options.again:
                for pair in chosen:
                    runner.done(pair).unlink(missing_ok=True)
            runner.run(chosen)
    rows = [_row(widths, layers, pair) for pair in pairs if widths.done(pair).exists()]
    whole = not options.types and not options.tasks
    rows = kept(rows, options.seed, ROOT) if whole else rows
    write(rows, len(pairs), options.seed, ROOT if whole else None)


if __name__ == "__main__":
    main()
