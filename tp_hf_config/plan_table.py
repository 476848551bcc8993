"""A plan as plain text, as a rich table and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import notebook
from .reference import field_name

if TYPE_CHECKING:
    from .course import Adjusted
    from .plans import Plan, PlannedRefusal, PlannedWidth

_SIZES = ("", "now", "planned", "left")
_HEAD = ("config field", "now", "planned", "ratio", "can be", "multiple of", "ranks")


def described(values: Sequence[int]) -> str:
    """Some values in few words: ``every 64th from 64 to 8192``, ``3, 6, 9``."""
    if isinstance(values, range) and len(values) > 4:
        step = values.step
        if step == 1:
            return f"{values[0]:,} to {values[-1]:,}"
        return f"every {_ordinal(step)} from {values[0]:,} to {values[-1]:,}"
    return ", ".join(f"{value:,}" for value in values)


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ending}"


def refusal_lines(refusal: PlannedRefusal) -> list[str]:
    """What is refused, in the class's own words, and what it takes instead."""
    values = ", ".join(f"{name} {value}" for name, value in refusal.values.items())
    lines = [f"refused at step {refusal.step} ({values}): {refusal.reason.rstrip('.')}."]
    for ratios, leads_to in refusal.nearest:
        settings = ", ".join(f'"{name}": {ratio:g}' for name, ratio in ratios.items())
        values = ", ".join(f"{name} {value}" for name, value in leads_to.items())
        lines.append(f"  taken: ratios={{{settings}}} ({values})")
    if not refusal.nearest:
        lines.append("  no settings near them are taken: change one ratio at a time")
    return lines


def adjusted_line(adjusted: Adjusted) -> str:
    """What is asked for, why it is not done, and what is."""
    asked = ", ".join(f"{field_name(path)} {value:.4g}" for path, value in adjusted.asked.items())
    taken = ", ".join(f"{field_name(path)} {value}" for path, value in adjusted.taken.items())
    reason = f" ({adjusted.reason.rstrip('.')})" if adjusted.reason else ""
    return f"step {adjusted.step}: the ratios ask for {asked}{reason}; nearest legal: {taken}"


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row for each width."""
    return [_row(width) for width in plan.widths]


def _row(width: PlannedWidth) -> tuple[str, ...]:
    ways = [" -> ".join(f"{step[name]:,}" for step in width.steps) for name in width.before]
    return (
        width.name,
        " + ".join(f"{value:,}" for value in width.before.values()),
        " + ".join(ways),
        f"{width.reached:.3f} of {width.asked:g}",
        described(width.reachable),
        ", ".join(map(str, width.multiples)) or "-",
        ", ".join(map(str, width.ranks)) or "-",
    )


def size_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Parameters, bytes and FLOPs: what, now, planned, the share that is left."""
    per = "FLOPs a token" if plan.tokens else "FLOPs an input"
    names = {"parameters": "parameters", "bytes": "bytes", "flops": per}
    after = plan.after
    result: list[tuple[str, ...]] = []
    for key, name in names.items():
        old, new = getattr(plan.before, key), getattr(after, key, None)
        share = f"{new / old:.1%}" if old and new is not None else ""
        result.append((name, *("?" if n is None else f"{n:,}" for n in (old, new)), share))
    return result


def footnotes(plan: Plan) -> list[str]:
    """Lines under the table."""
    lines = [] if plan.refusal is None else refusal_lines(plan.refusal)
    if plan.target is not None and plan.after is not None:
        lines.append(
            f"target of {plan.target:,} parameters: {plan.after.parameters:,} at one ratio of "
            f"{plan.settings.pruning_ratio:g}"
            + "".join(f", {name} {ratio:g}" for name, ratio in plan.settings.ratios.items())
            + ("" if plan.why_not_exactly is None else f"; {plan.why_not_exactly}")
        )
    lines += plan.adjusted
    lines += [f"stays: {name}: {reason}" for name, reason in plan.kept.items()]
    return lines + [f"note: {note}" for note in plan.notes]


def text(plan: Plan) -> str:
    """The plan in plain lines."""
    table = [_HEAD, *rows(plan)]
    sizes = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
    lines = [plan.model]
    lines += [
        "  ".join(c.ljust(n) for c, n in zip(row, sizes, strict=True)).rstrip() for row in table
    ]
    for name, old, new, share in size_rows(plan):
        lines.append(f"{name}: {old} -> {new}" + (f" ({share})" if share else ""))
    return "\n".join([*lines, *footnotes(plan)])


def table(plan: Plan) -> Any:
    """The plan for rich to print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    widths = Table(title=plan.model)
    for name in _HEAD:
        widths.add_column(name, justify="left" if name in ("config field", "can be") else "right")
    for row in rows(plan):
        widths.add_row(*map(Text, row))
    sizes = Table(*_SIZES)
    for size in size_rows(plan):
        sizes.add_row(*size)
    return Group(widths, sizes, *map(Text, footnotes(plan)))


def html(plan: Plan) -> str:
    """The plan for a notebook."""
    widths = notebook.table(_HEAD, rows(plan))
    sizes = notebook.table(_SIZES, size_rows(plan))
    return notebook.page(plan.model, widths, sizes, notebook.lines(footnotes(plan)))
