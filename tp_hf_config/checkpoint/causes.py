"""Group what is wrong between a config and its weights: one cause for all tensors that share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..model.config_json import FieldPath, field_name
from ..model.shapes import Mismatch
from .assess import Assessment
from .building import Classes
from .reports import Cause
from .solving import FieldChange, Unsolved
from .words import and_more, layers, list_and_layer, number, short

_LISTED = 6


def field_causes(changed: Sequence[FieldChange]) -> Iterator[Cause]:
    """Yield a cause for each field whose value is not the one that the weights hold."""
    for change in changed:
        if isinstance(change.holds, list) and any(
            not isinstance(other.holds, list) for other in changed
        ):
            continue  # the list follows from the number of layers
        name = field_name(change.path)
        says = f"says {number(change.says)}"
        if change.says is None:
            says = "is not set"
            if change.stands_for is not None:
                says += f", which means {number(change.stands_for)}"
        where = f" of {layers(change.tensors)}" if change.tensors else ""
        holds = (
            f"the weights are those of {number(change.holds)}"
            if isinstance(change.holds, bool) or not change.tensors
            else f"the weights{where} hold {number(change.holds)}"
        )
        text = f"{name} {says}, {holds}"
        yield Cause("field", text, name, change.says, change.holds, change.tensors)


def unsolved_causes(
    unsolved: Unsolved, assessment: Assessment, classes: Classes
) -> Iterator[Cause]:
    """Yield the causes where no single config is known to load the weights.

    Args:
        unsolved: why there is no solution, and what was settled before solving stopped.
        assessment: how the tensors load with the folder's own config.
        classes: the classes of the folder.
    """
    yield from field_causes(unsolved.structure)
    for path, by_value in unsolved.needs.items():
        yield _conflicting_needs(path, by_value)
    mismatched = assessment.loaded.mismatched
    if unsolved.candidates:
        names = tuple(mismatch.name for mismatch in mismatched)
        text = f"{unsolved.reason}, and nothing tells which"
        yield Cause("tensors", text, tensors=names)
    elif mismatched and not unsolved.needs:
        yield from _shapes(mismatched)
        yield Cause("config", short(unsolved.reason))
    if not unsolved.structure:
        yield from misplaced_causes(assessment, classes)


def _conflicting_needs(path: FieldPath, by_value: dict[int, tuple[str, ...]]) -> Cause:
    """Return the cause for a field that would need several values at once.

    Args:
        path: the field.
        by_value: value -> the tensors that need it.
    """
    parts = [
        f"{number(value)} in {layers(names) or 'the rest'}"
        for value, names in sorted(by_value.items(), key=lambda item: -len(item[1]))
    ]
    text = f"{field_name(path)} would need several values at once: {'; '.join(parts[:_LISTED])}"
    names = tuple(name for tensors in by_value.values() for name in tensors)
    return Cause("tensors", text, field_name(path), tensors=names)


def _shapes(mismatched: Sequence[Mismatch]) -> Iterator[Cause]:
    """Yield a cause for each kind of mismatched tensor; layers with the same mismatch share one."""
    names_by_kind: dict[tuple[str, tuple[int, ...], tuple[int, ...] | None], list[str]] = {}
    for mismatch in mismatched:
        names_by_kind.setdefault(
            (_name_pattern(mismatch.name), mismatch.shape, mismatch.expected), []
        ).append(mismatch.name)
    for (name, shape, expected), names in list(names_by_kind.items())[:_LISTED]:
        where = f" ({layers(names)})" if "*" in name else ""
        text = f"{short(name)}{where} holds {list(shape)}, the config builds {list(expected or ())}"
        yield Cause("tensors", text, tensors=tuple(names))
    if len(names_by_kind) > _LISTED:
        yield Cause(
            "tensors", f"and {len(names_by_kind) - _LISTED} more kinds of tensors in other shapes"
        )


def _name_pattern(name: str) -> str:
    """Return a tensor's name with ``*`` in place of its layer number."""
    place = list_and_layer(name)
    if place is None:
        return name
    return name.replace(f"{place[0]}.{place[1]}.", f"{place[0]}.*.", 1)


def misplaced_causes(assessment: Assessment, classes: Classes) -> Iterator[Cause]:
    """Yield one cause each for tensors that are missing, lost, or cannot be put together."""
    model = classes.model.__name__
    for names, what in (
        (assessment.loaded.missing, f"missing in the weights: {model} would start them anew"),
        (assessment.lost, f"in the weights, and {model} has no place for them in this config"),
    ):
        if names:
            kinds = list(dict.fromkeys(_name_pattern(name) for name in names))
            listed = ", ".join(short(kind) for kind in kinds[:3]) + and_more(kinds, 3)
            subject = f"{len(names)} tensors are" if len(names) > 1 else "one tensor is"
            yield Cause("tensors", f"{subject} {what}: {listed}", tensors=tuple(names))
    failed = assessment.loaded.failed
    if failed:
        name, why = next(iter(failed.items()))
        text = f"{short(name) or 'the weights'}{and_more(failed)} cannot be put together: {why}"
        yield Cause("tensors", text, tensors=tuple(failed))
