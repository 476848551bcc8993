"""What a hunt came to, in figures."""

from __future__ import annotations

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from hunting import has_run

from tp_hf_config.reports import versions

BEGIN, END = "<!-- hunt:begin -->", "<!-- hunt:end -->"
OUTCOMES = {
    "works": "worked: as the masked original, and loaded again the same bits",
    "refused": "refused before anything was cut",
    "nothing": "nothing to cut at the ratio drawn",
    "crashed": "ended in another error before anything was cut",
    "failed": "ended in an error after the cut",
    "wrong": "silently wrong",
    "not run": "did not end in their time",
}

Row = dict[str, Any]


def totals(rows: list[Row]) -> list[tuple[str, str]]:
    """The numbers that count."""
    ran = [row for row in rows if has_run(row)]
    outcomes = Counter(mode["outcome"] for row in ran for mode in row["modes"])
    options = sum(len(row.get("changed", ())) for row in ran)
    return [
        ("random configs", str(len(ran))),
        ("model types", str(len({row["type"] for row in ran}))),
        ("options drawn in each, on average", f"{options / max(1, len(ran)):.1f}"),
        ("versions of the code they ran with", str(len({row["code"] for row in ran}))),
        ("with layers dropped, and with layers that differ", str(sum(map(_layered, ran)))),
        ("prunings", str(sum(outcomes.values()))),
        *((words, str(outcomes[key])) for key, words in OUTCOMES.items()),
    ]


def _layered(row: Row) -> bool:
    return bool(row.get("layered"))


def listed(rows: list[Row], outcomes: tuple[str, ...]) -> list[str]:
    """A line for every pruning that came to one of these."""
    return [
        f"{row['task']} {row['type']} {row['number']}: {mode['mode']}: {mode['outcome']}: "
        f"{mode['why']}"
        for row in rows
        for mode in row["modes"]
        if mode["outcome"] in outcomes
    ]


def write(rows: list[Row], seed: int, document: Path) -> None:
    """Put the figures between their markers in a page.

    Raises:
        ValueError: it has none.
    """
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no {BEGIN} ... {END}")
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    head = ("measured", f"{datetime.date.today().isoformat()}, {named}, seed {seed}")
    lines = [head, ("---", "---"), *totals(rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    document.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
