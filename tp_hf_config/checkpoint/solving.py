"""Solve for the config that builds a checkpoint's tensors: structure, widths, then the proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import TPHFConfigError
from ..fieldmap.field_map import FieldMap
from ..fieldmap.layer_map import by_layers
from ..fieldmap.learn_field_map import map_of
from ..fieldmap.solve.fit import Conflict
from ..fieldmap.solve.recover import Recovery, hidden_counts, recover
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, plain_fields, with_values
from ..model.shapes import Mismatch
from .assess import Assessment, assess
from .building import Classes, as_json, build, every_default, value_in
from .forms import forms, place_in, takes_effect
from .large import too_large, too_large_reason
from .structure import Structure, Task, describe, settle, untie
from .words import how_to_give


@dataclass(frozen=True)
class FieldChange:
    """A field that has to change.

    Attributes:
        path: the field.
        says: its value in config.json; ``None``: not set, and ``stands_for`` is meant.
        holds: the value that the weights need.
        stands_for: the value that the class uses now; ``None``: not known.
        tensors: the tensors that show it.
    """

    path: FieldPath
    says: Any
    holds: Any
    stands_for: Any = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Solution:
    """A config that builds the checkpoint's tensors, proved.

    Attributes:
        data: what config.json should hold.
        changed: the fields in which this differs from what config.json holds.
        undecided: names of the fields that no shape shows; they stay as they are.
    """

    data: dict[str, Any]
    changed: tuple[FieldChange, ...]
    undecided: tuple[str, ...]


@dataclass(frozen=True)
class Unsolved:
    """Why there is not exactly one config that builds the tensors.

    Attributes:
        reason: the reason, in one sentence.
        needs: field -> value -> the tensors that need it, where one field needs several values.
        candidates: the configs that fit equally well, each as field name -> value.
        structure: the layer counts and settings that were settled before.
    """

    reason: str
    needs: dict[FieldPath, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    candidates: tuple[dict[str, int], ...] = ()
    structure: tuple[FieldChange, ...] = ()


def solve(task: Task) -> Solution | Unsolved:
    """Return the one config of a class that builds these tensors, proved, or why there is none.

    Layer counts and ties are settled first, then the widths.
    """
    classes, tensors = task.classes, task.tensors
    large = too_large(classes, task.data, tensors)
    if large:
        return Unsolved(too_large_reason(large, tensors))
    data, assessment = task.data, assess(classes, task.data, tensors)
    if isinstance(assessment, Refusal) and task.given:
        data = _with_given(task)
        assessment = assess(classes, data, tensors)
    if isinstance(assessment, Refusal):
        return Unsolved(assessment.reason)
    structure = untie(task, settle(task, Structure(data, {}, assessment)))
    changed = _structure_changes(task, data, structure)
    if structure.rivals:
        several = " or ".join(describe(rival) for rival in structure.rivals)
        return Unsolved(f"the tensors that there are fit {several}", structure=changed)
    if structure.assessment.misplaced:
        return Unsolved(_misplaced_reason(structure.assessment, classes), structure=changed)
    if structure.assessment.fits and not task.given:
        return Solution(structure.data, changed, _hidden_fields(task, structure))
    solved = _widths(task, structure)
    if isinstance(solved, Solution):
        return replace(solved, changed=(*changed, *solved.changed))
    return replace(solved, structure=changed)


def _with_given(task: Task) -> dict[str, Any]:
    """Return config.json with the values that the user gave, where it has fields of these names."""
    aliases: Any = getattr(task.classes.config, "attribute_map", {})
    own = {aliases.get(name, name): value for name, value in task.given.items()}
    values = {
        path: own[name]
        for path, _ in plain_fields(task.data)
        for name in (field_name(path), str(path[-1]), aliases.get(path[-1]))
        if name in own
    }
    return with_values(task.data, values)


def _hidden_fields(task: Task, structure: Structure) -> tuple[str, ...]:
    """Return the names of the fields that no shape shows, of a structure that fits."""
    field_map = learn(task.classes, structure.data)
    if isinstance(field_map, Refusal):
        return ()
    return tuple(sorted(map(field_name, hidden_counts(field_map))))


def _structure_changes(
    task: Task, start: dict[str, Any], structure: Structure
) -> tuple[FieldChange, ...]:
    """Return the changes of layer counts and settings, with what config.json says of them."""
    before, after = (every_default(task.classes, data) for data in (start, structure.data))
    changes: list[FieldChange] = []
    for path in structure.changes:
        name = place_in(task.classes, task.data, structure.data, path)
        says, holds = value_in(task.data, name), value_in(after, path)
        if holds != says:
            changes.append(FieldChange(name, says, holds, value_in(before, path)))
    return tuple(changes)


def _misplaced_reason(assessment: Assessment, classes: Classes) -> str:
    """Return why tensors are still out of place after every structure that was tried."""
    loaded = assessment.loaded
    if loaded.failed:
        name, why = next(iter(loaded.failed.items()))
        return f"{name or 'the checkpoint'} cannot be put together from the tensors: {why}"
    if assessment.lost:
        return (
            f"{classes.model.__name__} has no place for {assessment.lost[0]}, in any layout tried"
        )
    return f"{loaded.missing[0]} is missing, in any layout of {classes.model.__name__} tried"


def _widths(task: Task, structure: Structure) -> Solution | Unsolved:
    """Find the widths of a config whose structure is settled."""
    field_map = learn(task.classes, structure.data)
    if isinstance(field_map, Refusal):
        return Unsolved(field_map.reason)
    given = paths_of(field_map, task.given)
    if isinstance(given, Unsolved):
        return given
    target = structure.assessment.loaded.shapes
    empty = next((name for name, shape in target.items() if 0 in shape), None)
    if empty is not None:
        return Unsolved(f"{empty} is empty, and no width is 0")
    recovery = recover(field_map, target, given)
    if isinstance(recovery, Refusal):
        return Unsolved(recovery.reason)
    if isinstance(recovery, Conflict):
        return _unsolved_conflict(recovery)
    unprovable = _unprovable_change(field_map, recovery, given)
    if unprovable is not None:
        return Unsolved(unprovable)
    return _proved(task, structure, field_map, recovery)


def _proved(
    task: Task, structure: Structure, field_map: FieldMap, recovery: Recovery
) -> Solution | Unsolved:
    """Return the config in the best form that loads the weights, or Unsolved if none does."""
    changes = _new_values(task, structure, field_map, recovery.data)
    data = _best_form(task, changes, recovery.data)
    if data is None:
        return Unsolved("the config that was found does not load these weights")
    fields = _field_changes(task, structure, field_map, recovery.data, data)
    return Solution(data, fields, tuple(sorted(map(field_name, recovery.undecided))))


def _best_form(
    task: Task, changes: Mapping[FieldPath, Any], new: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the first form of the config that loads the weights and says all that changes.

    A value that the class does not read out of a form may show in no shape. If there is no such
    form, return the first that loads the weights, or None.

    Args:
        task: the folder's config.
        changes: field -> value.
        new: the new config's JSON.
    """
    loading = []
    for data in _forms(task, changes, new):
        proof = assess(task.classes, data, task.tensors)
        if isinstance(proof, Refusal) or not proof.fits:
            continue
        if takes_effect(task.classes, data, changes):
            return data
        loading.append(data)
    return loading[0] if loading else None


def learn(classes: Classes, data: Mapping[str, Any]) -> FieldMap | Refusal:
    """Return the field map of a class around a config, or a refusal if it cannot be learned."""
    model = build(classes, data)
    if isinstance(model, Refusal):
        return model
    try:
        return map_of(model, how=by_layers)
    except (TPHFConfigError, ValueError) as error:
        return Refusal(str(error))


def paths_of(field_map: FieldMap, given: Mapping[str, int]) -> dict[FieldPath, int] | Unsolved:
    """Return field -> value for values given by name; Unsolved if a name is not that of one field.

    ``given``: name -> value. A name is the class's own or one that all configs have
    (``attribute_map``), in full or without the nested config that it is in.
    """
    fields = {**field_map.sizes, **field_map.non_size_fields}
    values: dict[FieldPath, int] = {}
    for name, value in given.items():
        own = getattr(field_map.builder.config_class, "attribute_map", {}).get(name, name)
        paths = [path for path in fields if field_name(path) in (name, own)]
        paths = paths or [path for path in fields if path[-1] in (name, own)]
        if len(paths) != 1 or paths[0] not in field_map.sizes:
            names = sorted(field_name(path) for path in (paths or field_map.sizes))
            which = "several of that name" if len(paths) > 1 else f"no field {name} that sets sizes"
            hint = f", as in {how_to_give(names[0], value)}" if len(paths) > 1 else ""
            return Unsolved(
                f"{field_map.builder.config_class.__name__} has {which}: say one of "
                f"{', '.join(names)}{hint}"
            )
        values[paths[0]] = value
    return values


def _unprovable_change(
    field_map: FieldMap, recovery: Recovery, given: Mapping[FieldPath, int]
) -> str | None:
    """Return the reason if a field would change although no shape shows its value; else None."""
    hidden = recovery.undecided - given.keys() - field_map.must_equal.keys()
    for path in sorted(hidden, key=field_name):
        if recovery.values[path] != field_map.sizes.get(path):
            name = field_name(path)
            why = f"{name} cannot stay {field_map.sizes[path]}, and no shape shows what it is"
            return f"{why}: say it, {how_to_give(name)}"
    return None


def _unsolved_conflict(conflict: Conflict) -> Unsolved:
    """Return a conflict between shapes as Unsolved, in the names of fields and tensors."""
    if conflict.ambiguous:
        candidates = tuple(
            {field_name(path): value for path, value in candidate.items()}
            for candidate in conflict.ambiguous
        )
        listed = " or ".join(
            ", ".join(f"{name}={value}" for name, value in candidate.items())
            for candidate in candidates
        )
        return Unsolved(f"the shapes fit {listed}", candidates=candidates)
    needs = {
        path: {
            int(value): tuple(dict.fromkeys(str(name) for name, _ in who))  # type: ignore[misc]
            for value, who in by_value.items()
            if value == int(value)  # type: ignore[call-overload]
        }
        for path, by_value in conflict.needs.items()
    }
    names = ", ".join(field_name(path) for path in needs)
    return Unsolved(f"no one value of {names} gives all these shapes", needs)


def _field_changes(
    task: Task,
    structure: Structure,
    field_map: FieldMap,
    new: Mapping[str, Any],
    written: Mapping[str, Any],
) -> tuple[FieldChange, ...]:
    """Return the fields whose value changes, each with the tensors that show it.

    Args:
        task: the folder's config.
        structure: the settled structure.
        field_map: the class, learned around it.
        new: the new config's JSON, with every default.
        written: the same in the form that is written.
    """
    mismatched = structure.assessment.loaded.mismatched
    changed = []
    for path in sorted(field_map.sizes, key=field_name):
        was, now = value_in(field_map.data, path), value_in(new, path)
        name = place_in(task.classes, task.data, written, path)
        says = value_in(task.data, name)
        if now is None or says == now or (was == now and says is None):
            continue
        names = tuple(m.name for m in mismatched if _sets_mismatch(field_map, m, path))
        names = names or tuple(m.name for m in mismatched)
        changed.append(FieldChange(name, says, now, field_map.sizes.get(path), names))
    return tuple(changed)


def _sets_mismatch(field_map: FieldMap, mismatch: Mismatch, path: FieldPath) -> bool:
    """True if a field sets a dimension in which a mismatched tensor differs."""
    expected = mismatch.expected or ()
    return any(
        path in field_map.fields_of(mismatch.name, dim)
        for dim, (a, b) in enumerate(zip(mismatch.shape, expected, strict=False))
        if a != b
    )


def _new_values(
    task: Task,
    structure: Structure,
    field_map: FieldMap,
    new: Mapping[str, Any],
) -> dict[FieldPath, Any]:
    """Return the fields whose value may not be what config.json says, each with its new value.

    ``new``: the new config's JSON.
    """
    values = {}
    for path in sorted({*field_map.sizes, *structure.changes}, key=field_name):
        place = place_in(task.classes, task.data, structure.data, path)
        now, was, says = (
            value_in(new, path),
            value_in(field_map.data, path),
            value_in(task.data, place),
        )
        if now is not None and (path in structure.changes or now != was or says not in (None, now)):
            values[path] = now
    return values


def _forms(
    task: Task, changes: Mapping[FieldPath, Any], new: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the JSON forms in which the config may be written: only the changes, then all of it.

    Args:
        task: the folder's config.
        changes: field -> value.
        new: the new config's JSON.
    """
    yield from forms(task.classes, task.data, new, changes)
    whole = as_json(task.classes, new, use_diff=True)
    if whole is not None:
        yield whole
