"""The results as JSON, as a page, and as totals."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tp_hf_config.reports import SCHEMA_VERSION, versions

DEFAULTS = '`HFConfigSyncHook(prune="inner")`, in one step: pruned, saved, loaded'
DIFFER = "layers differ: pruned, saved, loaded, of the pairs that run and have layers"
DROPPED = "a layer dropped: saved, loaded, of the same pairs"
FAILED = "layers that differ or went, and failed (silently wrong)"
KINDS = ("feed-forward", "hidden", "heads", "other")
_SIGNS = {"works": "yes", "refused": "refused", "failed": "FAILED", "mixed": "some"}
_NOT_BUILT = ("class", "build")
_NOT_RUN = (*_NOT_BUILT, "learn", "run")
_NO_END = "no end"
_HOW = """\
The widths of a pair get 170 seconds of processor time (`--seconds`), its layers as many more. A
pair that does not end in them is measured once more with 600 (`--longer`): it still counts as one
that did not end, and its row has what was done by then, or says how long it takes. How long it
takes to learn a class, and to prove one field besides, is measured by itself (`--learning`), on the
full-size default config. A run measures only rows that another state of the code made; it may be
stopped at any time (`--minutes 60`), and the next one goes on. If the rows come from several states
of the code, the line with the date says from how many. "Silently wrong" counts every width whose
outputs are not those of the masked original or of the loaded model, from 1e-9 on. The same
comparison is part of the proof, with other random weights: what would fail it is refused."""
_QUICK = 2
"""Seconds in which nobody waits for long."""
_CLASSES = re.compile(r"\b[A-Z]\w*[a-z][A-Z]\w*")

Result = dict[str, Any]


def kind_of(field: str) -> str:
    """What a config field counts, by its name: for the table's columns, and for nothing else."""
    key = re.sub(r"\[\d+\]", "", field).rpartition(".")[2].lower()
    if re.search(r"head_dim|head_size|d_kv|expert_num|num_.*expert|n_.*expert|labels|layers", key):
        return "other"
    if re.search(r"head|attn_num", key):
        return "heads"
    if re.search(r"intermediate|ffn|d_ff|n_inner|mlp|feed_?forward|dim_ff", key):
        return "feed-forward"
    if re.search(r"^(d_model|n_embd|dim|hidden_sizes?|embed_dims?|hidden_dim|emb_dim)$", key):
        return "hidden"
    return "other"


def outcome_of(result: Result, kind: str) -> str | None:
    """What the fields of one kind came to; ``None``: the class has none of them."""
    by_field: dict[str, set[str]] = {}
    for width in result["widths"]:
        for field in width["fields"]:
            if kind_of(field) == kind:
                by_field.setdefault(field, set()).add(width["outcome"])
    found = {
        next(one for one in ("failed", "works", "refused") if one in outcomes)
        for outcomes in by_field.values()
    }
    if "failed" in found:
        return "failed"
    return found.pop() if len(found) == 1 else "mixed" if found else None


def ran(result: Result) -> bool:
    """Whether a pair's tiny model ran."""
    return result["stage"] not in _NOT_RUN


def did_not_end(result: Result, seconds: float = math.inf) -> bool:
    """Whether a pair did not end, and had less than so much processor time."""
    late = str(result.get("why", "")).startswith(_NO_END)
    return late and (result.get("longer") or result.get("limit") or 0) < seconds


def is_late(result: Result) -> bool:
    """Whether a pair did not end within the time of the others."""
    return "longer" in result or did_not_end(result)


def a_field_of(result: Result) -> str | None:
    """A field that can be pruned alone, of a feed-forward layer if there is one."""
    fields = [
        width["fields"][0]
        for width in result["widths"]
        if width["outcome"] == "works" and len(width["fields"]) == 1
    ]
    return min(fields, key=lambda field: kind_of(field) != KINDS[0], default=None)


def dropped_of(layers: Result) -> str | None:
    """What dropping a layer of every list came to; ``None``: it did not come to that."""
    found = {one["outcome"] for one in layers.get("dropped", ())}
    if "failed" in found or len(found) < 2:
        return "failed" if "failed" in found else next(iter(found), None)
    return "mixed"


def with_layers(results: list[Result]) -> list[Result]:
    """What was measured of the layers of the pairs that run and have some."""
    return [r["layers"] for r in results if ran(r) and r.get("layers", {}).get("lists")]


def totals(results: list[Result], pairs: int) -> list[tuple[str, str]]:
    """The numbers that count, of so many pairs that there are."""
    built = [r for r in results if r["stage"] not in _NOT_BUILT]
    runs = [r for r in built if ran(r)]
    rows = [
        ("(task, model type) pairs", _of(len(results), pairs)),
        ("built", str(len(built))),
        ("run at tiny size", str(len(runs))),
    ]
    for kind in KINDS:
        found = [one for one in (outcome_of(r, kind) for r in runs) if one is not None]
        good = sum(one in ("works", "mixed") for one in found)
        every = f"; every such field: {sum(one == 'works' for one in found)}"
        rows.append((f"{kind}: pruned, saved, loaded", _share(good, len(found), every)))
    defaults = Counter(r["defaults"]["outcome"] for r in runs if "defaults" in r)
    if defaults:
        rows.append((DEFAULTS, f"{defaults['works']} of {defaults.total()}"))
    outcomes = Counter(width["outcome"] for r in runs for width in r["widths"])
    rows += _layer_totals(runs)
    unended = sum(map(is_late, built))
    rows += [
        ("pairs that did not end within their time", f"{unended}{_limits(results)}"),
        *_longer_total(built),
        *_time_totals(built),
        ("widths that work", str(outcomes["works"])),
        ("widths refused before anything was pruned", str(outcomes["refused"])),
        ("widths that failed", str(outcomes["failed"])),
        ("of those silently wrong", str(sum(map(silent, widths_of(runs))))),
    ]
    return rows


def _longer_total(built: list[Result]) -> list[tuple[str, str]]:
    """How many of these ended with more time, where they had it."""
    longer = [r for r in built if "longer" in r]
    if not longer:
        return []
    ended = sum(r["stage"] == "done" for r in longer)
    seconds = " or ".join(map(str, sorted({r["longer"] for r in longer})))
    return [(f"of those, measured again with {seconds} s, and ended", f"{ended} of {len(longer)}")]


def _time_totals(built: list[Result]) -> list[tuple[str, str]]:
    """How many pairs are learned quickly, and with one field proved, where that was measured."""
    said = {"learn_seconds": "learned", "field_seconds": "learned, and one field proved,"}
    measured = {key: [r[key] for r in built if key in r] for key in said}
    return [
        (f"{said[key]} within {_QUICK} s", _share(sum(s <= _QUICK for s in seconds), len(seconds)))
        for key, seconds in measured.items()
        if seconds
    ]


def _limits(results: list[Result]) -> str:
    """The time that the process of a pair had at most, where its row says so."""
    limits = sorted({result["limit"] for result in results if "limit" in result})
    seconds = " or ".join(map(str, limits))
    return f" ({seconds} s of processor time each)" if limits else ""


def _layer_totals(runs: list[Result]) -> list[tuple[str, str]]:
    """The totals of layers, once they were measured."""
    layers = with_layers(runs)
    if not layers:
        return []
    differ = sum(one.get("differ", {}).get("outcome") == "works" for one in layers)
    dropped = Counter(map(dropped_of, layers))
    good = dropped["works"] + dropped["mixed"]
    every = f"; of every list: {dropped['works']}"
    unobserved = sum("unobserved" in one for layer in layers for one in layer.get("dropped", ()))
    if unobserved:
        every += f"; in {unobserved} lists no output depends on the layer"
    failed = [one for r in runs for _, one in layers_of(r) if one["outcome"] == "failed"]
    measured = sum("lists" in r.get("layers", {}) for r in runs)
    rows = [
        (DIFFER, _share(differ, len(layers))),
        (DROPPED, _share(good, len(layers), every)),
        (FAILED, f"{len(failed)} ({sum(map(silent, failed))})"),
    ]
    if measured < len(runs):
        rows.append(("pairs that run whose layers were looked at", f"{measured} of {len(runs)}"))
    return rows


def _share(good: int, whole: int, more: str = "") -> str:
    return f"{good} of {whole}" + (f" ({100 * good / whole:.1f} %{more})" if whole else "")


def stored_rows(seed: int, root: Path) -> dict[str, Result]:
    """The rows of the table that is there, by pair; none if it is of other versions or seeds."""
    path = root / "docs" / "support.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    if (table.get("versions"), table.get("seed")) != (versions(), seed):
        return {}
    return {f"{row['task']}.{row['type']}": row for row in table["pairs"]}


def _of(measured: int, pairs: int) -> str:
    return str(pairs) if measured == pairs else f"{measured} measured, of {pairs} that there are"


def widths_of(results: list[Result]) -> list[Result]:
    """All widths of all classes."""
    return [width for result in results for width in result["widths"]]


def tried_of(result: Result) -> Iterator[tuple[str, Result]]:
    """Everything that was tried with a class, by what it is called."""
    for width in result["widths"]:
        yield " + ".join(width["fields"]), width
    yield from layers_of(result)


def layers_of(result: Result) -> Iterator[tuple[str, Result]]:
    """What was tried with the layers of a class, by what it is called."""
    layers = result.get("layers", {})
    for dropped in layers.get("dropped", ()):
        yield "a layer dropped", dropped
    if "differ" in layers:
        yield "layers differ", layers["differ"]


def silent(width: Result) -> bool:
    """Whether a failure came without an error: the model was pruned and saved, and is wrong."""
    wrong = ("off the original", "other outputs", "holds other", "holds values", "holds channels")
    return width["outcome"] == "failed" and any(words in width["why"] for words in wrong)


def write(results: list[Result], pairs: int, seed: int, root: Path | None) -> None:
    """Print the totals; with ``root``, write the page and the JSON too."""
    rows = totals(results, pairs)
    shown = Table(show_header=False)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    for result in results:
        for name, tried in tried_of(result):
            if tried["outcome"] == "failed":
                print(f"{result['task']} {result['type']}: {name}")
                print(f"    {tried['why']}")
    if root is None:
        return
    head = {
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "codes": len({result.get("code") for result in results}),
        "totals": dict(rows),
    }
    folder = root / "docs"
    folder.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in results)
    text = json.dumps(head, indent=1)[:-2] + f',\n "pairs": [\n{lines}\n]\n}}\n'
    (folder / "support.json").write_text(text)
    (folder / "support.md").write_text(page(results, head, rows))


def page(results: list[Result], head: dict[str, Any], rows: list[tuple[str, str]]) -> str:
    """``docs/support.md``."""
    columns: tuple[str, ...] = ("task", "model type", "class", *KINDS[:3], "defaults")
    columns += ("layers differ", "a layer dropped", "other widths that go", "or why not")
    lines = [columns, *map(_line, results)]
    if not any("layers" in result for result in results):  # written before they were measured
        lines = [(*line[:7], *line[9:]) for line in lines]
    if not any("defaults" in result for result in results):
        lines = [(*line[:6], *line[7:]) for line in lines]
    return "\n".join(
        [
            "# What can be pruned, saved and loaded again",
            "",
            f"Measured by `make support`: {_dated(head)}. Every width of every class goes by half,",
            "in one step and in two, at tiny size with random weights. *yes*: the pruned model",
            "computes what the original does with the removed units masked, and a fresh process",
            "loads it with the same bits. *refused*: an error before anything is pruned or",
            "written. *some*: some of several fields go. *defaults*: by half in one step with",
            '`HFConfigSyncHook(prune="inner")`. *layers differ*: the same comparison after',
            "ranking all layers together, or after keeping the first of them whole, with",
            "`per_layer=True`. *a layer dropped*: one layer of every list gone by `drop_layers`;",
            "the model computes what it did with that layer passing on what it is given. Classes",
            "without layers have no entry. The reasons, field by field, are in",
            "[support.json](support.json).",
            "",
            _markdown([("", ""), *rows]),
            "",
            _HOW,
            "",
            "## Why widths are refused or fail",
            "",
            _markdown([("times", "reason"), *reasons(results)]),
            "",
            *_layer_reasons(results),
            "## The slowest to learn",
            "",
            _markdown([("task", "model type", "seconds"), *slowest(results)]),
            "",
            "## Every pair",
            "",
            _markdown(lines),
            "",
        ]
    )


def slowest(results: list[Result]) -> list[tuple[str, str, str]]:
    """The ten pairs whose config takes longest to learn, at full size."""
    learned = sorted(
        (r for r in results if "learn_seconds" in r), key=lambda r: -float(r["learn_seconds"])
    )
    return [(r["task"], f"`{r['type']}`", f"{r['learn_seconds']:.1f}") for r in learned[:10]]


def reasons(results: list[Result]) -> list[tuple[str, str]]:
    """How often each reason was given, names of layers and numbers left out."""
    counts = Counter(
        f"{width['outcome']}: {_plain(width['why'])}"
        for width in widths_of(results)
        if width["outcome"] != "works"
    )
    counts.update(
        f"not {'built' if r['stage'] in _NOT_BUILT else 'run'}: {_plain(r['why'])}"
        for r in results
        if r["stage"] in _NOT_RUN
    )
    return [(str(count), _cell(reason)) for reason, count in counts.most_common(60)]


def _layer_reasons(results: list[Result]) -> list[str]:
    """The part of the page on why layers cannot differ, or go."""
    counts = Counter(
        (name, f"{one['outcome']}: {_plain(_CLASSES.sub('...', one['why']))}")
        for result in results
        for name, one in layers_of(result)
        if one["outcome"] != "works"
    )
    rows = [(name, str(count), _cell(why)) for (name, why), count in counts.most_common(40)]
    head = ["## Why layers cannot differ or go", ""]
    return (
        [*head, _markdown([("column", "times", "reason"), *rows]), ""]
        if with_layers(results)
        else []
    )


def _plain(text: str) -> str:
    text = re.sub(r"[\w*]+(\.[\w*]+)+(, [\w*]+(\.[\w*]+)+)*( and \d+ more)?", "...", text)
    return re.sub(r"\d+", "#", text)[:160]


def _line(result: Result) -> tuple[str, ...]:
    named = (result["task"], f"`{result['type']}`", f"`{result['class']}`")
    if not ran(result):
        word = "built" if result["stage"] in _NOT_BUILT else "run"
        return (*named, *[""] * 7, f"not {word}: {_cell(result['why'])}")
    found = (outcome_of(result, kind) for kind in KINDS[:3])
    others = {
        f"`{field}`"
        for width in result["widths"]
        for field in width["fields"]
        if width["outcome"] == "works" and kind_of(field) == "other"
    }
    notes = ("text alone" if result.get("partial") else "", _needed(result))
    signs = ("" if one is None else _SIGNS[one] for one in found)
    why = result["why"] if result["stage"] != "done" else ", ".join(filter(None, notes))
    defaults = _SIGNS[result["defaults"]["outcome"]] if "defaults" in result else ""
    layers = result.get("layers", {})
    both = (layers.get("differ", {}).get("outcome"), dropped_of(layers))
    columns = (defaults, *("" if one is None else _SIGNS[one] for one in both))
    return (*named, *signs, *columns, ", ".join(sorted(others)), _cell(why))


def _needed(result: Result) -> str:
    """How much processor time a pair took that did not end within that of the others."""
    seconds = result.get("processor_seconds")
    return f"takes {seconds} s" if "longer" in result and seconds is not None else ""


def _cell(text: str) -> str:
    """Somebody's words as one cell, cut, in which nothing is taken for Markdown or HTML."""
    text = " ".join(text.split())[:160].replace("|", "/").replace("<", "&lt;")
    return re.sub(r"[][_*`]", r"\\\g<0>", text)


def _dated(head: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {number}" for name, number in head["versions"].items())
    states = head.get("codes", 1)
    code = "" if states == 1 else f", rows of {states} or more states of the code"
    return f"{head['date']}, {named}, seed {head['seed']}{code}"


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)
