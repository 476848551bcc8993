"""From shapes alone to a config: what the config of a pruned checkpoint should say.

No pruning is recorded here.  Widths follow from the shapes; a number of heads that no shape shows
stays as it is where it can.  Nothing is accepted that the class does not build to these shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from .fit import Shapes, Values, build_as, fit
from .guess import SMALL, Asked, nearest, others, search, solutions, unseen, with_heads
from .learn import ConfigMap
from .reference import FieldPath, Mismatch, Refusal, listed, shapes
from .solve import Conflict, Observable

_TRIED = 64
_FURTHER = 64
_LISTED = 8


@dataclass(frozen=True)
class Recovery:
    """A config that builds the shapes.

    Attributes:
        values: every field that sets a size, at the value that it has now.
        data: the config's JSON.
        undecided: numbers of heads that no shape shows.
    """

    values: Values
    data: dict[str, Any]
    undecided: frozenset[FieldPath] = frozenset()


def recover(
    known: ConfigMap, target: Shapes, given: Mapping[FieldPath, int] | None = None
) -> Recovery | Conflict | Refusal:
    """Find the one config of a class that builds these shapes.

    Args:
        known: the class, learned around the config that the model had.
        target: shape of every tensor of the whole model; tied ones under one name or all.
        given: fields whose value is known; they settle what shapes leave open.

    Returns:
        The config, proved by building it; or the fields that would need several values at once, or
        the several configs that fit; or why there is none.
    """
    given = dict(given or {})
    other = _other_tensors(known, target)
    if other is not None:
        return other
    asked = Asked(known, target)
    fitting, reason = _fitting(asked, given)
    if len(fitting) > 1:
        return Conflict(ambiguous=_differences(fitting[:_LISTED]))
    values = fitting[0] if fitting else search(asked, nearest(known, asked.sizes, given), given)
    if values is None:
        return reason
    proof = build_as(known, known.data, target, values)
    if isinstance(proof, tuple):
        found = Recovery(values, proof[0], frozenset(unseen(known)) - given.keys())
        return _several(known, found, given) or found
    if not fitting:
        return reason
    return proof if isinstance(proof, Refusal) else _mismatched(known, proof)


def _several(known: ConfigMap, found: Recovery, given: Mapping[FieldPath, int]) -> Conflict | None:
    """The values of a field that would change and of which several fit; None: each is the one."""
    for path in found.values.keys() - given.keys() - known.linked.keys() - found.undecided:
        if found.values[path] != known.sizes.get(path):
            alike = _alike(known, found.values, path)
            if len(alike) > 1:
                return Conflict(ambiguous=[{path: value} for value in alike])
    return None


def _alike(known: ConfigMap, values: Values, path: FieldPath) -> list[int]:
    """The values of a field, next to the one found, with which the same is built."""
    built, found = known.build_at(values), [values[path]]
    for step in (-1, 1):
        other = values[path] + step
        while other > 0 and abs(other - values[path]) <= _FURTHER:
            alike = known.build_at({**values, path: other})
            if isinstance(alike, Refusal) or isinstance(built, Refusal):
                break
            if shapes(alike) != shapes(built):
                break
            found.append(other)
            other += step
    return sorted(found)


def _other_tensors(known: ConfigMap, target: Shapes) -> Refusal | None:
    """Why these are not the tensors of this class at any width: some are missing or unknown."""
    full = known.builder.build(known.data)
    if isinstance(full, Refusal):
        return full
    expected = shapes(full)
    name = known.builder.model_class.__name__
    unknown = sorted(target.keys() - expected.keys())
    if unknown:
        return Refusal(f"{name} builds no {unknown[0]} from this config, at no width")
    tied = _tied_groups(full)
    missing = sorted(
        one for one in expected.keys() - target.keys() if not tied.get(one, set()) & target.keys()
    )
    if missing:
        return Refusal(f"{missing[0]} is missing, which {name} builds from this config")
    return None


def _tied_groups(model: nn.Module) -> dict[str, set[str]]:
    """For every parameter with several names, all of them."""
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _fitting(
    asked: Asked, given: Mapping[FieldPath, int]
) -> tuple[list[Values], Conflict | Refusal]:
    """The values that fit the map and that the class takes, or why there are none."""
    known, sizes = asked.known, asked.sizes
    fitting: list[Values] = []
    reason: Conflict | Refusal | None = None
    for found in islice(solutions(known, sizes, given), _LISTED):
        outcome = found if isinstance(found, Conflict) else _taken(asked, found, given)
        if isinstance(outcome, dict):
            fitting.append(outcome)
        reason = reason or (None if isinstance(outcome, dict) else outcome)
    for found in islice(others(known, sizes, given), 0 if fitting else _TRIED):
        outcome = _taken(asked, found, given)
        if isinstance(outcome, dict):
            fitting.append(outcome)
    if isinstance(reason, Conflict):  # in the words of all layers
        everywhere: dict[Observable, int] = {
            (n, dim): s for n, shape in asked.target.items() for dim, s in enumerate(shape)
        }
        full = fit(known, everywhere, given, powers=True)
        reason = full if isinstance(full, Conflict) and full.needs else reason
    return fitting, reason or Refusal("no whole numbers give these shapes")


def _taken(asked: Asked, found: Values, given: Mapping[FieldPath, int]) -> Values | Refusal:
    """The values, with a number of heads that the class takes, if it builds the target then."""
    reason = Refusal("not tried")
    for values in islice(with_heads(asked, found, given), SMALL):
        wrong = asked.wrong(values)
        if not wrong:
            return values
        if not isinstance(wrong, Refusal):
            return _mismatched(asked.known, wrong)
        reason = wrong
    return reason


def _mismatched(known: ConfigMap, mismatches: Sequence[Mismatch]) -> Refusal:
    name = known.builder.config_class.__name__
    return Refusal(f"no width of {name} gives {listed(mismatches)}")


def _differences(solutions: Sequence[Values]) -> list[Values]:
    """The fields in which several solutions differ, at their values in each."""
    differing = [path for path in solutions[0] if len({one[path] for one in solutions}) > 1]
    return [{path: one[path] for path in differing} for one in solutions]
