"""The table of sizes is what its command gives, and the page says that it is foretold."""

from __future__ import annotations

from typing import Any

import pytest
import small

PAGE = (small.ROOT / "docs" / "recipes" / "large-models.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def command() -> Any:
    return small.module_of(small.ROOT / "benchmarks" / "sizes.py")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["Llama 1B", "Llama 8B"])
def test_a_row_is_what_the_command_gives(name: str, command: Any) -> None:
    head, rule, row = command.table([command.row(name)]).splitlines()
    shown = command.between("sizes", PAGE)[0].splitlines()
    assert shown[:2] == [head, rule]
    assert row in shown
    assert head.startswith("| foretold |")


def test_every_model_has_a_row(command: Any) -> None:
    rows = command.between("sizes", PAGE)[0].splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == command.MODELS


def test_a_foretold_calibration_has_the_measured_products(command: Any) -> None:
    page = (small.ROOT / "docs" / "recipes" / "quality.md").read_text(encoding="utf-8")
    _, _, *rows = command.between("calibrations", page)[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [name for name, *_ in cells] == ["SmolLM2-135M", "all-MiniLM-L6-v2"]
    for _, foretold, products, process in cells:
        assert foretold == products
        assert int(process.split()[0]) >= int(products.split()[0])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (59.9, "60 s"), (61, "1.0 min"), (1000, "17 min"), (7200, "2.0 h")],
)
def test_times_are_magnitudes(seconds: float, text: str, command: Any) -> None:
    assert command.duration(seconds) == text
