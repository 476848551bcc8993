"""Draw an allocation: each layer's width, and how much the model misses a layer's share."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from ..model.layer_entries import name_in_all_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .allocate import Allocation

_COLOURS = ("#1f5a91", "#c0603a", "#5b8c5a", "#7d5ba6")


def plot_allocation(allocation: Allocation, path: str | PathLike[str]) -> Figure:
    """Draw widths by layer above, and the changes of the model's output by layer below.

    Args:
        allocation: what to draw.
        path: the file to write; its suffix sets the format, PNG without one.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'tp-hf-config[plot]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    above, below = figure.subplots(2, 1, sharex=True)
    names = dict.fromkeys(name_in_all_layers(curve.field) for curve in allocation.curves)
    for name, colour in zip(names, _COLOURS * len(names), strict=False):
        curves = [c for c in allocation.curves if name_in_all_layers(c.field) == name]
        layers = range(len(curves))
        above.step(layers, [c.units for c in curves], where="mid", c=colour, ls=":", alpha=0.6)
        widths = [allocation.widths[c.field] for c in curves]
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
    below.set_ylabel(f"{allocation.measure}, that layer alone")
    below.set_xlabel("layer")
    below.legend(title="of it gone", ncols=3)
    figure.savefig(path)
    return figure
