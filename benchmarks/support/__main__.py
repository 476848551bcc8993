"""Measure every architecture of transformers: ``python benchmarks/support`` (``make support``).

Each (task, model type) pair is pruned at tiny size in a process of its own and loaded again in
another, both with time and memory limits.  Finished pairs lie in ``.support/`` and are not measured
again by the next run with the same versions and seed.  Writes ``docs/support.json``,
``docs/support.md`` and the totals in the README.
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
from table import kept, write

from tp_hf_config.schema import versions

os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".support"
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
    """Measures pairs, so many at a time."""

    def __init__(self, seed: int, jobs: int, seconds: int, memory: int):
        self.seed, self.jobs, self.seconds, self.memory = seed, jobs, seconds, memory
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.cache = CACHE / f"{seed}-{'-'.join(versions().values())}"
        self.cache.mkdir(parents=True, exist_ok=True)

    def done(self, pair: Pair) -> Path:
        """Where a pair's result lies when it is measured."""
        return self.cache / f"{pair.name}.json"

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
        arguments = (pair, Path(folder.name), self.seed, self.seconds, self.memory)
        process = self.context.Process(target=measure, args=arguments, daemon=True)
        process.start()
        return Running(pair, folder, process)

    def _advance(self, one: Running) -> bool:
        """Whether a pair is through; starts what comes next."""
        if one.process.is_alive():
            if time.monotonic() - one.since > _WAITING * self.seconds:
                one.process.kill()  # it waits for something that uses no processor time
            return False
        result = one.result() if (Path(one.folder.name) / RESULT).exists() else {"stage": "class"}
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
    runner = Runner(options.seed, options.jobs, options.seconds, int(options.gib * 2**30))
    if options.again:
        for pair in pairs:
            runner.done(pair).unlink(missing_ok=True)
    if options.learning:
        runner.learn(pairs)
    elif not options.written:
        runner.run(pairs)
    done = [runner.done(pair) for pair in pairs if runner.done(pair).exists()]
    rows = [json.loads(one.read_text()) for one in done]
    whole = not options.types and not options.tasks
    rows = kept(rows, options.seed, ROOT) if whole else rows
    write(rows, len(pairs), options.seed, ROOT if whole else None)


if __name__ == "__main__":
    main()
