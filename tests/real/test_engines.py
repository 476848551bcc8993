"""The pure parts of ``make engines``: what answers come to, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import small

FOLDER = small.ROOT / "benchmarks" / "engines"
DOCS = small.ROOT / "docs"
WITHIN = (1e-3, 1e-5)
TOKENS = {
    "tokens": [[5, 6, 7]],
    "log_probabilities": [[-1.0, -2.0, -3.0]],
    "gaps": [[2.0, 0.5, 1.0]],
}


def module(name: str) -> ModuleType:
    return small.module_of(FOLDER / f"{name}.py")


def test_the_page_is_that_of_the_json() -> None:
    results = json.loads((DOCS / "engines.json").read_text(encoding="utf-8"))
    assert (DOCS / "engines.md").read_text(encoding="utf-8") == module("page").page(results)


def test_what_the_page_says_of_each_outcome() -> None:
    outcomes: dict[str, dict[str, Any]] = {
        "same": {"outcome": "same", "off": 1e-6},
        "told": {"outcome": "same", "off": 1e-6, "after": {"why": "E: a `b`", "remedy": "x = 1"}},
        "tie": {"outcome": "near-tie", "off": 0.0, "first": [{"gap": 0.001}]},
        "other": {"outcome": "differs", "off": 0.0, "first": [{"gap": 0.5}, {"gap": 2.0}]},
        "numbers": {"outcome": "differs", "off": 0.5},
        "no": {"outcome": "refused", "why": "E: no"},
    }
    engine = {
        "date": "2026-11-26",
        "versions": {"x": "1"},
        "why_not": "",
        "generates": True,
        "embeds": False,
        "precision": "float32",
        "within": [1e-3, 1e-5],
        "note": "",
        "results": outcomes,
    }
    names = [*outcomes, "later"]
    page = module("page").page(
        {
            "versions": {},
            "prompts": 1,
            "new_tokens": 1,
            "cases": [
                *({"key": k, "model": "M", "name": k, "widths": "1"} for k in names),
                {"key": "own", "model": "M", "name": "own", "widths": "2", "engines": ["B"]},
            ],
            "engines": {
                "A": engine,
                "B": {**engine, "why_not": "ERROR: none", "versions": {}, "results": {}},
            },
        }
    )
    cells = {
        "same": "same, 1e-06",
        "told": "same once told, 1e-06",
        "tie": "near-tie, gap 0.001",
        "other": "OTHER TOKENS, gap 2",
        "numbers": "DIFFERS, 5e-01",
        "no": "refused",
        "later": "not measured",
    }
    for name, cell in cells.items():
        assert f"| {name} | 1 | {cell} | not installed |" in page
    assert "| own | 2 | not for it | not installed |" in page
    assert "- **A**: 3 of 6 choices of widths measured give the same, 1 of them once told" in page
    assert "- **A** (M: told): `E: a 'b'`; goes with `x = 1`\n" in page
    assert "- **B** could not be installed: `ERROR: none`" in page


def test_results_are_of_engines_that_have_a_module() -> None:
    engines = module("environments").ENGINES
    results = json.loads((DOCS / "engines.json").read_text(encoding="utf-8"))
    assert {engine.name for engine in engines} >= set(results["engines"])
    assert [(FOLDER / f"{engine.module}.py").exists() for engine in engines] == [True] * len(
        engines
    )


class TestCompare:
    def compared(self, given: dict[str, Any], expected: dict[str, Any] = TOKENS) -> dict[str, Any]:
        return dict(module("asking").compare(expected, given, WITHIN))

    def given(self, tokens: list[int], scores: list[float]) -> dict[str, Any]:
        return self.compared({"tokens": [tokens], "log_probabilities": [scores]})

    def test_the_same_tokens(self) -> None:
        found = self.given([5, 6, 7], [-1.0, -2.0, -3.0 - 2**-12])
        assert found == {"outcome": "same", "off": 2**-12}

    def test_the_same_tokens_by_other_numbers(self) -> None:
        found = self.given([5, 6, 7], [-1.0, -2.5, -3.0])
        assert found == {"outcome": "differs", "off": 0.5}

    def test_other_tokens(self) -> None:
        found = self.given([5, 8, 7], [-1.0, -9.0, -3.0])
        first = [{"prompt": 0, "token": 1, "gap": 0.5}]
        assert found == {"outcome": "differs", "off": 0.0, "first": first}

    def test_a_near_tie(self) -> None:
        expected = {**TOKENS, "gaps": [[2.0, 0.002, 1.0]]}
        given = {"tokens": [[5, 8, 9]], "log_probabilities": [[-1.0, -2.0, -9.0]]}
        first = [{"prompt": 0, "token": 1, "gap": 0.002}]
        found = self.compared(given, expected)
        assert found == {"outcome": "near-tie", "off": 0.0, "first": first}

    @pytest.mark.parametrize(
        ("numbers", "outcome", "off"),
        [
            ([1.0, 0.0], "same", 0.0),
            ([1.0, 0.5], "differs", 0.5),
            ([1.0, float("nan")], "differs", float("inf")),
        ],
    )
    def test_embeddings(self, numbers: list[float], outcome: str, off: float) -> None:
        found = self.compared({"embeddings": [numbers]}, {"embeddings": [[1.0, 0.0]]})
        assert found == {"outcome": outcome, "off": off}

    def test_another_number_of_components_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="longer"):
            self.compared({"embeddings": [[1.0, 0.0, 0.0]]}, {"embeddings": [[1.0, 0.0]]})

    def test_what_an_engine_says(self) -> None:
        assert self.compared({"error": "ValueError: no"}) == {
            "outcome": "refused",
            "why": "ValueError: no",
        }
        assert self.compared({"died": "(-11)"}) == {"outcome": "died", "why": "(-11)"}

    def test_what_had_to_be_set_is_told(self) -> None:
        after = {"why": "ValueError: no", "remedy": "model.x = 1"}
        numbers = {"embeddings": [[1.0]]}
        found = self.compared({**numbers, "after": after}, numbers)
        assert found == {"outcome": "same", "off": 0.0, "after": after}


class TestAsk:
    @pytest.fixture
    def case(self, tmp_path: Path) -> Path:
        (tmp_path / "question.json").write_text("{}")
        return tmp_path

    def asked(self, case: Path, body: str, seconds: int = 60) -> dict[str, Any]:
        tool = case / "an_engine.py"
        tool.write_text(f"def generate(folder, question):\n    {body}\n")
        asked = (Path(sys.executable), tool, "generate", case, case / "question.json", seconds)
        return dict(module("asking").ask(*asked))

    def test_an_answer(self, case: Path) -> None:
        assert self.asked(case, "return {'tokens': [[1]]}") == {"tokens": [[1]]}

    def test_an_error_is_an_answer(self, case: Path) -> None:
        assert self.asked(case, "raise ValueError('odd')") == {"error": "ValueError: odd"}

    def test_a_death_is_told(self, case: Path) -> None:
        found = self.asked(case, "import os; print('bye', flush=True); os.abort()")
        assert found == {"died": "the process died (-6): bye"}

    def test_an_engine_without_end_is_ended(self, case: Path) -> None:
        found = self.asked(case, "import time; time.sleep(600)", seconds=2)
        assert found == {"died": "no end within 2 s"}


def test_pip_says_why() -> None:
    last_error = module("environments").last_error
    text = "a\nERROR: Could not find a version\nERROR: No matching distribution\n[notice] pip\n"
    assert last_error(text) == "ERROR: No matching distribution"
    assert last_error("killed\n") == "killed"
    assert last_error("") == "pip failed without a word"
