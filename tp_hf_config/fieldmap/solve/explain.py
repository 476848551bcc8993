"""Explain why no config fits, in the user's terms: fields, layers, sizes and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ConfigSyncError, listed
from ...model.build import Refusal
from ...model.config_json import FieldPath, field_name
from ...model.shapes import Mismatch
from ..field_map import FieldMap, nearest_accepted
from .fit import Conflict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAIN = "Nothing was written. Continue to prune, then call hook.sync()."  # how messages end


def explain_conflict(
    model: PreTrainedModel, field_map: FieldMap, conflict: Conflict
) -> ConfigSyncError:
    """Return the error for a conflict: which layers need which value, or the several solutions."""
    name = type(model).__name__
    if conflict.ambiguous:
        choices = " or ".join(
            ", ".join(f"{field_name(field)}={value}" for field, value in solution.items())
            for solution in conflict.ambiguous
        )
        return ConfigSyncError(
            f"{name}: the shapes fit {choices}, and the hook did not see which channels were "
            "removed. Prune with the pruner's groups, so that it does."
        )
    needs = {
        field_name(field): {
            int(value) if value.denominator == 1 else float(value): list(dict(who))
            for value, who in values.items()
        }
        for field, values in conflict.needs.items()
    }
    parts = [
        f"{named}: {_needs(by_value, field_map.values.get(field))}"
        for (named, by_value), field in zip(needs.items(), conflict.needs, strict=True)
    ]
    return ConfigSyncError(
        f"no {type(model.config).__name__} describes {name} with these widths. "
        + "; ".join(parts)
        + ". One field sets all of these, so each has to lose the same number of channels: prune "
        "them all at one ratio with local ranking (global_pruning=False), or keep them all "
        f"(ignored_layers=). {AGAIN}",
        {named: {int(v): who for v, who in by.items()} for named, by in needs.items()},
    )


def explain_refusal(
    model: PreTrainedModel, field_map: FieldMap, values: dict[FieldPath, int], refusal: Refusal
) -> ConfigSyncError:
    """Return the error for values that the class refuses: its words, and the nearest it accepts."""
    changed = {field: value for field, value in values.items() if value != field_map.values[field]}
    changes = ", ".join(
        f"{field_name(field)} {field_map.values[field]} -> {value}"
        for field, value in changed.items()
    )
    advice = []
    for field in changed:
        if field not in field_map.must_equal:
            nearest = nearest_accepted(field_map, changed, field)
            if nearest:
                advice.append(f"{field_name(field)} {' or '.join(map(str, nearest))}")
    hint = f" The nearest values that it accepts: {'; '.join(advice)}." if advice else ""
    return ConfigSyncError(
        f"{type(model.config).__name__} refuses the values of the pruned weights ({changes}). Its "
        f"message: {refusal.reason!r}.{hint} Choose ratios that give accepted values after every "
        f"step, or set round_to= to a number that the class accepts. {AGAIN}"
    )


def explain_mismatch(model: PreTrainedModel, mismatches: Sequence[Mismatch]) -> ConfigSyncError:
    return ConfigSyncError(
        f"no {type(model.config).__name__} describes {type(model).__name__} with these widths: "
        f"{listed(mismatches, '; ')}. No field of the config sets these dimensions separately: "
        f"keep the layers (ignored_layers=). {AGAIN}"
    )


def explain_vanished(model: PreTrainedModel, names: Sequence[str]) -> ConfigSyncError:
    """Return the error for a count that becomes 0, which would break some forward pass."""
    return ConfigSyncError(
        f"{type(model).__name__} with these widths has {names[0]} 0. Another field, which sets no "
        f"shape, would have to change too. Keep this width (prune=, ignored_layers=). {AGAIN}"
    )


def explain_unfilled(model: PreTrainedModel, names: Sequence[str]) -> ConfigSyncError:
    """Return the error for buffers that are neither saved nor computed from the config alone."""
    return ConfigSyncError(
        f"{type(model).__name__} with these widths has another shape of {names[0]}. This buffer is "
        "not saved, and its new values cannot be computed from the config. Keep this width "
        f"(prune=, ignored_layers=). {AGAIN}"
    )


def _needs(by_value: dict[int | float, list[str]], base: int | None) -> str:
    parts = []
    for value, names in sorted(by_value.items()):
        if names:
            parts.append(f"{listed(names)} {'need' if len(names) > 1 else 'needs'} {value:g}")
        else:
            parts.append(f"the rest needs {value:g}")
    return ", ".join(parts) + (f" (it was {base})" if base is not None else "")
