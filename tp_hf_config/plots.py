"""Plots of reports and allocations, by matplotlib's object interface: no window or global state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEFORE, _AFTER = "#c7d3df", "#1f5a91"
_COLOURS = (_AFTER, "#c0603a", "#5b8c5a", "#7d5ba6")
_ROW = 0.28  # height of a row in inches


def plot_widths(reports: Sequence[Any], path: str | PathLike[str]) -> Figure:
    """Draw widths before the first report and after the last, and each weight's refit error."""
    _check_any(reports)
    changes = field_changes(reports)
    refits = [r.refits for r in reports if r.refits and r.refits.layers]
    heights = [max(len(changes), 2), *[8] * bool(refits)]
    figure = _figure((9, _ROW * sum(heights) + 2))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _bars(axes[0], changes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    if refits:  # of the last report that has some
        for name, colour in (("cut", _BEFORE), ("refit", _AFTER)):
            errors = [getattr(layer, name) for layer in refits[-1].layers]
            axes[1].plot(errors, ".", c=colour, label=name)
        axes[1].set_yscale("log")
        axes[1].set_title("error of each refitted weight's output on held-out data", loc="left")
        axes[1].set_xlabel("weights, in the model's order")
        axes[1].legend()
    figure.savefig(path)
    return figure


def plot_history(
    reports: Sequence[Any],
    path: str | PathLike[str],
    metrics: Mapping[str, Sequence[float]] | None = None,  # a value per report, or one more first
) -> Figure:
    """Draw the number of parameters after each report, and metrics below it."""
    _check_any(reports)
    steps = len(reports)
    series: dict[str, list[float]] = {
        "parameters": [reports[0].parameters[0], *(r.parameters[1] for r in reports)],
        **{name: list(values) for name, values in (metrics or {}).items()},
    }
    for name, values in series.items():
        if len(values) not in (steps, steps + 1):
            raise ValueError(
                f"{name} has {len(values)} values for {steps} pruning steps: expected {steps}, one "
                f"for each step, or {steps + 1}, the first for the unpruned model"
            )
    figure = _figure((7, 2.2 * len(series) + 0.6))
    axes = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, series.items(), strict=True):
        ax.plot(range(steps + 1 - len(values), steps + 1), values, "o-", c=_AFTER)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.1 * max(series["parameters"]) or 1)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[-1].set_xlabel("pruning steps")
    axes[-1].set_xticks(range(steps + 1))
    figure.savefig(path)
    return figure


def plot_allocation(
    curves: Mapping[str, Sequence[Any]],  # field -> measurements of each layer
    left: Mapping[str, int],  # each layer's own field -> final width
    measure: str,  # what is measured
    path: str | PathLike[str],
) -> Figure:
    """Draw widths by layer above, and changes of the model's output by layer below."""
    figure = _figure((8, 5))
    above, below = figure.subplots(2, 1, sharex=True)
    for (name, own), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
        layers = range(len(own))
        above.step(layers, [c.units for c in own], where="mid", c=colour, ls=":", alpha=0.6)
        above.step(layers, [left[c.field] for c in own], where="mid", c=colour, label=name)
        for share in sorted(own[0].changes):
            changes, alpha = [c.changes[share] for c in own], 0.3 + 0.6 * share
            below.plot(layers, changes, ".-", c=colour, alpha=alpha, label=f"{share:.0%}")
    above.set_ylabel("width (dotted: before)")
    above.set_ylim(bottom=0)
    above.legend()
    below.set_yscale("log")
    below.set_ylabel(f"{measure}, if only this layer is pruned")
    below.set_xlabel("layer")
    below.legend(title="share pruned", ncols=3)
    figure.savefig(path)
    return figure


def field_changes(reports: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Return config field -> its value before the first report and after the last."""
    changes: dict[str, tuple[int, int]] = {}
    for report in reports:
        for name, (before, after) in _numbers(report.fields):
            changes[name] = changes.get(name, (before,))[0], after
    return changes


def _numbers(fields: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the integers in the fields' values; unset values have no width to draw."""
    for name, (old, new) in fields.items():
        if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
            entries = zip(old, new, strict=False)
            yield from _numbers({f"{name}[{n}]": both for n, both in enumerate(entries)})
        elif type(old) is int and type(new) is int:
            yield name, (old, new)


def _bars(ax: Axes, changes: Mapping[str, tuple[int, int]]) -> None:
    rows, both = range(len(changes)), changes.values()
    wide = ax.barh(rows, [before for before, _ in both], color=_BEFORE, label="before")
    ax.barh(rows, [after for _, after in both], color=_AFTER, height=0.45, label="after")
    ax.bar_label(wide, [f"{a:,} \N{RIGHTWARDS ARROW} {b:,}" for a, b in both], padding=4)
    ax.set_yticks(rows, [*changes])
    ax.set_ylim(max(len(changes), 1) - 0.5, -0.5)  # the first row at the top
    ax.margins(x=0.25)
    ax.set_title("config fields" if changes else "config fields: nothing changed", loc="left")
    ax.set_xlabel("width")


def _figure(size: tuple[float, float]) -> Figure:  # width, height in inches
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'tp-hf-config[plot]'") from error
    return Figure(figsize=size, layout="constrained", dpi=120)


def _check_any(reports: Sequence[Any]) -> None:
    if not reports:
        raise ValueError(
            "there is nothing to plot: the hook has no report yet. Call pruner.step() first"
        )
