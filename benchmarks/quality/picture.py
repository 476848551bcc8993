"""The widths of layers that ``allocate`` found, as a picture for the documentation."""

from __future__ import annotations

from pathlib import Path

from jobs import Row


def draw(rows: list[Row], path: Path) -> None:
    """Draw the feed-forward width of every layer, one line for each mean; nothing without rows."""
    found = [row for row in rows if row.get("layer_widths") and row["variant"] == "allocated"]
    if not found:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in found:
        widths = row["layer_widths"]
        mean = f"mean {row['subject']}: perplexity {row['refitted']['reference']:.1f}"
        axes.step(range(len(widths)), widths, where="mid", label=mean)
    axes.set_xlabel("layer")
    axes.set_ylabel("feed-forward width")
    axes.set_ylim(bottom=0)
    axes.set_title(
        "SmolLM2-135M (1536 in every layer, 16.2): widths that allocate() found", size=10
    )
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
