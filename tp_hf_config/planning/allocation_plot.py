"""Draw an allocation: each layer's width, and how much the model misses a layer's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from ..model.layer_entries import name_in_all_layers
from .layer_curve import LayerCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COLOURS = ("#1f5a91", "#c0603a", "#5b8c5a", "#7d5ba6")


def plot_allocation(
    every: Sequence[LayerCurve], left: Mapping[str, int], measure: str, path: str | PathLike[str]
) -> Figure:
    """Draw widths by layer above, and the changes of the model's output by layer below.

    Args:
        every: what was measured of each layer.
        left: each layer's own field -> its width in the end.
        measure: what changes are.
        path: the file to write; its suffix sets the format, PNG without one.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = empty_figure((8, 5))
    above, below = figure.subplots(2, 1, sharex=True)
    names = dict.fromkeys(name_in_all_layers(curve.field) for curve in every)
    for name, colour in zip(names, _COLOURS * len(names), strict=False):
        curves = [c for c in every if name_in_all_layers(c.field) == name]
        layers = range(len(curves))
        above.step(layers, [c.units for c in curves], where="mid", c=colour, ls=":", alpha=0.6)
        widths = [left[c.field] for c in curves]
        above.step(layers, widths, where="mid", c=colour, label=name)
        for share in sorted(curves[0].changes):
            changes = [c.changes[share] for c in curves]
            below.plot(
                layers, changes, ".-", c=colour, alpha=0.3 + 0.6 * share, label=f"{share:.0%}"
            )
    above.set_ylabel("width (dotted: before)")
    above.set_ylim(bottom=0)
    above.legend()
    below.set_yscale("log")
    below.set_ylabel(f"{measure}, that layer alone")
    below.set_xlabel("layer")
    below.legend(title="of it gone", ncols=3)
    figure.savefig(path)
    return figure


def empty_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of this width and height, in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tp-hf-config[plot]'") from error
    return Figure(figsize=size, layout="constrained", dpi=120)
