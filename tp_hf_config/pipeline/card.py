"""The README.md of a pruned model: where it comes from, and what was done."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from ..hook.report import in_words
from ..reports import versions
from .job import Layerwise, Pruned
from .source import Source, cached_model

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def card(source: Source, pruned: Pruned) -> str:
    name = base_model(source)
    before, after = pruned.parameters
    rows = [(field, old, new) for field, (old, new) in in_words(pruned.fields).items()]
    rows.append(("parameters", f"{before:,}", f"{after:,} ({after / before:.1%})"))
    lines = [f"Round trip: {pruned.proof}"]
    if pruned.dropped_layers is not None:
        lines.append(pruned.dropped_layers.title())
    for text, (old, new) in pruned.perplexity.items():
        lines.append(f"Perplexity on {text}: {old:.1f} before, {new:.1f} after")
    differ = pruned.layers_differ
    return f"""{front_matter(source)}
# {name.rpartition("/")[2]}, pruned

`{name}` (`{pruned.model}`), pruned with Torch-Pruning and tp-hf-config.

{table(("", "before", "after"), rows)}

{bullets([*lines, *pruned.notes])}

{"" if differ is None else _loading(differ, pruned.out.name)}## How

{table(("setting", "value"), [(k, f"`{v}`") for k, v in pruned.settings.items()])}

{versions_table()}
"""


def _loading(layerwise: Layerwise, folder: str) -> str:
    widths = [(name, " ".join(map(str, values))) for name, values in layerwise.widths.items()]
    return f"""## Loading

```python
from transformers import {layerwise.auto_class}

model = {layerwise.loading(folder)}
```

The layers of this model have different widths, and the classes of Transformers build all layers \
alike. `{layerwise.file}`, written by tp-hf-config, builds each layer with its own widths. \
`trust_remote_code=True` allows Transformers to run that file. It imports nothing but Transformers \
(5.15 or newer). `tp-hf-config export` writes this model in formats that need no code.

Without `trust_remote_code=True`, loading fails with `AmbiguousGlobalPerLayerAttributeError` or \
with a message that `ignore_mismatched_sizes` is `False`, because the stock class has one width \
for all layers. Do not change config.json.

{table(("by layer", ""), widths)}

"""


def front_matter(source: Source) -> str:
    data = ModelCardData(
        base_model=base_model(source),
        library_name="transformers",
        tags=["pruned"],
        **_metadata(source),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def base_model(source: Source) -> str:
    """Return the unpruned model's name, never a path: a Hub id, or a folder's or file's name."""
    if source.gguf is not None:
        return Path(source.gguf).stem
    if source.folder is None:
        return source.place
    folder = source.folder.resolve()
    cached = cached_model(folder)
    if cached is not None and cached.name.startswith("models--"):  # models--owner--name
        return cached.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _metadata(source: Source) -> dict[str, Any]:
    if source.gguf is not None:
        return {}
    try:
        path: Any = source.folder and source.folder / "README.md"
        path = path or try_to_load_from_cache(source.place, "README.md")
        metadata = metadata_load(path) or {}
    except Exception:  # no card, or invalid YAML
        return {}
    return {key: metadata[key] for key in _KEPT if key in metadata}


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}." for line in lines)


def versions_table() -> str:
    return table(("version", ""), [("python", platform.python_version()), *versions().items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    clean = [[re.sub(r"[|\n]", " ", cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *clean))
