"""Which ways of pruning attention heads work for which classes, tried on tiny models.

    python benchmarks/head_modes.py [--write]

Every mode of every class in the list is carried out: half of the heads (or of every head's
dimensions) go, and the config has to follow.  A cell names the config fields that moved.  The table
is printed as Markdown; ``--write`` puts it between the marks in docs/recipes/heads.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch_pruning as tp
import transformers

from tp_hf_config import HFConfigSyncHook, UnsupportedModelError
from tp_hf_config.fieldmap.model_view import view_of
from tp_hf_config.planning.settings import Gqa

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

import head_zoo  # noqa: E402
import zoo  # noqa: E402

BEGIN, END = "<!-- heads:begin -->", "<!-- heads:end -->"
COLUMNS = (
    "model class",
    "query heads (hidden size stays)",
    "whole key/value groups",
    "whole heads with hidden size",
    "head dims",
    "or why not",
)
GROUPED, PLAIN = head_zoo.Shape(8, 2), head_zoo.Shape(8)


class Row(NamedTuple):
    """What is tried: a class, what is said of its config, and how to build it tiny."""

    note: str
    build: Callable[[], Any]


def _of_heads(name: str, shape: head_zoo.Shape, note: str = "") -> Row:
    return Row(note, lambda: head_zoo.build(name, shape))


def _of_zoo(name: str) -> Row:
    return Row("", lambda: zoo.build(name))


ROWS = [
    *(
        _of_heads(name, GROUPED)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2")
    ),
    *(_of_zoo(name) for name in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")),
    _of_heads("falcon_new", GROUPED, "new decoder architecture"),
    _of_heads("falcon_multi_query", PLAIN, "multi-query"),
    _of_heads("falcon_alibi", PLAIN, "ALiBi"),
    *(
        _of_heads(name, PLAIN)
        for name in ("bloom", "gpt_neox", "gpt2", "opt", "bert", "t5", "whisper", "vit")
    ),
    *(_of_zoo(name) for name in ("modernbert", "deberta_v2", "bart", "clip", "swin", "wav2vec2")),
]


class Tried(NamedTuple):
    """The config fields that one mode moved and the report's words for it, or why it did not."""

    fields: tuple[str, ...] = ()
    how: str = ""
    reason: str = ""


def tried(
    model: Any, prune: tuple[str, ...] = (), gqa: Gqa | None = None, head_dims: bool = False
) -> Tried:
    """Prune a copy one way, half of everything."""
    model = copy.deepcopy(model)
    hook = HFConfigSyncHook(prune=prune, gqa=gqa, strict=True)
    # As in Torch-Pruning, head dims are pruned where the pruner knows the layers of the heads.
    split = {module: count for _, module, count in view_of(model).head_layers()}
    if head_dims and not split:
        return Tried()
    try:
        pruner = tp.pruner.MetaPruner(
            model,
            example_inputs=None,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5 if gqa is None else 0.0,
            head_pruning_ratio=0.0 if gqa is None else 0.5,
            num_heads=split if head_dims else None,
            hooks=[hook],
        )
    except UnsupportedModelError as error:
        return Tried(reason=_short(str(error)))
    pruner.step()
    (report,) = hook.reports
    moved = tuple(name for name, (old, new) in report.fields.items() if old is not None)
    unset = tuple(report.fields)  # a field that had to be said for the first time
    return Tried(moved or unset, report.graph.partition("heads: ")[2])


def _short(message: str) -> str:
    """The first reason of a refusal."""
    reason = message.partition(" cannot prune ")[2].partition(". Widths that can")[0] or message
    reason = reason.removeprefix("attention heads: ").partition("; ")[0].partition(", ")[0]
    return re.sub(r"[\w.*]+\.(\w+\.\w+)", r"\1", reason)  # of a parameter's name, its end


def head_dims(model: Any) -> str:
    """The fields that say how wide a head is; two in one dimension go one after the other."""
    together = tried(model, head_dims=True)
    rivals = re.match(r"\w+: (\w+) and (\w+) both set dimension", together.reason)
    fields = rivals.groups() if rivals else ()
    alone = [tried(model, prune=(field,)).fields for field in fields]
    return " or ".join(map(_code, alone)) if all(alone) and alone else _code(together.fields)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    model = row.build()
    query, group = (tried(model, gqa=gqa) for gqa in get_args(Gqa))
    found = {"alone": "", "groups": "", "hidden": ""}
    for one in (query, group):
        if not one.fields:
            continue
        if " with them" in one.how:
            found["hidden"] = _code(one.fields)
        elif one.how.startswith("whole key/value groups"):
            found["groups"] = _code(one.fields)
        else:
            found["alone"] = _code(one.fields)
    name = f"`{type(model).__name__}`" + (f", {row.note}" if row.note else "")
    why = "" if any(found.values()) else query.reason
    return [name, *found.values(), head_dims(model), why]


def _code(fields: tuple[str, ...]) -> str:
    return ", ".join(f"`{field}`" for field in fields)


def table() -> str:
    """All lines, as Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(row) for row in ROWS)]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)


def between_marks(text: str) -> str:
    """What stands between the marks."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the page, between its marks")
    arguments = parser.parse_args()
    os.environ["TP_HF_CONFIG_CACHE"] = "off"  # everything is measured anew
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    made = table()
    print(made)
    if arguments.write:
        document = ROOT / "docs" / "recipes" / "heads.md"
        text = document.read_text()
        before, _, rest = text.partition(BEGIN)
        document.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
