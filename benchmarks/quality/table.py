"""The rows as tables on the terminal, as a page, and as JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jobs import Job, Row, Scale, source
from picture import draw_perplexity, draw_widths
from rich.console import Console
from rich.table import Table

from tp_hf_config.reports import SCHEMA_VERSION, versions

TEXTS = ("reference", "second")
OTHER_TEXTS = ("prose", "mathematics")
_ORDER = (
    *("random", "magnitude", "taylor", "hessian"),
    *("wanda", "activation", "curvature"),
)
_LABELS = {
    "random": "random",
    "magnitude": "group magnitude (Torch-Pruning)",
    "taylor": "group Taylor (Torch-Pruning)",
    "hessian": "group Hessian (Torch-Pruning)",
    "dropped": "layers dropped, not refitted",
    "refitted": "layers dropped, refitted",
    "reference": "the reference, its training part",
    "shipped": "the shipped text",
    "own": "the model's own writing",
    "chat": "its own, through the chat template",
}
_BOTH_TEXTS = (
    "reference: cut only",
    "cut and refitted",
    "code: cut only",
    "cut and refitted",
)
_KL = "KL: cut, refitted (estimated), after"


@dataclass(frozen=True)
class Sheet:
    """A table, on the terminal and on the page."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]


def merged(rows: list[Row], jobs: list[Job], scale: Scale, root: Path) -> list[Row]:
    """The rows, and those of the table that is there where nothing newer was measured.

    A machine that measured only some parts takes nothing away from the others.
    """
    path = root / "docs" / "quality.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    same = table.get("versions") == versions() and table.get("seed") == scale.seed
    found = {_key(row): row for row in [*(table["rows"] if same else ()), *rows]}
    keys = [(job.part, job.subject, job.variant) for job in jobs]
    return [found[key] for key in keys if key in found]


def _key(row: Row) -> tuple[str, str, str]:
    return row["part"], row["subject"], row["variant"]


def write(rows: list[Row], jobs: list[Job], scale: Scale, root: Path | None) -> None:
    """Print the tables; with ``root``, write the page and the JSON too."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log is not as narrow as what Rich takes it for
    for sheet in sheets(rows):
        shown = Table(*sheet.header, title=sheet.title, title_justify="left")
        for line in sheet.lines:
            shown.add_row(*line)
        console.print(shown)
    for row in rows:
        if "why" in row:
            console.print(f"{'-'.join(_key(row))}: {row['why']}", markup=False)
    print(f"{len(rows)} of {len(jobs)} rows are measured")
    if root is None:
        return
    head = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "date": max((row["date"] for row in rows), default=datetime.date.today().isoformat()),
        "seed": scale.seed,
        "source": source(),
        "rows_of_all": [len(rows), len(jobs)],
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]\n}}\n'
    (root / "docs" / "quality.json").write_text(text)
    (root / "docs" / "quality.md").write_text(page(rows, head, scale))
    draw_widths(rows, root / "docs" / "widths-by-layer.png")
    draw_perplexity(rows, root / "docs" / "perplexity-by-size.svg")


def page(rows: list[Row], head: dict[str, Any], scale: Scale) -> str:
    """``docs/quality.md``."""
    named = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    measured, wanted = head["rows_of_all"]
    threads = sorted({row["threads"] for row in rows})
    lines = [
        "# Quality without training",
        "",
        "The cost of pruning with each importance, with and without refits. No model is trained.",
        f"Measured by `make quality`: {head['date']}, {named}, seed {scale.seed},",
        f"on a CPU (threads: {' or '.join(map(str, threads))}); {measured} of {wanted} rows.",
        "[quality.json](quality.json) has everything, row by row.",
        "",
        "- *Cut only*: channels are removed.",
        "- *Cut and refitted*: before the cut, the weights that read these channels are refitted",
        "  in closed form, whichever importance chose the channels:",
        "  `HFConfigSyncHook(refit=calibrate(model, ...))`.",
        *_about_measures(scale),
        "",
    ]
    other = sum(row["source"] != head["source"] for row in rows)
    if other:
        lines += [
            f"{other} rows were measured with another state of the package's code than now"
            " (`source` in the JSON); `--again` measures them again.",
            "",
        ]
    lines += _about_texts(rows)
    for sheet in sheets(rows):
        lines += [f"## {sheet.title}", "", _markdown([sheet.header, *sheet.lines]), ""]
    failed = [row for row in rows if "why" in row]
    if failed:
        lines += ["## What did not run", ""]
        lines += [_markdown([("row", "why"), *((_name(row), _cell(row["why"])) for row in failed)])]
        lines += [""]
    return "\n".join(lines)


def _about_measures(scale: Scale) -> list[str]:
    return [
        "- *Perplexity*: lower is better.",
        "- *Rank correlation*, for the embedder: of the similarities of sentences with those of",
        "  the original model. Higher is better.",
        "- *KL*: how far the distribution of the next token is from that of the original model,",
        "  on held-out windows of the calibration text: estimated for the cut only and with",
        "  refits, then measured after the cut.",
        "- `curvature` ranks channels that are read through norms as `activation` does.",
        f"- Taylor and Hessian see {scale.gradients} windows. Torch-Pruning's Hessian gets the",
        "  mean of squared gradients at once; sample by sample it keeps only the last one.",
    ]


def _about_texts(rows: list[Row]) -> list[str]:
    lines = [
        "Models are evaluated on two texts. The first, *reference*, is windows of the Python",
        "reference that no calibration text contains. The second, *code*, is half source code of",
        "the standard library and half licences of installed packages. Some rows have two more:",
        "*prose*, passages that ship with the package and that it never calibrates on, and",
        "*mathematics*, docstrings of sympy and networkx.",
        "",
    ]
    unpruned = next((r for r in rows if r["subject"] == "unpruned" and "why" not in r), None)
    if unpruned is not None:
        ref, second = (f"{unpruned['tokens'][text]:,}" for text in TEXTS)
        most = max(share for by in unpruned["shared"].values() for share in by.values())
        lines += [
            f"They have {ref} and {second} tokens. Of their runs of 13 tokens, at most",
            f"{100 * most:.1f} % are in the reference's training part or in the shipped text.",
            "",
        ]
    return lines


def sheets(rows: list[Row]) -> list[Sheet]:
    """All tables that there are rows for."""
    good = [row for row in rows if "why" not in row]
    parts = {part: [row for row in good if row["part"] == part] for part in _PARTS}
    return [sheet for part, make in _PARTS.items() for sheet in make(parts[part], good)]


def _smollm2(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    return _importances("SmolLM2-135M", rows)


def _gemma3(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    dropped = [row for row in rows if "layers" in row]
    yield from _importances("Gemma 3 270M", [row for row in rows if row not in dropped])
    if dropped:
        title = f"Gemma 3 270M, layers {', '.join(map(str, dropped[0]['layers']))} dropped"
        lines = [(_label(row), *_plain(row, "refitted")) for row in dropped]
        yield Sheet(title, ("what", "reference", "code and licences"), lines)


def _importances(model: str, rows: list[Row]) -> Iterable[Sheet]:
    whole = [row for row in rows if row["subject"] == "unpruned"]
    for cut in _distinct(row["subject"] for row in rows if row not in whole):
        own = _ranked(row for row in rows if row["subject"] == cut)
        lines = [_unpruned(row) for row in whole]
        lines += [(*_compared(row, _perplexity), *_refits(row)) for row in own]
        title = f"{model}, {_widths(own[0])}"
        yield Sheet(title, ("importance", *_BOTH_TEXTS, "weights refitted", _KL), lines)


def _unpruned(row: Row) -> tuple[str, ...]:
    reference, second = (_perplexity(row["whole"][text]) for text in TEXTS)
    return "unpruned", reference, "", second, "", "", ""


def _refits(row: Row) -> tuple[str, str]:
    found = row["refits"]
    foretold = [found[key] for key in ("cut", "refit", "after") if found[key] is not None]
    return f"{found['used']} of {found['weights']}", ", ".join(f"{kl:.3f}" for kl in foretold)


def _text(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    if rows:
        title = f"Which text to calibrate on: SmolLM2-135M, {_widths(rows[0])}"
        lines = [
            (_LABELS[row["subject"]], f"{row['tokens']:,}", *_compared(row, _perplexity)[1:])
            for row in rows
        ]
        yield Sheet(title, ("text", "tokens", *_BOTH_TEXTS), lines)


def _layers(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    if not rows:
        return
    lines = []
    for row in rows:
        what = f"mean width {row['subject']}, {row['variant']}"
        if "layers" in row:
            way = "refitted" if row["variant"] == "refitted" else "not refitted"
            what = f"layers {', '.join(map(str, row['layers']))} dropped, {way}"
        lines.append((what, f"{row['parameters'] / 1e6:.2f} M", *_plain(row, "refitted")))
    title = "A width for each layer, dropped layers: SmolLM2-135M, feed-forward widths, refitted"
    yield Sheet(title, ("what", "parameters", "reference", "code and licences"), lines)


def _four_texts(_: list[Row], good: list[Row]) -> Iterable[Sheet]:
    """What refits change on each text, of all rows that were evaluated on four."""
    texts = (*TEXTS, *OTHER_TEXTS)
    lines: list[tuple[str, ...]] = []
    for row in good:
        cut, refitted = row.get("cut", {}), row.get("refitted", {})
        if all(text in cut and text in refitted for text in texts):
            cells = [f"{_perplexity(cut[t])} -> {_perplexity(refitted[t])}" for t in texts]
            worst = max(refitted[text] / cut[text] - 1 for text in texts)
            lines.append((_name(row), *cells, f"{worst:+.1%}"))
    if lines:
        header = ("row", "reference", "code and licences", *OTHER_TEXTS, "worst change")
        yield Sheet("Four texts: cut only -> cut and refitted", header, lines)


def _optipfair(rows: list[Row], good: list[Row]) -> Iterable[Sheet]:
    if not rows:
        return
    lines = [
        (f"OptiPFair, PPM, {row['variant']}", f"{row['parameters'] / 1e6:.1f} M", *_plain(row))
        for row in rows
    ]
    beside = [r for r in good if r["part"] == "smollm2" and r["subject"] == rows[0]["subject"]]
    for row in _ranked(r for r in beside if r["variant"] in ("magnitude", "activation")):
        size = f"{row['parameters'] / 1e6:.1f} M"
        lines.append((f"{_label(row)}, cut only", size, *_plain(row)))
        lines.append((f"{_label(row)}, cut and refitted", size, *_plain(row, "refitted")))
    title = f"Compared with OptiPFair: SmolLM2-135M, {_widths(rows[0])}"
    yield Sheet(title, ("what", "parameters", "reference", "code and licences"), lines)


def _plain(row: Row, way: str = "cut") -> tuple[str, ...]:
    return tuple(_perplexity(row[way][text]) for text in TEXTS)


def _minilm(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    for cut in _distinct(row["subject"] for row in rows):
        own = _ranked(row for row in rows if row["subject"] == cut)
        lines = [_compared(row, lambda value: f"{value:.3f}") for row in own]
        yield Sheet(f"all-MiniLM-L6-v2, {_widths(own[0])}", ("importance", *_BOTH_TEXTS), lines)


def _time(rows: list[Row], _: list[Row]) -> Iterable[Sheet]:
    for row in rows:
        forward, calibrating = row["forward_seconds"], row["calibrate_seconds"]
        ratios = [c / f for c, f in zip(calibrating, forward, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
        lines: list[tuple[str, ...]] = [
            ("tokens", f"{row['tokens']:,}", ""),
            ("forward passes alone", f"{min(forward):.1f} s", "1"),
            ("`calibrate`", f"{min(calibrating):.1f} s", f"{median(ratios):.2f} ({spread})"),
        ]
        for found in row["refits"].values():
            what = f"solving and trying refits, {_changes(found['widths'])}"
            share = f"{found['seconds'] / min(forward):.2f}"
            lines.append((what, f"{found['seconds']:.1f} s", share))
        size = row["gram_bytes"] / row["model_bytes"]
        lines.append(
            (
                "Gram matrices",
                f"{row['gram_bytes'] / 1e6:.0f} MB",
                f"{size:.2f} of the model",
            )
        )
        header = ("SmolLM2-135M", "best round", "in forward passes (median)")
        yield Sheet("Time and memory", header, lines)


_PARTS: dict[str, Callable[[list[Row], list[Row]], Iterable[Sheet]]] = {
    "smollm2": _smollm2,
    "text": _text,
    "layers": _layers,
    "optipfair": _optipfair,
    "gemma3": _gemma3,
    "minilm": _minilm,
    "four texts": _four_texts,
    "time": _time,
}


def _compared(row: Row, shown: Callable[[float], str]) -> tuple[str, ...]:
    values = (shown(row[way][text]) for text in TEXTS for way in ("cut", "refitted"))
    return _label(row), *values


def _label(row: Row) -> str:
    return _LABELS.get(row["variant"], f"`{row['variant']}`")


def _ranked(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _ORDER.index(row["variant"]))


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _widths(row: Row) -> str:
    return _changes(row["widths"])


def _changes(widths: dict[str, list[int]]) -> str:
    return ", ".join(f"{field} {before} -> {after}" for field, (before, after) in widths.items())


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _name(row: Row) -> str:
    return " ".join(filter(None, _key(row)))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)
