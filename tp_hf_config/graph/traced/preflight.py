"""Preflight of a traced graph: what a pruner's settings show, without looking at its groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ...model.config_json import FieldPath, field_name
from .selection import TracedView


def traced_problems(pruner: Any, view: TracedView) -> Iterator[str]:
    """Yield messages about fields whose layers would end at different widths.

    Checks only fields that set widths in several layers of a list, and none outside of lists.

    Args:
        pruner: the pruner, after its constructor.
        view: the model that it prunes.
    """
    ranked: dict[str, int] = {}
    for field in sorted(view.widths() - view.head_fields(), key=str):
        layers = _layers_of(pruner, view, field)
        if len(layers) < 2:
            continue
        ignored = {
            name
            for name, modules in layers.items()
            if any(module in pruner.ignored_layers for module in modules)
        }
        ends = {
            name: _end(pruner, modules[0])
            for name, modules in layers.items()
            if name not in ignored
        }
        start = view.field_map.values[field]
        moving = {end for end in ends.values() if end < start}
        if not moving:
            continue
        name = field_name(field)
        if pruner.global_pruning or pruner.isomorphic:
            ranked[name] = len(ends)
        elif ignored:
            yield (
                f"{len(ignored)} of {len(layers)} layers with {name} stay at {start} "
                "(ignored_layers), the others do not, and one config field cannot say that. Ignore "
                "it in every layer or in none."
            )
        elif len(set(ends.values())) > 1:
            values = ", ".join(map(str, sorted(set(ends.values()))))
            yield (
                f"the ratios of {name} differ: its layers will have {values}, and one config field "
                "cannot say that. Give all of them one ratio (ratios= of pruner_kwargs)."
            )
    if ranked:
        yield ranked_together(ranked)


def _end(pruner: Any, module: nn.Module) -> int:
    """Return a layer's output channels after the last step, unrounded."""
    ratios = pruner.pruning_ratio_dict.get(module, pruner.per_step_pruning_ratio)
    size = pruner.layer_init_out_ch.get(module) or 0
    return int(size * (1 - ratios[-1]))


def _layers_of(pruner: Any, view: TracedView, field: FieldPath) -> dict[str, list[nn.Module]]:
    """Return the modules whose output width a field sets, by layer of a list.

    Empty if the field sets something outside of such lists as well.
    """
    field_map = view.field_map
    lists = [name for name, m in view.model.named_modules() if isinstance(m, nn.ModuleList)]

    def home(name: str) -> str | None:
        for outer in lists:
            index = name.removeprefix(f"{outer}.").partition(".")[0]
            if name.startswith(f"{outer}.") and index.isdigit():
                return f"{outer}.{index}"
        return None

    for (name, which), expression in field_map.expressions.items():
        if isinstance(which, int) and field in expression.fields and home(name) is None:
            return {}
    result: dict[str, list[nn.Module]] = {}
    for name, module, fields in view.producers():
        place = home(name)
        if field in fields and place is not None and module in pruner.DG.module2node:
            result.setdefault(place, []).append(module)
    return result


def ranked_together(several: Mapping[str, int], alone: Sequence[str] = ()) -> str:
    """Return the message that several groups of one field are ranked with each other.

    Args:
        several: the fields, with the number of their groups.
        alone: fields with a single group, which can be ranked so.
    """
    groups = ", ".join(f"the {number} groups of {name}" for name, number in several.items())
    only = ", ".join(f'"{field}"' for name in alone for field in name.split(" + "))
    other = f", or prune what has one group alone: prune=({only},) of pruner_kwargs" if only else ""
    return (
        f"{groups} are ranked together, so they lose different numbers, and one config field "
        "cannot say that. Use global_pruning=False, isomorphic=False, and no two of them under "
        f"one key of pruning_ratio_dict{other}."
    )
