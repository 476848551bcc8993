"""Runs configs, each in a process of its own, and keeps one line of JSON for every one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from pairs import Pair
from trying import CASE, RESULT, try_config

HERE = Path(__file__).parent
WAITING = 8
"""How many times its seconds of processor time a process may take on a busy machine."""
BAD = ("wrong", "failed", "crashed")
PRELOADED = [
    "torch",
    "torch_pruning",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "tp_hf_config.pipeline.support",
    "tp_hf_config.planning.pruner_graph",
]


@dataclass(frozen=True)
class Limits:
    """Of one process: seconds of processor time, and bytes."""

    seconds: int
    memory: int


class Reloader:
    """A process without the library that loads saved models, in forks of itself."""

    def __init__(self, seconds: int):
        self.seconds = seconds
        command = [sys.executable, str(HERE / "reload.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, folders: list[Path]) -> dict[str, str | None]:
        """For every folder what differs, or ``None``."""
        asked = {"folders": list(map(str, folders)), "seconds": self.seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        found: dict[str, str | None] = json.loads(self.process.stdout.readline())
        return {str(one): found.get(str(one), "loading again did not end") for one in folders}

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Hunt:
    """Configs in a fixed order, until so many of them ran.

    Args:
        pairs: the classes that configs are drawn of, in turn.
        folder: where results lie.
        seed: decides on the order and on every config.
        limits: of each config.
        kept: results of earlier hunts, of which those with the same seed and versions count.
    """

    def __init__(
        self, pairs: list[Pair], folder: Path, seed: int, limits: Limits, kept: Path | None = None
    ):
        self.pairs, self.folder, self.seed, self.limits = pairs, folder, seed, limits
        self.kept = kept
        (folder / "bases").mkdir(parents=True, exist_ok=True)
        self.results = folder / "results.jsonl"
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self._lock = threading.Lock()
        self._own = threading.local()
        self._reloaders: list[Reloader] = []
        self._code = _code()

    def rows(self) -> list[dict[str, Any]]:
        """What was done so far, by this hunt and those before it: the latest of every config."""
        earlier = [row for row in _read(self.kept) if row["of"] == self.folder.name]
        return list({_key(row): row for row in [*earlier, *_read(self.results)]}.values())

    def keep(self) -> None:
        """Write what was done beside what earlier hunts did, without what can be drawn again."""
        assert self.kept is not None
        others = [row for row in _read(self.kept) if row["of"] != self.folder.name]
        own = [_short(row, self.folder.name) for row in self.rows()]
        self.kept.write_text("".join(f"{json.dumps(row)}\n" for row in [*others, *own]))

    def run(self, count: int, jobs: int) -> Iterator[dict[str, Any]]:
        """Try configs until so many have run, those of before included."""
        rows = (row for row in self.rows() if row["code"] == self._code or not is_bad(row))
        done = {_key(row): row for row in rows}
        ran = sum(map(has_run, done.values()))
        waiting = (key for key in self._order() if (key[0].task, key[0].type, key[1]) not in done)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                running: set[Future[dict[str, Any]]] = set()
                while ran < count:
                    free = min(jobs, count - ran) - len(running)
                    running |= {pool.submit(self._one, k) for k in islice(waiting, max(0, free))}
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        ran += has_run(future.result())
                        yield future.result()
                    if _code() != self._code:  # what is imported late would be of other code
                        raise RuntimeError("the code changed during the hunt: start it again")
        finally:
            for reloader in self._reloaders:
                reloader.close()

    def _order(self) -> Iterator[tuple[Pair, int]]:
        number = 0
        while True:
            yield from ((p, number) for p in Random(self.seed).sample(self.pairs, len(self.pairs)))
            number += 1

    def _one(self, key: tuple[Pair, int]) -> dict[str, Any]:
        pair, number = key
        started = time.monotonic()
        with TemporaryDirectory(prefix="hunt-") as name:
            row = self._tried(pair, number, Path(name))
            self._load_again(row, Path(name))
        named = {"task": pair.task, "type": pair.type, "class": pair.class_name, "number": number}
        seconds = round(time.monotonic() - started, 1)
        row = {**named, **row, "seconds": seconds, "code": self._code}
        with self._lock, self.results.open("a") as file:
            print(json.dumps(row), file=file)
        return row

    def _tried(self, pair: Pair, number: int, folder: Path) -> dict[str, Any]:
        limits = (self.limits.seconds, self.limits.memory)
        arguments = (pair, number, self.seed, folder, self.folder / "bases", limits)
        process = self.context.Process(target=try_config, args=arguments, daemon=True)
        process.start()
        process.join(WAITING * self.limits.seconds)
        if process.is_alive():
            process.kill()
            process.join()
        path = folder / RESULT
        row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"modes": []}
        if process.exitcode and row.get("stage") != "done":
            killed = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            row["why"] = "no end within its time" if killed else "the process died"
        return row

    def _load_again(self, row: dict[str, Any], folder: Path) -> None:
        saved = {mode["folder"]: mode for mode in row["modes"] if "folder" in mode}
        paths = [folder / name for name in saved if (folder / name / CASE).exists()]
        if not paths:
            return
        if not hasattr(self._own, "reloader"):
            self._own.reloader = Reloader(self.limits.seconds)
            self._reloaders.append(self._own.reloader)
        for path, why in self._own.reloader.ask(paths).items():
            mode = saved[Path(path).name]
            del mode["folder"]
            if why is not None:
                mode.update(outcome="wrong" if "it computes" in why else "failed", why=why)
                mode["outcome"] = "wrong" if "generates" in why else mode["outcome"]


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["type"], row["number"]


def _short(row: dict[str, Any], of: str) -> dict[str, Any]:
    """A row without its config, which the seed gives again, and without what worked in full."""
    modes = [
        {k: v for k, v in mode.items() if k in ("mode", "outcome") or (k == "why" and v)}
        for mode in row["modes"]
    ]
    named = ("task", "type", "class", "number", "layered", "changed", "why", "cpu", "code")
    return {"of": of, **{k: row[k] for k in named if k in row}, "modes": modes}


def _code() -> str:
    """A digest of the package and of the hunt as they lie on disk."""
    digest = hashlib.sha256()
    for folder in (HERE.parents[1] / "tp_hf_config", HERE):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def has_run(row: dict[str, Any]) -> bool:
    """Whether a config was drawn with which the class runs, and some mode was tried to its end."""
    return any(mode["outcome"] != "not run" for mode in row["modes"])


def is_bad(row: dict[str, Any]) -> bool:
    """Whether some mode was silently wrong, or ended in an error that is no refusal."""
    return any(mode["outcome"] in BAD for mode in row["modes"])
