"""Folders changed at random: no crash, no wrong verdict, no changed folder.

    python benchmarks/fuzz.py [--seconds 600] [--seed N] [--kinds config ...] [--found DIR]

The folders are those of the tests (``tests/support/hostile.py``), each time from other seeds.  What
breaks
a property is kept in DIR: the folder as it was, and the error, under its seed.  Exit code 1:
something was found.  Should the process itself die, the folder that killed it is ``DIR/now``.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from hostile import KINDS

ROUND = 10  # examples of one kind and seed


class Fuzzer:
    """Runs rounds, counts examples, and keeps what breaks a property."""

    def __init__(self, found: Path, seconds: float):
        self.found = found
        self.end = time.monotonic() + seconds
        self.examples: Counter[str] = Counter()
        self.slowest = (0.0, "nothing")
        self.broken: set[str] = set()

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.end

    def round(self, kind: str, number: int) -> None:
        """Some examples of a kind from one seed; the first that breaks a property ends it."""

        @seed(number)
        @settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def examples(data: st.DataObject) -> None:
            self.example(kind, number, data)

        try:
            examples()
        except Exception as error:  # whatever breaks a property is what is looked for
            print(f"{kind}, seed {number}: {type(error).__name__}: {error}", flush=True)

    def example(self, kind: str, number: int, data: st.DataObject) -> None:
        """One folder."""
        place = self.found / "now"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        folder = KINDS[kind].change(data, place)
        kept = shutil.copytree(folder, place / "before")
        started = time.monotonic()
        try:
            KINDS[kind].judge(folder)
        except Exception:
            self.keep(kept, f"{kind}-{number}", traceback.format_exc())
            raise
        finally:
            self.examples[kind] += 1
            self.slowest = max(self.slowest, (time.monotonic() - started, f"{kind}, {number}"))
        shutil.rmtree(place)

    def keep(self, folder: Path, name: str, error: str) -> None:
        """The folder that breaks a property, and how."""
        self.broken.add(name)
        kept = self.found / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept / "model")
        (kept / "error.txt").write_text(error)


def main() -> None:
    """Fuzz until the time is up; say how much that was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="of the seeds; default: another each time")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--found", type=Path, default=Path(".fuzz"), help="where finds are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    fuzzer = Fuzzer(arguments.found, arguments.seconds)
    first = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    numbers = random.Random(first)
    started = time.monotonic()
    while not fuzzer.over:
        kind = min(arguments.kinds, key=lambda kind: fuzzer.examples[kind])
        fuzzer.round(kind, numbers.getrandbits(32))
    each = ", ".join(f"{kind} {count:,}" for kind, count in fuzzer.examples.items())
    total, seconds = fuzzer.examples.total(), time.monotonic() - started
    print(f"{total:,} folders in {seconds:.0f} s from seed {first}: {each}")
    print(f"slowest: {fuzzer.slowest[0]:.1f} s ({fuzzer.slowest[1]})")
    where = f", in {fuzzer.found}" if fuzzer.broken else ""
    print(f"broken properties: {len(fuzzer.broken)}{where}")
    sys.exit(1 if fuzzer.broken else 0)


if __name__ == "__main__":
    main()
