"""Check that generation_config.json fits a config: its tokens have to be in the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_FILE = "generation_config.json"
_LONGEST = 2**20


def generation_notes(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each entry of a folder's generation_config.json that a config rules out."""
    path = folder / _FILE
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        yield f"{_FILE} is not JSON: Transformers makes one from config.json instead"
        return
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    for name, value in data.items() if isinstance(data, dict) else ():
        if not name.endswith("_token_id") or type(size) is not int:
            continue
        tokens = value if isinstance(value, list) else [value]
        if any(type(token) is int and token >= size for token in tokens):
            yield f"{_FILE}: {name} {value} is no token of {size:,}; correct it by hand"
