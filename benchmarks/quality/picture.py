"""Pictures for the documentation: widths of layers, and perplexity against size."""

from __future__ import annotations

from pathlib import Path

from jobs import Row


def draw_widths(rows: list[Row], path: Path) -> None:
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


def draw_perplexity(rows: list[Row], path: Path) -> None:
    """Draw SmolLM2's perplexity against its parameters: feed-forward widths, and layers dropped.

    Nothing without the unpruned model.
    """
    unpruned = next((row for row in rows if row["subject"] == "unpruned"), None)
    if unpruned is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    whole = (unpruned["parameters"], unpruned["whole"]["reference"])
    uniform = [
        r for r in rows if r["variant"] == "activation" and r["subject"] in ("ffn20", "ffn40")
    ]
    allocated = [r for r in rows if r["variant"] == "allocated"]
    dropped = [r for r in rows if r["part"] == "layers" and r["variant"] == "refitted"]
    lines = (
        ("cut only", "cut", uniform),
        ("cut and refitted", "refitted", uniform),
        ("a width for each layer, refitted", "refitted", allocated),
        ("layers dropped, refitted", "refitted", dropped),
    )
    for label, way, found in lines:
        points = sorted([whole, *((r["parameters"], r[way]["reference"]) for r in found)])
        sizes, perplexities = zip(*points, strict=True)
        axes.plot([size / 1e6 for size in sizes], perplexities, marker="o", label=label)
    axes.plot([whole[0] / 1e6], [whole[1]], "o", color="black")
    axes.annotate("unpruned", (whole[0] / 1e6, whole[1]), (-52, -14), textcoords="offset points")
    axes.set_ylim(bottom=14)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("perplexity")
    axes.set_title("SmolLM2-135M, fewer feed-forward channels or layers, no training", size=10)
    axes.legend(frameon=False)
    figure.savefig(path)
