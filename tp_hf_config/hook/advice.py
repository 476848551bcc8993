"""Say before a step that is expected to cost too much what would cost less, with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from ..calibration.calibrate import Calibration
from ..calibration.held_out import NOTICEABLE, TOO_MUCH, Refitting, in_words
from ..errors import UnsupportedModelError
from ..fieldmap.model_view import ModelView, view_of
from ..graph.config_graph import ConfigGraph
from ..graph.prunable import Width
from ..graph.sides import ConfigGroup
from ..model.layer_entries import name_in_all_layers
from ..model.shapes import Shapes
from ..model.sharded import behind
from ..planning.selection import inner_widths_of

_MOST = 0.9  # of the inner widths: removing more is no alternative


def advice_before(
    view: ModelView,
    calibration: Calibration,
    refitting: Refitting,
    groups: Sequence[ConfigGroup],
    remaining: Shapes,
) -> str | None:
    """Return the warning for a step; None if it costs little. ``remaining``: shapes after it."""
    expected = refitting.result.expected
    if expected is None or expected <= TOO_MUCH:
        return None
    sizes = {name: parameter.numel() for name, parameter in view.model.named_parameters()}
    before, after = sum(sizes.values()), sum(math.prod(remaining[name]) for name in sizes)
    parts = [
        f"this step removes {before - after:,} of {before:,} parameters. On held-out data the "
        f"output distribution is expected to change by a KL divergence of {expected:.3g}: "
        f"{in_words(expected)}. A change below {NOTICEABLE} is hardly noticeable."
    ]
    if behind(view.model) is view.model:
        parts += _from_inner_widths(view, calibration, refitting, groups, before - after)
    parts.append(
        f"{_spread(refitting)}allocate(model, calibration, target_params={after}) prunes most in "
        "the layers where it changes the output least (in the shell: --allocate --target-params "
        f"{after / before:.2f})"
    )
    return " ".join(parts)


def _from_inner_widths(
    view: ModelView,
    calibration: Calibration,
    refitting: Refitting,
    groups: Sequence[ConfigGroup],
    gone: int,
) -> Iterator[str]:
    """Yield what it costs to remove as many parameters from the inner widths, if that is less."""
    try:  # the model as earlier steps left it
        view = view_of(view.model, view.field_map.recipe.make_inputs)
        widths = inner_widths_of(view)
    except UnsupportedModelError:  # no config describes the last cut yet
        return
    share = gone / (sum(width.parameters * width.units for width in widths) or math.inf)
    others = {group.graph_group.fields for group in groups} - {width.fields for width in widths}
    if not others or not 0 < share <= _MOST:
        return
    cost = refitting.expected_of([*_lowest(view.model, calibration, widths, share)])
    if cost < (refitting.result.expected or 0.0):
        named = dict.fromkeys(name_in_all_layers(name) for w in widths for name in w.names)
        fields = ", ".join(f'"{name}"' for name in named)
        yield (
            "If as many parameters are removed from the inner widths only, the expected KL "
            f"divergence is {cost:.3g}: prune=({fields},), pruning_ratio={share:.2f}."
        )


def _lowest(
    model: nn.Module, calibration: Calibration, widths: Sequence[Width], share: float
) -> Iterator[ConfigGroup]:
    """Yield pruning groups of the lowest-ranked units of some widths, a share of each."""
    graph = ConfigGraph(model, [group for width in widths for group in width.groups])
    graph.build_dependency(model)
    importance = calibration.importance()
    for graph_group in graph.graph_groups:
        whole = graph.group_at(graph_group, range(graph_group.units.count))
        values = graph.importance_of(whole, importance)
        order = values.argsort()[: int(share * graph_group.units.count)]
        yield graph.group_at(graph_group, order.tolist())


def _spread(refitting: Refitting) -> str:
    """Return how much outputs change, least to most, as a sentence's beginning; or ``""``."""
    layers = sorted(refitting.result.layers, key=lambda layer: layer.refit)
    if len(layers) < 2:
        return ""
    least, most = layers[0], layers[-1]
    return (
        f"The outputs of layers change by {least.refit:.1%} ({least.weight}) to {most.refit:.1%} "
        f"({most.weight}), so "
    )
