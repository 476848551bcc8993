"""Pruned models in real engines: ``python benchmarks/engines`` (``make engines``).

SmolLM2 and MiniLM are pruned to several choices of widths and saved; every engine, installed in an
environment of its own, converts and runs them in a process of its own with a time limit; what it
computes is compared with transformers.  Writes ``docs/engines.json`` and ``docs/engines.md`` after
every answer; with ``--engines`` those of the others stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from asking import ask, compare
from cases import CASES, NEW_TOKENS, PROMPTS, Case, make
from environments import ENGINES, Engine, Environment, install
from page import page, show
from rich.console import Console
from transformers.utils import logging

from tp_hf_config import export
from tp_hf_config.reports import dated

ROOT = Path(__file__).parents[2]
FOLDERS = ROOT / ".engines"
DOCS = ROOT / "docs"
console = Console()


def main() -> None:
    """Prune, install, ask, compare, write."""
    options = parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    chosen = [case for case in CASES if not options.cases or case.key in options.cases]
    before = _before() if options.engines or options.more else {"cases": [], "engines": {}}
    made = {case.key: _made(case, options.reuse) for case in chosen}
    known = {case.key for case in CASES}
    rows = {row["key"]: row for row in before["cases"] if row["key"] in known} | made
    results = dated(
        {
            "prompts": len(PROMPTS),
            "new_tokens": NEW_TOKENS,
            "cases": [rows[case.key] for case in CASES if case.key in rows],
        }
    )
    engines = before["engines"]
    for engine in ENGINES:
        if options.engines and engine.name not in options.engines:
            continue
        console.print(f"installing {engine.name}")
        environment = install(engine, options.environments.resolve(), options.install_seconds)
        found = _described(engine, environment)
        if options.more and engine.name in engines:
            kept = engines[engine.name]["results"]
            found["results"] = {key: kept[key] for key in kept if key in rows}
        engines[engine.name] = found
        for case in () if environment.why_not else chosen:
            able = engine.generates if case.generates else engine.embeds
            asked = able and (case.engines is None or engine.name in case.engines)
            if asked and case.key not in found["results"]:
                result = _measured(engine, environment, case, options.seconds)
                found["results"][case.key] = result
                console.print(f"  {case.model}: {case.name}: {result}", markup=False)
            listed = [one.name for one in ENGINES if one.name in engines]
            _write({**results, "engines": {name: engines[name] for name in listed}})
        console.print(environment.why_not, markup=False)
    show(_before())
    if not options.keep:
        shutil.rmtree(FOLDERS)


def _made(case: Case, reuse: bool) -> dict[str, Any]:
    """Prune one, unless that is asked to be reused; what the table says of it."""
    folder = FOLDERS / case.key
    row = folder / "case.json"
    if not (reuse and row.exists()):
        console.print(f"pruning {case.model}: {case.name}")
        shutil.rmtree(folder, ignore_errors=True)
        question, answer, widths = make(case, folder / "model")
        (folder / "question.json").write_text(json.dumps(question), encoding="utf-8")
        (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        shown = {
            "key": case.key,
            "model": case.model,
            "name": case.name,
            "widths": widths,
            "engines": case.engines,
        }
        row.write_text(json.dumps(shown), encoding="utf-8")
    return dict(json.loads(row.read_text(encoding="utf-8")))


def _described(engine: Engine, environment: Environment) -> dict[str, Any]:
    """An engine, with nothing measured yet."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": environment.versions,
        "why_not": environment.why_not,
        "generates": engine.generates,
        "embeds": engine.embeds,
        "precision": engine.precision,
        "within": engine.within,
        "note": engine.note,
        "results": {},
    }


def _measured(engine: Engine, environment: Environment, case: Case, seconds: int) -> dict[str, Any]:
    """What one engine makes of one case."""
    folder = FOLDERS / case.key
    expected = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if engine.reads == "gguf" and not (folder / "gguf").exists():
        export(folder / "model", folder / "gguf", to="gguf", trust_remote_code=True)
    started = time.monotonic()
    module = Path(__file__).with_name(f"{engine.module}.py")
    task, question = "generate" if case.generates else "embed", folder / "question.json"
    given = ask(environment.python, module, task, folder / engine.reads, question, seconds)
    result = compare(expected, given, engine.within)
    return {**result, "seconds": round(time.monotonic() - started)}


def _before() -> dict[str, Any]:
    path = DOCS / "engines.json"
    if not path.exists():
        return {"cases": [], "engines": {}}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write(results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=1) + "\n"
    (DOCS / "engines.json").write_text(text, encoding="utf-8")
    (DOCS / "engines.md").write_text(page(json.loads(text)), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """The knobs."""
    names = [engine.name for engine in ENGINES]
    parser = argparse.ArgumentParser(prog="benchmarks/engines", description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=names, help="measure only these again")
    parser.add_argument("--cases", nargs="+", help="only these, as docs/engines.json calls them")
    parser.add_argument("--more", action="store_true", help="measure only what is not there yet")
    parser.add_argument("--keep", action="store_true", help="leave the pruned folders in .engines/")
    parser.add_argument("--reuse", action="store_true", help="take those that a run left there")
    parser.add_argument("--seconds", type=int, default=600, help="for one engine and one model")
    parser.add_argument("--install-seconds", type=int, default=1800, help="for one environment")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-engines")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
