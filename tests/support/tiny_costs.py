"""Field maps and forward passes that cost what a test says, without a class."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from tp_hf_config.forward.head_splits import HeadSplits


def known_of(data: Any = None, **parts: Any) -> Any:
    """A field map of a config's JSON that has the parts which are given."""
    config = SimpleNamespace(to_json_string=lambda use_diff: json.dumps(data or {}))
    builder = SimpleNamespace(config=lambda data: config)
    empty = ("non_size_fields", "ratio_partners", "sizes", "expressions", "powers", "unfitted")
    return SimpleNamespace(**{"builder": builder, **{name: {} for name in empty}, **parts})


def costs(each: int, *fields: str, legal: Any = lambda data: True) -> Any:
    """A forward pass that costs ``each`` for every one of these fields' sizes."""

    def seen(data: dict[str, Any]) -> HeadSplits | None:
        sizes = (data[f] for f in fields)
        total = sum(sum(size) if isinstance(size, list) else size for size in sizes)
        return HeadSplits(numbers=each * total) if legal(data) else None

    return seen
