"""Prune a folder as if memory had little room, and say how much anonymous memory that took.

Usage: ``python paged_child.py FOLDER OUT SETTINGS FREE``; SETTINGS are a job's, in JSON, and FREE
is how many bytes of memory the library thinks are free.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from tp_hf_config.calibration import passes
from tp_hf_config.pipeline import prune, source
from tp_hf_config.pipeline.job import Job
from tp_hf_config.pipeline.source import Source


def anonymous() -> int:
    """The bytes of anonymous memory of this process; pages of files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main(folder: str, out: str, settings: str, free: str) -> None:
    """Prune, and print the growth of anonymous memory, in bytes."""
    torch.set_num_threads(1)
    for module in (passes, source):
        module.free_memory = lambda *_: int(free)  # type: ignore[attr-defined]
    job = Job(Source(folder, folder), Path(out), {"pruning_ratio": 0.25}, **json.loads(settings))
    config = prune.config_of(job.source)
    prune.planned_widths(job, config, prune.class_for(job.source, config))  # learns the class
    most, done = 0, threading.Event()
    before = anonymous()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        prune.prune_checkpoint(job)
    finally:
        done.set()
        watcher.join()
    print(most - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
