"""Every reproduction in ``docs/upstream.md`` holds: one that fails is a fault that was mended."""

from __future__ import annotations

import re

import doc_blocks
import pytest
import small

_PATH = small.ROOT / "docs" / "upstream.md"
_SECTION = re.compile(r"^## (.+?)$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_SECTIONS = _SECTION.findall(_PATH.read_text(encoding="utf-8"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "text"), _SECTIONS, ids=[title for title, _ in _SECTIONS])
def test_the_fault_is_still_there(title: str, text: str) -> None:
    (block,) = doc_blocks.blocks(text, f"{_PATH.name}: {title}")
    doc_blocks.run_python(block, {"__name__": title})
