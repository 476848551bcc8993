"""The config whose tensors these are: structure first, then widths, then the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import TPHFConfigError
from ..fit import value_at
from ..learn import ConfigMap, map_of
from ..recover import Recovery, recover
from ..reference import FieldPath, Mismatch, Refusal, field_name, with_values
from ..solve import Conflict
from .assess import Assessment, assess
from .building import Classes, build
from .headers import Stored
from .starting import Start, partners, starts, undecided
from .structure import Structure, as_json, described, every_default, settled, untied


@dataclass(frozen=True)
class Changed:
    """A field that has to change.

    Attributes:
        says: its value in config.json; ``None``: not set, ``stands_for`` is meant.
        holds: the value that the weights need.
        tensors: those that show it.
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
        changed: the fields that differ from what it holds.
        undecided: fields that no shape shows; they stay as they are.
        assessment: what the new config gives.
    """

    data: dict[str, Any]
    changed: tuple[Changed, ...]
    undecided: tuple[str, ...]
    assessment: Assessment


@dataclass(frozen=True)
class Unsolved:
    """No single config is known to build the tensors.

    Attributes:
        reason: in one sentence.
        needs: field -> value -> the tensors that need it, where one field needs several.
        candidates: configs that fit equally well.
        structure: the numbers of layers and settings that were settled before.
    """

    reason: str
    needs: dict[FieldPath, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    candidates: tuple[dict[str, int], ...] = ()
    structure: tuple[Changed, ...] = ()


@dataclass(frozen=True)
class Task:
    """What is to be solved.

    Attributes:
        classes: the class.
        data: config.json.
        tensors: the checkpoint's.
        given: fields whose value is known, by name (``text_config.head_dim``).
        apart: two tensors that are not tied in the files, whatever the config says.
    """

    classes: Classes
    data: dict[str, Any]
    tensors: Mapping[str, Stored]
    given: Mapping[str, int] = field(default_factory=dict)
    apart: tuple[str, str] | None = None


def solution(task: Task) -> Solution | Unsolved:
    """Find the one config of a class whose tensors these are."""
    refusal: str | None = None
    reason: Unsolved | None = None
    for begun in starts(task.classes, task.data, task.tensors, task.given):
        if isinstance(begun, Refusal):
            refusal = begun.reason
            continue
        found = _from(task, begun)
        if isinstance(found, Solution):
            return found
        reason = reason or found
    if reason is None:
        return Unsolved(refusal or "the class was not built")
    return reason if refusal is None else replace(reason, reason=f"{refusal}; {reason.reason}")


def _from(task: Task, begun: Start) -> Solution | Unsolved:
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
    full = every_default(task.classes, begun)
    return tuple(
        Changed(path, said(task.classes, task.data, path), value, value_at(full, path))
        for path, value in structure.changes.items()
    )


def said(classes: Classes, data: Mapping[str, Any], path: FieldPath) -> Any:
    """What config.json says of a field, under whichever of its names; None: nothing."""
    value = value_at(data, path)
    aliases: Any = getattr(classes.config, "attribute_map", {})
    names = (alias for alias, own in aliases.items() if (own,) == path and alias in data)
    return value if value is not None else next((data[name] for name in names), None)


def _out_of_place(assessment: Assessment, classes: Classes) -> str:
    found = assessment.loaded
    if found.failed:
        name, why = next(iter(found.failed.items()))
        return f"{name or 'the checkpoint'} cannot be put together from the tensors: {why}"
    if assessment.lost:
        return (
            f"{classes.model.__name__} has no place for {assessment.lost[0]}, in any layout tried"
        )
    return f"{found.missing[0]} is missing, in any layout of {classes.model.__name__} tried"


def _widths(
    task: Task, begun: Start, structure: Structure, changed: tuple[Changed, ...]
) -> Solution | Unsolved:
    known = learned(task.classes, structure.data)
    if isinstance(known, Refusal):
        return Unsolved(known.reason, structure=changed)
    given = paths_of(known, task.given)
    if isinstance(given, Unsolved):
        return given
    loose = undecided(begun, known, task.classes, task.tensors, given)
    if loose is not None:
        name = field_name(loose)
        reason = f"no shape shows {name} alone: say it, given={{{name!r}: ...}}"
        return Unsolved(reason, structure=changed)
    target = structure.assessment.loaded.shapes
    empty = next((name for name, shape in target.items() if 0 in shape), None)
    if empty is not None:
        return Unsolved(f"{empty} is empty, and no width is 0", structure=changed)
    said_beside = partners(begun, known, task.data, given)
    found = recover(known, target, {**said_beside, **given})
    if isinstance(found, Refusal):
        return Unsolved(found.reason, structure=changed)
    if isinstance(found, Conflict):
        return _conflicting(found, changed)
    several = _not_told(known, found, given)
    if several is not None:
        return replace(several, structure=changed)
    return _proved(task, begun, structure, changed, known, found)


def _proved(
    task: Task,
    begun: Start,
    structure: Structure,
    changed: tuple[Changed, ...],
    known: ConfigMap,
    found: Recovery,
) -> Solution | Unsolved:
    """The config as it can be written, loaded once more."""
    mismatched = structure.assessment.loaded.mismatched
    fields = _differing(known, found.data, begun, task.data, mismatched, task.classes)
    unseen = tuple(sorted(field_name(path) for path in found.undecided))
    for new in _written(task.classes, task.data, known, found.data, structure, begun):
        proof = assess(task.classes, new, task.tensors)
        if not isinstance(proof, Refusal) and proof.fits:
            return Solution(new, (*changed, *fields), unseen, proof)
    return Unsolved("the config that was found does not load these weights", structure=changed)


def learned(classes: Classes, data: Mapping[str, Any]) -> ConfigMap | Refusal:
    """Which fields set which dimensions of a class around a config."""
    model = build(classes, data)
    if isinstance(model, Refusal):
        return model
    try:
        return map_of(model)
    except (TPHFConfigError, ValueError) as error:
        return Refusal(str(error))


def paths_of(known: ConfigMap, given: Mapping[str, int]) -> dict[FieldPath, int] | Unsolved:
    """Fields by the names that people write: the class's own, or those that all configs have."""
    every = {**known.sizes, **known.silent}
    found: dict[FieldPath, int] = {}
    for name, value in given.items():
        own = getattr(known.builder.config_class, "attribute_map", {}).get(name, name)
        paths = [path for path in every if field_name(path) in (name, own)]
        paths = paths or [path for path in every if path[-1] in (name, own)]
        if len(paths) != 1 or paths[0] not in known.sizes:
            listed = ", ".join(sorted(field_name(path) for path in (paths or known.sizes)))
            which = "several of that name" if len(paths) > 1 else f"no field {name} that sets sizes"
            return Unsolved(
                f"{known.builder.config_class.__name__} has {which}: say one of {listed}"
            )
        found[paths[0]] = value
    return found


def _not_told(known: ConfigMap, found: Recovery, given: Mapping[FieldPath, int]) -> Unsolved | None:
    """A field that would change although no shape shows it; None: there is none."""
    for path in sorted(found.undecided - given.keys() - known.linked.keys(), key=field_name):
        if found.values[path] != known.sizes.get(path):
            name = field_name(path)
            why = f"{name} cannot stay {known.sizes[path]}, and no shape shows what it is"
            return Unsolved(f"{why}: say it, given={{{name!r}: ...}}")
    return None


def _conflicting(found: Conflict, changed: tuple[Changed, ...]) -> Unsolved:
    if found.ambiguous:
        candidates = tuple(
            {field_name(path): value for path, value in one.items()} for one in found.ambiguous
        )
        listed = " or ".join(
            ", ".join(f"{name}={value}" for name, value in one.items()) for one in candidates
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
    known: ConfigMap,
    new: Mapping[str, Any],
    begun: Start,
    data: dict[str, Any],
    mismatched: tuple[Mismatch, ...],
    classes: Classes,
) -> tuple[Changed, ...]:
    """The fields whose value is another, and the tensors that show it."""
    changed = []
    for path in sorted({*known.sizes, *begun.replaced}, key=field_name):
        was, now = value_at(known.data, path), value_at(new, path)
        if (was == now and path not in begun.replaced) or now is None:
            continue
        if said(classes, data, path) == now:
            continue
        names = tuple(m.name for m in mismatched if _shows(known, m, path))
        names = names or tuple(m.name for m in mismatched)
        stands_for = None if begun.replaced else known.sizes.get(path)
        changed.append(Changed(path, said(classes, data, path), now, stands_for, names))
    return tuple(changed)


def _shows(known: ConfigMap, mismatch: Mismatch, path: FieldPath) -> bool:
    expected = mismatch.expected or ()
    return any(
        path in known.fields_of(mismatch.name, dim)
        for dim, (a, b) in enumerate(zip(mismatch.found, expected, strict=False))
        if a != b
    )


def _written(
    classes: Classes,
    data: dict[str, Any],
    known: ConfigMap,
    new: dict[str, Any],
    structure: Structure,
    begun: Start,
) -> list[dict[str, Any]]:
    """Ways to write the config: what changed alone, under other names too, or all of it."""
    paths = {*known.sizes, *structure.changes, *begun.replaced}
    changes = {
        path: value_at(new, path)
        for path in sorted(paths, key=field_name)
        if value_at(new, path) is not None
        and (value_at(new, path) != value_at(known.data, path) or path not in known.sizes)
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
    """The JSON with some values of another; lists that are not there come whole."""
    result = data
    for path, value in changes.items():
        while isinstance(path[-1], int) and not isinstance(value_at(result, path[:-1]), list):
            path = path[:-1]
            value = value_at(new, path)
        result = with_values(result, {path: value})
    return result
