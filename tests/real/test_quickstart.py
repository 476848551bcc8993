"""The quickstart notebook: its page shows what it holds, and it runs on the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import prune_smollm2
import pytest
import small

notebook: Any = small.module_of(small.ROOT / "docs" / "notebook.py")


def outputs(ran: Any) -> str:
    """All that cells show as text, one after the other."""
    shown = [output for cell in ran.cells for output in cell.get("outputs", ())]
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in shown)


def test_the_page_is_the_notebook() -> None:
    text, pictures = notebook.page(nbformat.read(notebook.NOTEBOOK, as_version=4))
    docs = small.ROOT / "docs"
    assert (docs / "quickstart.md").read_text(encoding="utf-8") == text
    assert len(pictures) == 1
    for name, data in pictures.items():
        assert (docs / name).read_bytes() == data


@pytest.mark.full
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_smollm2.console, "quiet", True)
    monkeypatch.setenv("TP_HF_CONFIG_CACHE", "off")
    shown = outputs(notebook.executed(tmp_path))
    assert shown.count("The capital of France is Paris") == 2
    assert "1344 124,561,728 parameters, same logits: True" in shown
