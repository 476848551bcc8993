"""Pruned models in the tools that come after: ``make downstream``.

SmolLM2 and Gemma 3 270M are pruned by commands of the shell. Each tool, in an environment of its
own, quantises, trains or evaluates the result; llama.cpp's programs are built from source (CMake
and a C++ compiler). Models and answers stay in ``.downstream/``, so that it goes on where it was
stopped. Writes ``docs/downstream.json`` and ``docs/downstream.md``. ``benchmarks`` and
``benchmarks/engines`` have to be in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
from asking import ask
from cases import CASES, Case, make, once, question
from environments import install
from in_llama_cpp import measured
from llama_programs import SOURCES
from page import page, wrong
from tools import TOOLS, Tool

from tp_hf_config.reports import dated

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".downstream"
DOCS = ROOT / "docs"


def main() -> None:
    """Prune, install, ask, write; fail if a tool refuses a model that was made for it."""
    options = parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    PLACE.mkdir(exist_ok=True)
    numbers = dated(
        {
            "date": datetime.date.today().isoformat(),
            "cases": [make(case, PLACE) for case in CASES],
            "tools": {},
            "answers": {},  # tool -> case -> answer
        }
    )
    for case in CASES:
        kind = {"versions": dict([SOURCES.split("==")]), "why_not": ""}
        for name, answer in _of_llama_cpp(case, options.threads).items():
            target = "gguf-32" if name.endswith("Q8_0") else None
            numbers["tools"][name] = {**kind, "target": target}
            _write(numbers, name, case, answer)
    for tool in TOOLS:
        environment = install(tool, options.environments.resolve(), options.seconds)
        versions, why_not = environment.versions, environment.why_not
        kind = {"versions": versions, "why_not": why_not, "target": tool.target}
        numbers["tools"][tool.name] = kind
        for case in () if why_not else CASES:
            answer = _answer(tool, case, environment.python, options.seconds)
            _write(numbers, tool.name, case, answer)
    if refused := list(wrong(numbers)):
        raise SystemExit("refused, though made for it: " + "; ".join(refused))


def _write(numbers: dict[str, Any], name: str, case: Case, answer: dict[str, Any]) -> None:
    numbers["answers"].setdefault(name, {})[case.key] = answer
    print(f"{name}, {case.key}: {answer}", flush=True)
    text = json.dumps(numbers, indent=1) + "\n"
    (DOCS / "downstream.json").write_text(text, encoding="utf-8")
    (DOCS / "downstream.md").write_text(page(numbers), encoding="utf-8")


def _answer(tool: Tool, case: Case, python: Path, seconds: int) -> dict[str, Any]:
    """Return what a tool makes of a model."""
    folder, asked = PLACE / case.key, PLACE / "question.json"

    def answered() -> dict[str, Any]:
        asked.write_text(json.dumps(question(folder)), encoding="utf-8")
        module = Path(__file__).with_name(f"{tool.module}.py")
        return ask(python, module, tool.task, folder, asked, seconds)

    return once(PLACE / f"{case.key}-{tool.module}-{tool.task}.json", answered)


def _of_llama_cpp(case: Case, threads: int) -> dict[str, Any]:
    folder = PLACE / case.key
    return once(
        PLACE / f"{case.key}-llama_cpp.json",
        lambda: measured(folder, question(folder)["text"], PLACE, threads),
    )


def parse_args() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="benchmarks/downstream", description=__doc__)
    parser.add_argument("--seconds", type=int, default=1800, help="for one tool and one model")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-engines")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
