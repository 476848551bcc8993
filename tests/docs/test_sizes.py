"""The table of calibrations: what is foretold is what was measured."""

from __future__ import annotations

import small


def test_a_foretold_calibration_has_the_measured_products() -> None:
    command = small.module_of(small.ROOT / "benchmarks" / "sizes.py")
    _, _, *rows = command.between(command.PAGE.read_text(encoding="utf-8"))[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    assert [name for name, *_ in cells] == ["SmolLM2-135M", "all-MiniLM-L6-v2"]
    for _, foretold, products, process in cells:
        assert foretold == products
        assert int(process.split()[0]) >= int(products.split()[0])
