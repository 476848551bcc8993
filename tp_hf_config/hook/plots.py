"""Plots of reports: widths before and after, and the course of a run.

Drawn from reports alone, with matplotlib's object interface: no window, no global state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from ..planning.allocation_plot import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..calibration.compensation import Compensation
    from .history import PrunedGroup

_BEFORE, _AFTER = "#c7d3df", "#1f5a91"
_ROW = 0.28  # height of a row in inches


class _Drawn(Protocol):
    """The parts of a report that a plot reads."""

    @property
    def fields(self) -> Mapping[str, tuple[Any, Any]]: ...

    @property
    def groups(self) -> Sequence[PrunedGroup]: ...

    @property
    def parameters(self) -> tuple[int, int]: ...

    @property
    def compensation(self) -> Compensation | None: ...


@dataclass(frozen=True)
class Change:
    """One width before and after.

    Attributes:
        name: the config field, or the layer and its side.
        before: the old width.
        after: the new width.
        count: the number of layers with this name pattern and these widths.
    """

    name: str
    before: int
    after: int
    count: int = 1

    @property
    def label(self) -> str:
        """Return the name, with the number of layers if there are several."""
        return self.name if self.count == 1 else f"{self.name} (x{self.count})"


def field_changes(reports: Iterable[_Drawn]) -> list[Change]:
    """Return the changes of config fields from the first report to the last.

    A list gives one change per entry.
    """
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for report in reports:
        for name, (old, new) in report.fields.items():
            first.setdefault(name, old)
            last[name] = new
    return [Change(*width) for name in first for width in _numbers(name, first[name], last[name])]


def layer_changes(reports: Iterable[_Drawn]) -> list[Change]:
    """Return the changes of the layer sides that lost channels.

    Repeated layers with the same widths give one change.
    """
    widths: dict[str, tuple[int, int]] = {}
    for report in reports:
        for group in report.groups:
            for name, before, after in _sides(group):
                widths[name] = (widths.get(name, (before,))[0], after)
    alike: dict[tuple[str, int, int], int] = {}
    for name, (before, after) in widths.items():
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), before, after
        alike[key] = alike.get(key, 0) + 1
    return [Change(*key, count) for key, count in alike.items()]


def plot_widths(reports: Sequence[_Drawn], path: str | PathLike[str]) -> Figure:
    """Draw the widths of config fields and of layers, before the first report and after the last.

    Where weights were refitted, a panel more draws the error of each layer's output with and
    without, in the last report that has them.

    Args:
        reports: the reports of one run, in order.
        path: the file to write; its suffix sets the format, PNG without one.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no report.
    """
    _check_any(reports)
    panels = {"config fields": field_changes(reports), "layers": layer_changes(reports)}
    rows = [max(len(changes), 1) for changes in panels.values()]
    refits = [r.compensation for r in reports if r.compensation and r.compensation.layers]
    heights = [*rows, 8] if refits else rows
    figure = empty_figure((9, _ROW * sum(heights) + 2))
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
    for ax, (title, changes) in zip(axes, panels.items(), strict=False):
        _bars(ax, title, changes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    axes[1].set_xlabel("width")
    if refits:
        _errors(axes[2], refits[-1])
    figure.savefig(path)
    return figure


def plot_history(
    reports: Sequence[_Drawn],
    path: str | PathLike[str],
    metrics: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draw the parameter count after each report, and the metrics below it.

    Args:
        reports: the reports of one run, in order.
        path: the file to write; its suffix sets the format, PNG without one.
        metrics: name -> one value per report, or one more: the first is then that of the model
            before the first report.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there is no report, or a metric has another number of values.
    """
    _check_any(reports)
    series = {"parameters": [reports[0].parameters[0], *(r.parameters[1] for r in reports)]}
    for name, values in (metrics or {}).items():
        if len(values) not in (len(reports), len(reports) + 1):
            raise ValueError(
                f"{name} has {len(values)} values for {len(reports)} pruning steps: give one for "
                f"each, or {len(reports) + 1}, first that of the unpruned model"
            )
        series[name] = list(values)  # type: ignore[arg-type]
    figure = empty_figure((7, 2.2 * len(series) + 0.6))
    axes = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (name, values) in zip(axes, series.items(), strict=True):
        ax.plot(range(len(reports) + 1 - len(values), len(reports) + 1), values, "o-", c=_AFTER)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.1 * max(series["parameters"]) or 1)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[-1].set_xlabel("pruning steps")
    axes[-1].set_xticks(range(len(reports) + 1))
    figure.savefig(path)
    return figure


def _bars(ax: Axes, title: str, changes: Sequence[Change]) -> None:
    """Draw one panel: for each change a bar before and a bar after."""
    rows = range(len(changes))
    ax.barh(rows, [c.before for c in changes], color=_BEFORE, label="before")
    ax.barh(rows, [c.after for c in changes], color=_AFTER, height=0.45, label="after")
    for row, change in zip(rows, changes, strict=True):
        text = f"{change.before:,} \N{RIGHTWARDS ARROW} {change.after:,}"
        ax.annotate(text, (change.before, row), (4, 0), textcoords="offset points", va="center")
    ax.set_yticks(rows, [change.label for change in changes])
    ax.set_ylim(max(len(changes), 1) - 0.5, -0.5)  # the first row at the top
    ax.margins(x=0.25)
    ax.set_title(title if changes else f"{title}: nothing changed", loc="left")


def _errors(ax: Axes, refits: Compensation) -> None:
    """Draw the relative squared error of each weight's output, cut and refitted."""
    places = range(len(refits.layers))
    ax.plot(places, [layer.cut for layer in refits.layers], ".", c=_BEFORE, label="cut")
    ax.plot(places, [layer.refit for layer in refits.layers], ".", c=_AFTER, label="refitted")
    ax.set_yscale("log")
    ax.set_title("error of each refitted weight's output on held-out data", loc="left")
    ax.set_xlabel("weights, in the model's order")
    ax.legend()


def _numbers(name: str, old: Any, new: Any) -> Iterator[tuple[str, int, int]]:
    """Yield name, old and new of each whole number in a field's value.

    An unset value has no width to draw.
    """
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            yield from _numbers(f"{name}[{index}]", before, after)
    elif type(old) is int and type(new) is int:
        yield name, old, new


def _sides(group: PrunedGroup) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each side of a group's layers, and its width before and after.

    A fused layer is in the group once for each of its pieces; what they lose is counted together.
    """
    removed: dict[str, int] = {}
    before: dict[str, int] = {}
    for layer in group.layers:
        name, _, dim = layer.name.partition("#")  # a bare parameter is named "name#dim"
        name += f" dim {dim}" if dim else " out" if layer.out else " in"
        removed[name] = removed.get(name, 0) + layer.removed
        before[name] = layer.before
    for name, count in removed.items():
        yield name, before[name], before[name] - count


def _check_any(reports: Sequence[_Drawn]) -> None:
    """Raise ``ValueError`` if there is no report."""
    if not reports:
        raise ValueError("nothing to draw: no report yet. Call pruner.step() first")
