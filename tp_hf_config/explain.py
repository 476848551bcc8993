"""Say why no config fits, in the user's terms: fields, layers, sizes and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ConfigSyncError
from .learn import ConfigMap
from .limits import nearest_accepted
from .reference import FieldPath, Mismatch, Refusal, field_name, listed
from .solve import Conflict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LISTED = 3
AGAIN = "Nothing was written; go on pruning and sync again."


def some(names: Sequence[str]) -> str:
    """Up to three names, or two and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 3 else ""
    return ", ".join(names[:2] if more else names) + more


def explain_conflict(
    model: PreTrainedModel, known: ConfigMap, conflict: Conflict
) -> ConfigSyncError:
    """No values fit: the field that needs several at once, and which layers need which."""
    name = type(model).__name__
    if conflict.ambiguous:
        choices = " or ".join(
            ", ".join(f"{field_name(path)}={value}" for path, value in solution.items())
            for solution in conflict.ambiguous
        )
        return ConfigSyncError(
            f"{name}: the shapes fit {choices}, and nothing that was pruned tells which. Prune "
            "through the pruner's groups, so that the hook sees the channels that go."
        )
    needs = {
        field_name(path): {
            _number(value): list(dict.fromkeys(name for name, _ in who))
            for value, who in values.items()
        }
        for path, values in conflict.needs.items()
    }
    parts = [
        f"{field}: {_needs(by_value, known.values.get(path))}"
        for (field, by_value), path in zip(needs.items(), conflict.needs, strict=True)
    ]
    return ConfigSyncError(
        f"no {type(model.config).__name__} says what the weights of {name} are now. "
        + "; ".join(parts)
        + ". One field sets all of these, so they have to lose the same number: prune them all at "
        "one ratio with local ranking (global_pruning=False), or keep them all (ignored_layers=). "
        f"{AGAIN}",
        {field: {int(v): who for v, who in by.items()} for field, by in needs.items()},
    )


def explain_refusal(
    model: PreTrainedModel, known: ConfigMap, values: dict[FieldPath, int], refusal: Refusal
) -> ConfigSyncError:
    """The class refuses the one config that has these shapes: its own words, and what it takes."""
    changed = {path: value for path, value in values.items() if value != known.values[path]}
    listed = ", ".join(
        f"{field_name(path)} {known.values[path]} -> {value}" for path, value in changed.items()
    )
    advice = []
    for path in changed:
        if path not in known.linked:
            near = nearest_accepted(known, changed, path)
            if near:
                advice.append(f"{field_name(path)} {' or '.join(map(str, near))}")
    hint = f" The nearest it takes: {'; '.join(advice)}." if advice else ""
    return ConfigSyncError(
        f"{type(model.config).__name__} refuses what the weights are now ({listed}). It says: "
        f"{refusal.reason!r}.{hint} Choose ratios that end there after every step, or round_to= a "
        f"number that the class accepts. {AGAIN}"
    )


def explain_mismatch(model: PreTrainedModel, mismatches: Sequence[Mismatch]) -> ConfigSyncError:
    """The config found builds other shapes than the weights have."""
    return ConfigSyncError(
        f"no {type(model.config).__name__} says what the weights of {type(model).__name__} are "
        f"now: {listed(mismatches)}. No field of the config sets these dimensions on their own: "
        f"keep the layers (ignored_layers=). {AGAIN}"
    )


def explain_vanished(model: PreTrainedModel, names: Sequence[str]) -> ConfigSyncError:
    """A count that the class makes 0 would break some forward pass."""
    return ConfigSyncError(
        f"{type(model).__name__} with these widths makes {names[0]} 0: another field that sets no "
        f"shape would have to change with them. Keep that width (prune=, ignored_layers=). {AGAIN}"
    )


def _needs(by_value: dict[int | float, list[str]], base: int | None) -> str:
    parts = []
    for value, names in sorted(by_value.items()):
        if names:
            listed = ", ".join(names[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            parts.append(f"{listed}{more} {'need' if len(names) > 1 else 'needs'} {value:g}")
        else:
            parts.append(f"the rest needs {value:g}")
    return ", ".join(parts) + (f" (it was {base})" if base is not None else "")


def _number(value: object) -> int | float:
    number = float(value)  # type: ignore[arg-type]
    return int(number) if number.is_integer() else number
