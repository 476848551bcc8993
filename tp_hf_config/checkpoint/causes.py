"""Why a config and its weights disagree, grouped: one cause for all tensors that share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..reference import FieldPath, Mismatch, field_name
from .assess import Assessment
from .building import Classes
from .reports import Cause
from .solving import Changed, Solution, Unsolved
from .words import and_more, layers, number, place, short

_LISTED = 6


def of_fields(changed: Sequence[Changed]) -> Iterator[Cause]:
    """Fields that say something else than the weights hold."""
    for one in changed:
        if isinstance(one.holds, list) and any(not isinstance(c.holds, list) for c in changed):
            continue  # follows from a number of layers
        name = field_name(one.path)
        says = f"says {number(one.says)}"
        if one.says is None:
            says = "is not set"
            if one.stands_for is not None:
                says += f", which means {number(one.stands_for)}"
        where = f" of {layers(one.tensors)}" if one.tensors else ""
        holds = (
            f"the weights are those of {number(one.holds)}"
            if isinstance(one.holds, bool) or not one.tensors
            else f"the weights{where} hold {number(one.holds)}"
        )
        text = f"{name} {says}, {holds}"
        yield Cause("field", text, name, one.says, one.holds, one.tensors)


def of_solution(found: Solution) -> Iterator[Cause]:
    """The fields of a config that would load the weights."""
    yield from of_fields(found.changed)


def of_unsolved(found: Unsolved, assessment: Assessment, classes: Classes) -> Iterator[Cause]:
    """What can be said where no single config is known to load the weights."""
    yield from of_fields(found.structure)
    for path, by_value in found.needs.items():
        yield _torn(path, by_value)
    mismatched = assessment.loaded.mismatched
    if found.candidates:
        names = tuple(mismatch.name for mismatch in mismatched)
        text = f"{found.reason}, and nothing tells which"
        yield Cause("tensors", text, tensors=names)
    elif mismatched and not found.needs:
        yield from _shapes(mismatched)
        yield Cause("config", short(found.reason))
    if not found.structure:
        yield from of_misplaced(assessment, classes)


def _torn(path: FieldPath, by_value: dict[int, tuple[str, ...]]) -> Cause:
    """A field that would have to have several values at once."""
    parts = [
        f"{number(value)} in {layers(names) or 'the rest'}"
        for value, names in sorted(by_value.items(), key=lambda item: -len(item[1]))
    ]
    text = f"{field_name(path)} would need several values at once: {'; '.join(parts[:_LISTED])}"
    names = tuple(name for some in by_value.values() for name in some)
    return Cause("tensors", text, field_name(path), tensors=names)


def _shapes(mismatched: Sequence[Mismatch]) -> Iterator[Cause]:
    """Shapes that nothing explains, one cause for those that are alike in every layer."""
    alike: dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], list[str]] = {}
    for one in mismatched:
        alike.setdefault((_anywhere(one.name), one.found, one.expected), []).append(one.name)
    for (name, found, expected), names in list(alike.items())[:_LISTED]:
        where = f" ({layers(names)})" if "*" in name else ""
        text = f"{short(name)}{where} holds {list(found)}, the config builds {list(expected or ())}"
        yield Cause("tensors", text, tensors=tuple(names))
    if len(alike) > _LISTED:
        yield Cause("tensors", f"and {len(alike) - _LISTED} more kinds of tensors in other shapes")


def _anywhere(name: str) -> str:
    """A tensor's name with ``*`` for its layer."""
    at = place(name)
    return name if at is None else name.replace(f"{at[0]}.{at[1]}.", f"{at[0]}.*.", 1)


def of_misplaced(assessment: Assessment, classes: Classes) -> Iterator[Cause]:
    """Tensors that are missing, belong nowhere, or cannot be put together."""
    model = classes.model.__name__
    for names, what in (
        (assessment.loaded.missing, f"missing in the weights: {model} would start them anew"),
        (assessment.lost, f"in the weights, and {model} has no place for them in this config"),
    ):
        if names:
            kinds = list(dict.fromkeys(_anywhere(name) for name in names))
            listed = ", ".join(short(kind) for kind in kinds[:3]) + and_more(kinds, 3)
            some = f"{len(names)} tensors are" if len(names) > 1 else "one tensor is"
            yield Cause("tensors", f"{some} {what}: {listed}", tensors=tuple(names))
    failed = assessment.loaded.failed
    if failed:
        name, why = next(iter(failed.items()))
        text = f"{short(name) or 'the weights'}{and_more(failed)} cannot be put together: {why}"
        yield Cause("tensors", text, tensors=tuple(failed))
