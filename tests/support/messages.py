"""What the library says: the texts in its source."""

from __future__ import annotations

import ast

import small

from tp_hf_config import errors

PACKAGE = small.ROOT / "tp_hf_config"
OWN = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}
_LEAST = 12  # letters: a shorter piece says nothing by itself
_EDGES = " .,:;?()="


def literals() -> set[str]:
    """The longest piece of every text in the package that is long enough to tell."""
    found = {
        _longest(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    return {text for text in found if _tells(text)}


def _tells(text: str) -> bool:
    return not text.isidentifier() and sum(map(str.isalpha, text)) >= _LEAST


def _longest(value: ast.Constant | ast.JoinedStr) -> str:
    parts = value.values if isinstance(value, ast.JoinedStr) else [value]
    texts = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return max((" ".join(text.split()).strip(_EDGES) for text in texts), key=len, default="")
