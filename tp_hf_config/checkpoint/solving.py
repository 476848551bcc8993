"""Solve for the config that builds a checkpoint's tensors: ties, then widths, then the proof.

A field is changed where config.json has it: under another name (``attribute_map``), or outside of
its nested config (the oldest configs on the Hub have no ``text_config``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TPHFConfigError
from ..fieldmap.field_map import FieldMap
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.model_view import by_layers
from ..fieldmap.solve import Conflict, Recovery, recover
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, plain_fields, ranges, with_values
from ..model.shapes import Mismatch
from .building import Checkpoint, Classes, as_json, build, value_in
from .loading import Assessment, assess, differing_tie
from .reports import Cause, and_more, how_to_give, number, short

_LISTED = 6  # kinds of tensors, values of a field, or ranges of layers in a message
_IN_LAYER = re.compile(r"(.+?)\.(\d{1,9})\.")  # list of layers, number of the layer


@dataclass(frozen=True)
class Solution:
    """A config that builds the checkpoint's tensors, proved."""

    data: dict[str, Any]
    changes: tuple[Cause, ...]  # one for each changed field
    undecided: tuple[str, ...]  # unchanged fields that no shape shows
    still_tied: tuple[str, str] | None  # tied by the config, but different in the files


@dataclass(frozen=True)
class Unsolved:
    """Why there is not exactly one config that builds the tensors."""

    reason: str
    causes: tuple[Cause, ...] = ()
    # configs that fit equally well: field name -> value
    candidates: tuple[dict[str, int], ...] = ()


def solve(checkpoint: Checkpoint, given: Mapping[str, int] | None = None) -> Solution | Unsolved:
    """Return the one config of a class that builds these tensors, proved, or why there is none.

    ``given``: field name -> known value.
    """
    start, classes = checkpoint.data, checkpoint.classes
    assessment = assess(checkpoint, start)
    if given and (isinstance(assessment, Refusal) or assessment.misplaced):
        start = _with_given(checkpoint, given)
        assessment = assess(checkpoint, start)
    if isinstance(assessment, Refusal):
        return Unsolved(assessment.reason)
    differing = differing_tie(checkpoint, assessment)
    flipped, data, assessment = _retied(checkpoint, start, assessment, differing)
    if assessment.misplaced:
        causes = tuple(_misplaced(assessment, classes))
        reason = ". ".join(cause.text for cause in causes)
        if not assessment.failed:
            argument = how_to_give("num_hidden_layers")
            reason += f". If layers were removed, give the number that remains: {argument}"
        return Unsolved(reason, causes)
    if assessment.fits and not given:
        recovery = Recovery({}, as_json(classes, data) or data)
        return _solution(checkpoint, start, recovery, flipped, (), differing)
    field_map = learn(classes, data)
    if isinstance(field_map, Refusal):
        return _no_width(field_map.reason, assessment)
    known = _paths_of(field_map, given or {})
    if isinstance(known, Unsolved):
        return known
    widths = _widths(field_map, assessment, known)
    if isinstance(widths, Unsolved):
        return widths
    shown_by = [
        (mismatch.name, field_map.fields_of(mismatch.name, dim))
        for mismatch in assessment.mismatched
        for dim, size in enumerate(mismatch.shape)
        if (mismatch.expected or ())[dim : dim + 1] != (size,)
    ]
    paths = {*field_map.sizes, *known, *flipped}
    return _solution(checkpoint, start, widths, paths, shown_by, differing)


def _with_given(checkpoint: Checkpoint, given: Mapping[str, int]) -> dict[str, Any]:
    """Set the fields of config.json whose value the user gave."""
    aliases: Any = getattr(checkpoint.classes.config, "attribute_map", {})
    own = {aliases.get(name, name): value for name, value in given.items()}
    values = {
        path: own[name]
        for path, _ in plain_fields(checkpoint.data)
        for name in (field_name(path), str(path[-1]), aliases.get(path[-1]))
        if name in own
    }
    return with_values(checkpoint.data, values)


def _retied(
    checkpoint: Checkpoint,
    data: dict[str, Any],
    assessment: Assessment,
    differing: tuple[str, str] | None,
) -> tuple[list[FieldPath], dict[str, Any], Assessment]:
    """Flip settings that tie weights, if more tensors find a place or ``differing`` are untied.

    Returns the flipped fields, the config's JSON with them, and how the tensors load with it.
    """
    flipped: list[FieldPath] = []
    if not assessment.misplaced and differing is None:
        return flipped, data, assessment
    full = as_json(checkpoint.classes, data) or data
    ties = [
        path
        for path, value in plain_fields(full)
        if isinstance(value, bool) and str(path[-1]).startswith("tie_")
    ]
    for path in sorted(ties, key=len):
        changes = {path: not value_in(full, path)}
        new = with_values(full, changes)
        changed = _changed(checkpoint.classes, data, changes, new)
        outcome = assess(checkpoint, changed)
        if not isinstance(outcome, Refusal) and _better_tied(assessment, outcome, differing):
            flipped, data, assessment, full = [*flipped, path], changed, outcome, new
    return flipped, data, assessment


def _better_tied(before: Assessment, after: Assessment, differing: tuple[str, str] | None) -> bool:
    if before.misplaced or differing is None:
        return after.misplaced < before.misplaced
    return before.ties(differing) and not after.misplaced and not after.ties(differing)


def learn(classes: Classes, data: Mapping[str, Any]) -> FieldMap | Refusal:
    """Return the field map of a class around a config, or why it cannot be learned."""
    model = build(classes, data)
    if isinstance(model, Refusal):
        return model
    try:
        return map_of(model, how=by_layers)
    except (TPHFConfigError, ValueError) as error:
        return Refusal(str(error))


# Widths


def _widths(
    field_map: FieldMap, assessment: Assessment, given: Mapping[FieldPath, int]
) -> Recovery | Unsolved:
    """Find the widths of a config in which every tensor has a place."""
    empty = next((name for name, shape in assessment.shapes.items() if 0 in shape), None)
    if empty is not None:
        return _no_width(f"{empty} is empty, but no width can be 0", assessment)
    sizes = {path: value for path, value in given.items() if path in field_map.sizes}
    recovery = recover(field_map, assessment.shapes, sizes)
    if isinstance(recovery, Refusal):
        return _no_width(recovery.reason, assessment)
    if isinstance(recovery, Conflict):
        return _in_conflict(recovery, assessment)
    hidden = recovery.undecided - given.keys() - field_map.must_equal.keys()
    for path in sorted(hidden, key=field_name):
        if recovery.values[path] != field_map.sizes.get(path):
            name = field_name(path)
            why = f"{name} cannot remain {field_map.sizes[path]}, and no shape shows its value"
            return _no_width(f"{why}: add {how_to_give(name)}", assessment)
    return recovery


def _paths_of(field_map: FieldMap, given: Mapping[str, int]) -> dict[FieldPath, int] | Unsolved:
    """Resolve the field names of given values; Unsolved if one does not name exactly one field."""
    fields = {**field_map.sizes, **field_map.non_size_fields}
    values: dict[FieldPath, int] = {}
    for name, value in given.items():
        own = getattr(field_map.builder.config_class, "attribute_map", {}).get(name, name)
        paths = [path for path in fields if field_name(path) in (name, own)]
        # without the nested config
        paths = paths or [path for path in fields if path[-1] in (name, own)]
        is_set = len(paths) == 1 and value_in(field_map.data, paths[0]) == value
        if len(paths) != 1 or not (is_set or paths[0] in field_map.sizes):
            names = sorted(field_name(path) for path in (paths or field_map.sizes))
            which = (
                f"several fields {name}" if len(paths) > 1 else f"no field {name} that sets a size"
            )
            hint = f", as in {how_to_give(names[0], value)}" if len(paths) > 1 else ""
            return Unsolved(
                f"{field_map.builder.config_class.__name__} has {which}: use one of "
                f"{', '.join(names)}{hint}"
            )
        values[paths[0]] = value
    return values


def _solution(
    checkpoint: Checkpoint,
    start: dict[str, Any],
    recovery: Recovery,
    paths: Iterable[FieldPath],
    shown_by: Sequence[tuple[str, frozenset[FieldPath]]],
    differing: tuple[str, str] | None,
) -> Solution | Unsolved:
    """Return the config with all changes, proved; Unsolved if it does not load the weights.

    ``paths``: fields that may change. ``shown_by``: mismatched tensors, each with the fields that
    set the mismatched dimension. ``differing``: tensors that may not be tied.
    """
    classes, old, new = checkpoint.classes, checkpoint.data, recovery.data
    before = as_json(classes, start) or start
    changes: dict[FieldPath, Any] = {}
    for path in sorted(paths, key=field_name):
        now = value_in(new, path)
        says = value_in(old, _places(classes, old, path)[0])
        if now is not None and (now != value_in(before, path) or says not in (None, now)):
            changes[path] = now
    data = _changed(classes, old, changes, new)
    proof = assess(checkpoint, data)
    if isinstance(proof, Refusal) or not proof.fits:
        return Unsolved("the config that was found does not load these weights")
    causes = []
    for path, holds in changes.items():
        place = _places(classes, old, path)[0]
        place = place if value_in(data, place) == holds else path
        says = value_in(old, place)
        if says != holds:
            names = tuple(dict.fromkeys(name for name, fields in shown_by if path in fields))
            names = names or tuple(dict.fromkeys(name for name, _ in shown_by))
            causes.append(_field_cause(place, says, holds, value_in(before, path), names))
    return Solution(
        data,
        tuple(causes),
        tuple(sorted(map(field_name, recovery.undecided))),
        differing if proof.ties(differing) else None,
    )


def _places(classes: Classes, data: Mapping[str, Any], path: FieldPath) -> list[FieldPath]:
    """Where config.json has a field: aliases (which the class prefers), own name, outer config."""
    aliases: Any = getattr(classes.config, "attribute_map", {})
    names = [*(alias for alias, own in aliases.items() if (own,) == path), *path[:1]]
    named: list[FieldPath] = [(n,) for n in names if len(path) == 1 and data.get(n) is not None]
    above = path[:-1]
    while above and value_in(data, above) is None:
        above = above[:-1]
    is_entry = any(not isinstance(key, str) for key in path)
    return named or [path if is_entry else (*above, path[-1])]


def _changed(
    classes: Classes, data: dict[str, Any], changes: Mapping[FieldPath, Any], new: dict[str, Any]
) -> dict[str, Any]:
    """Change fields in place if the class reads them there, else write the whole config anew."""
    values: dict[FieldPath, Any] = {}
    for path, value in changes.items():
        if any(not isinstance(key, str) for key in path):
            path = path[: next(at for at, key in enumerate(path) if not isinstance(key, str))]
            value = value_in(new, path)  # lists are replaced whole
        values |= dict.fromkeys(_places(classes, data, path), value)
    in_place = with_values(data, values)
    full = as_json(classes, in_place)
    if full is not None and all(value_in(full, path) == now for path, now in changes.items()):
        return in_place
    return as_json(classes, new, use_diff=True) or in_place


# Causes: one for all tensors that share it


def _field_cause(
    path: FieldPath, says: Any, holds: Any, stands_for: Any, tensors: tuple[str, ...]
) -> Cause:
    name = field_name(path)
    said = f"says {number(says)}"
    if says is None:
        said = "is not set"
        if stands_for is not None:
            said += f", which means {number(stands_for)}"
    held = f"the weights of {_layers(tensors)} hold {number(holds)}"
    if isinstance(holds, bool) or not tensors:
        held = f"the weights need {number(holds)}"
    return Cause("field", f"{name} {said}, but {held}", name, says, holds, tensors)


def _no_width(reason: str, assessment: Assessment) -> Unsolved:
    """Return why no width gives the shapes of mismatched tensors, with one cause per kind."""
    mismatched = assessment.mismatched
    if not mismatched:
        return Unsolved(reason)
    return Unsolved(reason, (*_shapes(mismatched), Cause("config", short(reason))))


def _in_conflict(conflict: Conflict, assessment: Assessment) -> Unsolved:
    """Return a conflict between shapes in terms of fields and tensors."""
    if conflict.ambiguous:
        candidates = tuple(
            {field_name(path): value for path, value in candidate.items()}
            for candidate in conflict.ambiguous
        )
        listed = " or ".join(
            ", ".join(f"{name}={value}" for name, value in candidate.items())
            for candidate in candidates
        )
        names = tuple(mismatch.name for mismatch in assessment.mismatched)
        reason = f"the shapes fit {listed}"
        cause = Cause("tensors", f"{reason}, and no shape shows which one is right", tensors=names)
        return Unsolved(reason, (cause,), candidates)
    causes = tuple(
        _needs_several(
            path,
            {
                int(value): tuple(dict.fromkeys(str(name) for name, _ in who))
                for value, who in by_value.items()
                if value.denominator == 1
            },
        )
        for path, by_value in conflict.needs.items()
    )
    if not causes:
        return _no_width("no single value of each config field gives all these shapes", assessment)
    listed = ". ".join(cause.text for cause in causes)
    return Unsolved(
        f"{listed}. No config can express that: prune these layers to the same width", causes
    )


def _needs_several(path: FieldPath, by_value: dict[int, tuple[str, ...]]) -> Cause:
    """The cause for a field that needs several values; ``by_value``: value -> tensors."""
    parts = [
        f"{number(value)} in {_layers(names) or 'other tensors'}"
        for value, names in sorted(by_value.items(), key=lambda item: -len(item[1]))
    ]
    text = f"{field_name(path)} would need several values at once: {'; '.join(parts[:_LISTED])}"
    names = tuple(name for tensors in by_value.values() for name in tensors)
    return Cause("tensors", text, field_name(path), tensors=names)


def _shapes(mismatched: Sequence[Mismatch]) -> Iterator[Cause]:
    """Yield a cause for each kind of mismatched tensor; equal mismatches of layers share one."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for mismatch in mismatched:
        kind = (_IN_LAYER.sub(r"\1.*.", mismatch.name, count=1), mismatch.shape, mismatch.expected)
        kinds.setdefault(kind, []).append(mismatch.name)
    for (name, shape, expected), names in list(kinds.items())[:_LISTED]:
        where = f" ({_layers(names)})" if "*" in name else ""
        text = (
            f"{short(name)}{where} has shape {list(shape)}, but the config builds "
            f"{list(expected or ())}"
        )
        yield Cause("tensors", text, tensors=tuple(names))
    if len(kinds) > _LISTED:
        yield Cause("tensors", f"{len(kinds) - _LISTED} more kinds of tensors have other shapes")


def _misplaced(assessment: Assessment, classes: Classes) -> Iterator[Cause]:
    """Yield one cause each for tensors that are missing, lost, or cannot be assembled."""
    model = classes.model.__name__
    for names, what in (
        (assessment.missing, f"missing from the weights; {model} would initialise them randomly"),
        (assessment.lost, f"in the weights, but not in {model} with this config"),
    ):
        if names:
            kinds = list(dict.fromkeys(_IN_LAYER.sub(r"\1.*.", name, count=1) for name in names))
            listed = ", ".join(short(kind) for kind in kinds[:3]) + and_more(kinds, 3)
            subject = f"{len(names)} tensors are" if len(names) > 1 else "one tensor is"
            yield Cause("tensors", f"{subject} {what}: {listed}", tensors=tuple(names))
    failed = assessment.failed
    if failed:
        name, why = next(iter(failed.items()))
        text = f"{short(name) or 'the weights'}{and_more(failed)} cannot be assembled: {why}"
        yield Cause("tensors", text, tensors=tuple(failed))


def _layers(names: Iterable[str]) -> str:
    """Where tensors are (``layers 0-29``), or their names if none is in a layer."""
    numbers: dict[str, set[int]] = {}
    alone: list[str] = []
    for name in names:
        place = _IN_LAYER.match(name)
        if place is None:
            alone.append(name)
        else:
            numbers.setdefault(place[1], set()).add(int(place[2]))
    if not numbers:
        return ", ".join(map(short, alone[:2])) + and_more(alone, 2)
    texts: list[str] = []
    for where, in_list in numbers.items():
        runs = ranges(sorted(in_list))
        shown = ", ".join(runs[:_LISTED]) + (", ..." if len(runs) > _LISTED else "")
        of_list = f" of {short(where)}" if len(numbers) > 1 else ""
        texts.append(f"{'layer' if len(in_list) == 1 else 'layers'} {shown}{of_list}")
    return " and ".join(texts)
