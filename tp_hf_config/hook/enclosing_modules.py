"""Update sentence-transformers' pooling around a model, and report other numbers around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.config_json import FieldPath, field_name, is_own
from .apply import Changes

_READ = ("embedding_dimension", "word_embedding_dimension")
"""What the versions of sentence-transformers call the width that their Pooling reads."""
_POOLED = (*_READ, "pooling_output_dimension")


def write_around(
    changes: Changes,
    model: nn.Module,
    pruned: nn.Module,
    changed: Mapping[FieldPath, tuple[Any, Any]],
) -> tuple[list[str], list[str]]:
    """Update the pooling around a model, and find other numbers that equal a field's old value.

    Args:
        changes: records the writes.
        model: the Hugging Face model.
        pruned: the module that the user passed, which contains it.
        changed: field -> (old value, new value).

    Returns:
        The names of the attributes that were written, and notes on numbers that stay.
    """
    fields = {old: f for f, (old, _) in reversed([*changed.items()]) if type(old) is int}
    inside = {id(module) for module in model.modules()}
    written: list[str] = []
    notes: list[str] = []
    for name, module in pruned.named_modules():
        own = {} if id(module) in inside else dict(vars(module))
        width = next((own[key] for key in _READ if key in own), 0)
        pooling = type(module).__module__.startswith("sentence_transformers.") and width in fields
        for key, value in own.items():
            full = f"{name}.{key}".lstrip(".")
            if pooling and key in _POOLED:
                changes.set(module, key, value * changed[fields[width]][1] // width)
                written.append(full)
            elif type(value) is int and value in fields and is_own(key):
                notes.append(
                    f"{full} ({type(module).__name__}) is still {value}, as "
                    f"{field_name(fields[value])} was: it stands outside the model, and nothing "
                    "proves that it means the same. Set it to "
                    f"{changed[fields[value]][1]} if it does"
                )
    return written, notes
