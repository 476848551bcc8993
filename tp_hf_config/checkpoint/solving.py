"""Find the config whose tensors these are: the structure first, then the widths, then the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import TPHFConfigError
from ..fieldmap.field_map import FieldMap, map_of
from ..fieldmap.solve.integers import Conflict
from ..fieldmap.solve.recover import Recovery, recover
from ..model.build import Refusal
from ..model.config_json import FieldPath, field_name, value_at, with_values
from ..model.shapes import Mismatch
from .assess import Assessment, assess
from .building import Classes, build
from .headers import Stored
from .starting import Start, partners, starts, undecided
from .structure import Structure, as_json, described, every_default, settled, untied


@dataclass(frozen=True)
class Changed:
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
        assessment: how the tensors load with the new config.
    """

    data: dict[str, Any]
    changed: tuple[Changed, ...]
    undecided: tuple[str, ...]
    assessment: Assessment


@dataclass(frozen=True)
class Unsolved:
    """Why no single config is known to build the tensors.

    Attributes:
        reason: the reason, in one sentence.
        needs: field -> value -> the tensors that need it, where one field needs several values.
        candidates: the configs that fit equally well, each as field name -> value.
        structure: the layer counts and settings that were settled before.
    """

    reason: str
    needs: dict[FieldPath, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    candidates: tuple[dict[str, int], ...] = ()
    structure: tuple[Changed, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is to be solved.

    Attributes:
        classes: the classes of the folder.
        data: config.json.
        tensors: the checkpoint's tensors.
        given: fields whose value is known, by name (``text_config.head_dim``).
        apart: two tensors that are not tied in the files, whatever the config says.
    """

    classes: Classes
    data: dict[str, Any]
    tensors: Mapping[str, Stored]
    given: Mapping[str, int] = field(default_factory=dict)
    apart: tuple[str, str] | None = None


def solution(task: Task) -> Solution | Unsolved:
    """Return the one config of a class that builds these tensors, proved, or why none is known."""
    refusal: str | None = None
    reason: Unsolved | None = None
    for begun in starts(task.classes, task.data, task.tensors, task.given):
        if isinstance(begun, Refusal):
            refusal = begun.reason
            continue
        outcome = _from(task, begun)
        if isinstance(outcome, Solution):
            return outcome
        reason = reason or outcome
    if reason is None:
        return Unsolved(refusal or "the class was not built")
    return reason if refusal is None else replace(reason, reason=f"{refusal}; {reason.reason}")


def _from(task: Task, begun: Start) -> Solution | Unsolved:
    """Solve from one start: settle the structure, then the widths."""
    classes = task.classes
    structure = settled(classes, begun.data, begun.assessment, task.tensors)
    if task.apart is not None and not structure.assessment.misplaced:
        structure = untied(classes, structure, task.apart, task.tensors)
    changed = _structural(task, structure, begun.data)
    if structure.rivals:
        several = " or ".join(described(rival) for rival in structure.rivals)
        return Unsolved(f"the tensors that there are fit {several}", structure=changed)
    if structure.assessment.misplaced:
        return Unsolved(_out_of_place(structure.assessment, classes), structure=changed)
    if structure.assessment.fits and not task.given and not begun.replaced:
        return Solution(structure.data, changed, (), structure.assessment)
    return _widths(task, begun, structure, changed)


def _structural(task: Task, structure: Structure, begun: Mapping[str, Any]) -> tuple[Changed, ...]:
    """Return the changes of layer counts and settings, with what config.json says of them."""
    full = every_default(task.classes, begun)
    return tuple(
        Changed(path, said(task.classes, task.data, path), value, value_at(full, path))
        for path, value in structure.changes.items()
    )


def said(classes: Classes, data: Mapping[str, Any], path: FieldPath) -> Any:
    """Return what config.json says of a field, under any of its names, or None if nothing.

    Args:
        classes: the classes; the config class's ``attribute_map`` has the other names.
        data: config.json.
        path: the field.
    """
    value = value_at(data, path)
    aliases: Any = getattr(classes.config, "attribute_map", {})
    names = (alias for alias, own in aliases.items() if (own,) == path and alias in data)
    return value if value is not None else next((data[name] for name in names), None)


def _out_of_place(assessment: Assessment, classes: Classes) -> str:
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


def _widths(
    task: Task, begun: Start, structure: Structure, changed: tuple[Changed, ...]
) -> Solution | Unsolved:
    """Find the widths of a config whose structure is settled.

    Args:
        task: what is to be solved.
        begun: the start.
        structure: the config with its structure settled.
        changed: the changes of the structure so far.
    """
    field_map = learned(task.classes, structure.data)
    if isinstance(field_map, Refusal):
        return Unsolved(field_map.reason, structure=changed)
    given = paths_of(field_map, task.given)
    if isinstance(given, Unsolved):
        return given
    loose = undecided(begun, field_map, task.classes, task.tensors, given)
    if loose is not None:
        name = field_name(loose)
        reason = f"no shape shows {name} alone: say it, given={{{name!r}: ...}}"
        return Unsolved(reason, structure=changed)
    target = structure.assessment.loaded.shapes
    empty = next((name for name, shape in target.items() if 0 in shape), None)
    if empty is not None:
        return Unsolved(f"{empty} is empty, and no width is 0", structure=changed)
    said_beside = partners(begun, field_map, task.data, given)
    recovered = recover(field_map, target, {**said_beside, **given})
    if isinstance(recovered, Refusal):
        return Unsolved(recovered.reason, structure=changed)
    if isinstance(recovered, Conflict):
        return _conflicting(recovered, changed)
    several = _not_told(field_map, recovered, given)
    if several is not None:
        return replace(several, structure=changed)
    return _proved(task, begun, structure, changed, field_map, recovered)


def _proved(
    task: Task,
    begun: Start,
    structure: Structure,
    changed: tuple[Changed, ...],
    field_map: FieldMap,
    found: Recovery,
) -> Solution | Unsolved:
    """Return the config in the first form that loads the weights, or Unsolved if none does."""
    mismatched = structure.assessment.loaded.mismatched
    fields = _differing(field_map, found.data, begun, task.data, mismatched, task.classes)
    unseen = tuple(sorted(field_name(path) for path in found.undecided))
    for new in _written(task.classes, task.data, field_map, found.data, structure, begun):
        proof = assess(task.classes, new, task.tensors)
        if not isinstance(proof, Refusal) and proof.fits:
            return Solution(new, (*changed, *fields), unseen, proof)
    return Unsolved("the config that was found does not load these weights", structure=changed)


def learned(classes: Classes, data: Mapping[str, Any]) -> FieldMap | Refusal:
    """Return the field map of a class around a config, or a refusal if it cannot be learned."""
    model = build(classes, data)
    if isinstance(model, Refusal):
        return model
    try:
        return map_of(model)
    except (TPHFConfigError, ValueError) as error:
        return Refusal(str(error))


def paths_of(field_map: FieldMap, given: Mapping[str, int]) -> dict[FieldPath, int] | Unsolved:
    """Return field -> value for values given by name; Unsolved if a name is not that of one field.

    Args:
        field_map: the field map.
        given: name -> value. A name is the class's own or one that all configs have
            (``attribute_map``), in full or without the nested config that it is in.
    """
    every = {**field_map.sizes, **field_map.silent}
    found: dict[FieldPath, int] = {}
    for name, value in given.items():
        own = getattr(field_map.builder.config_class, "attribute_map", {}).get(name, name)
        paths = [path for path in every if field_name(path) in (name, own)]
        paths = paths or [path for path in every if path[-1] in (name, own)]
        if len(paths) != 1 or paths[0] not in field_map.sizes:
            listed = ", ".join(sorted(field_name(path) for path in (paths or field_map.sizes)))
            which = "several of that name" if len(paths) > 1 else f"no field {name} that sets sizes"
            return Unsolved(
                f"{field_map.builder.config_class.__name__} has {which}: say one of {listed}"
            )
        found[paths[0]] = value
    return found


def _not_told(
    field_map: FieldMap, found: Recovery, given: Mapping[FieldPath, int]
) -> Unsolved | None:
    """Return Unsolved if a field would change although no shape shows it; else None."""
    for path in sorted(found.undecided - given.keys() - field_map.linked.keys(), key=field_name):
        if found.values[path] != field_map.sizes.get(path):
            name = field_name(path)
            why = f"{name} cannot stay {field_map.sizes[path]}, and no shape shows what it is"
            return Unsolved(f"{why}: say it, given={{{name!r}: ...}}")
    return None


def _conflicting(found: Conflict, changed: tuple[Changed, ...]) -> Unsolved:
    """Return a conflict between shapes as Unsolved, in the names of fields and tensors."""
    if found.ambiguous:
        candidates = tuple(
            {field_name(path): value for path, value in candidate.items()}
            for candidate in found.ambiguous
        )
        listed = " or ".join(
            ", ".join(f"{name}={value}" for name, value in candidate.items())
            for candidate in candidates
        )
        return Unsolved(f"the shapes fit {listed}", {}, candidates, changed)
    needs = {
        path: {
            int(value): tuple(dict.fromkeys(str(name) for name, _ in who))  # type: ignore[misc]
            for value, who in by_value.items()
            if value == int(value)  # type: ignore[call-overload]
        }
        for path, by_value in found.needs.items()
    }
    names = ", ".join(field_name(path) for path in needs)
    return Unsolved(f"no one value of {names} gives all these shapes", needs, (), changed)


def _differing(
    field_map: FieldMap,
    new: Mapping[str, Any],
    begun: Start,
    data: dict[str, Any],
    mismatched: tuple[Mismatch, ...],
    classes: Classes,
) -> tuple[Changed, ...]:
    """Return the fields whose value changes, each with the tensors that show it.

    Args:
        field_map: the field map.
        new: the new config's JSON.
        begun: the start.
        data: config.json.
        mismatched: the tensors in another shape than the structure's config builds.
        classes: the classes.
    """
    changed = []
    for path in sorted({*field_map.sizes, *begun.replaced}, key=field_name):
        was, now = value_at(field_map.data, path), value_at(new, path)
        if (was == now and path not in begun.replaced) or now is None:
            continue
        if said(classes, data, path) == now:
            continue
        names = tuple(m.name for m in mismatched if _shows(field_map, m, path))
        names = names or tuple(m.name for m in mismatched)
        stands_for = None if begun.replaced else field_map.sizes.get(path)
        changed.append(Changed(path, said(classes, data, path), now, stands_for, names))
    return tuple(changed)


def _shows(field_map: FieldMap, mismatch: Mismatch, path: FieldPath) -> bool:
    """True if a field sets a dimension in which a mismatched tensor differs."""
    expected = mismatch.expected or ()
    return any(
        path in field_map.fields_of(mismatch.name, dim)
        for dim, (a, b) in enumerate(zip(mismatch.shape, expected, strict=False))
        if a != b
    )


def _written(
    classes: Classes,
    data: dict[str, Any],
    field_map: FieldMap,
    new: dict[str, Any],
    structure: Structure,
    begun: Start,
) -> list[dict[str, Any]]:
    """Return the JSON forms in which the config may be written, in the order to try them.

    First only the changes; then also under other names that config.json uses; then all of it.

    Args:
        classes: the classes.
        data: config.json.
        field_map: the field map.
        new: the new config's JSON.
        structure: the config with its structure settled.
        begun: the start.
    """
    paths = {*field_map.sizes, *structure.changes, *begun.replaced}
    changes = {
        path: value_at(new, path)
        for path in sorted(paths, key=field_name)
        if value_at(new, path) is not None
        and (value_at(new, path) != value_at(field_map.data, path) or path not in field_map.sizes)
    }
    plain = written(data, new, changes)
    ways = [plain]
    aliases: Any = getattr(classes.config, "attribute_map", {})
    doubles: dict[FieldPath, Any] = {
        (alias,): value
        for alias, own in aliases.items()
        for path, value in changes.items()
        if path == (own,) and alias in data
    }
    if doubles:
        ways.append(written(plain, new, doubles))
    whole = as_json(classes, new, use_diff=True)
    return ways if whole is None else [*ways, whole]


def written(
    data: dict[str, Any], new: Mapping[str, Any], changes: Mapping[FieldPath, Any]
) -> dict[str, Any]:
    """Return a config's JSON with some fields at other values.

    Args:
        data: the config's JSON.
        new: the JSON from which lists that ``data`` lacks are taken whole.
        changes: field -> value.
    """
    result = data
    for path, value in changes.items():
        while isinstance(path[-1], int) and not isinstance(value_at(result, path[:-1]), list):
            path = path[:-1]
            value = value_at(new, path)
        result = with_values(result, {path: value})
    return result
