"""The README.md of a pruned model: what it was made of, and what was done."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..schema import versions
from .source import Source

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def card(
    source: Source,
    *,
    model_class: str,
    fields: Mapping[str, tuple[Any, Any]],
    parameters: tuple[int, int],
    settings: Mapping[str, Any],
    lines: Sequence[str],
) -> str:
    """The model card, with front matter for the Hub.

    Args:
        source: the model that was pruned.
        model_class: its class.
        fields: config field -> value before, value after.
        parameters: their number before and after.
        settings: what was asked for, by name.
        lines: what else was found, one sentence each.
    """
    name = base_model(source)
    before, after = parameters
    rows = [(field, str(old), str(new)) for field, (old, new) in fields.items()]
    rows.append(("parameters", f"{before:,}", f"{after:,} ({after / before:.1%})"))
    return "\n".join(
        [
            *_front_matter(source, name),
            f"# {name.rpartition('/')[2]}, pruned",
            "",
            f"`{name}` (`{model_class}`), pruned with Torch-Pruning and tp-hf-config.",
            "",
            *_table(("", "before", "after"), rows),
            "",
            *(f"- {line}" for line in lines),
            "",
            "## How",
            "",
            *_table(("setting", "value"), [(k, f"`{v}`") for k, v in settings.items()]),
            "",
            *_table(("version", ""), [("python", platform.python_version()), *versions().items()]),
            "",
        ]
    )


def _front_matter(source: Source, name: str) -> list[str]:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=name, library_name="transformers", tags=["pruned"], **_metadata(source)
    )
    return ["---", data.to_yaml(), "---", ""]


def base_model(source: Source) -> str:
    """The name of the model that was pruned: no path of this machine."""
    if source.gguf is not None:
        return Path(source.gguf).stem
    return source.place if source.folder is None else source.folder.resolve().name


def _metadata(source: Source) -> dict[str, Any]:
    """What the card of the model that was pruned says of its licence, language and task."""
    from huggingface_hub.repocard import metadata_load

    folder = source.folder
    if folder is None or source.gguf is not None or not (folder / "README.md").is_file():
        return {}
    try:
        found = metadata_load(folder / "README.md") or {}
    except Exception:  # somebody's card that no YAML reader takes
        return {}
    return {key: found[key] for key in _KEPT if key in found}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[re.sub(r"[|\n]", " ", cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *clean)]
