"""The README's table of attention heads is what its command gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import small

README = (small.ROOT / "README.md").read_text()


def command() -> Any:
    path = Path(small.ROOT / "benchmarks" / "head_modes.py")
    spec = importlib.util.spec_from_file_location("heads_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_command_gives() -> None:
    module = command()
    assert README.count(module.BEGIN) == README.count(module.END) == 1
    written = module.between_marks(README).splitlines()
    for line, made in zip(written, module.table().splitlines(), strict=True):
        assert line == made
