"""Several fields in one build, where they cannot be taken for each other: learning costs builds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .reference import FieldPath, Refusal

if TYPE_CHECKING:
    from .study import Sizes, Study


def without_effect(study: Study, probes: Mapping[FieldPath, int]) -> set[FieldPath]:
    """The fields that change nothing at these values, or that can be no number.

    Halves are asked until all are told apart; a name that is no number in one config is none in
    those inside it either.
    """
    quiet: set[FieldPath] = set()
    no_numbers: set[str | int] = set()

    def ask(paths: Sequence[FieldPath]) -> None:
        left = [path for path in paths if path[-1] not in no_numbers]
        if not left:
            return
        seen = study.quiet({path: probes[path] for path in left})
        if seen is True:
            quiet.update(left)
        elif len(left) > 1:
            ask(left[: len(left) // 2])
            ask(left[len(left) // 2 :])
        elif isinstance(seen, Refusal) and "'int' object" in seen.reason:  # Python's words
            no_numbers.add(left[0][-1])

    ask(list(probes))
    return quiet | {path for path in probes if path[-1] in no_numbers}


def each_of(
    study: Study, probes: Mapping[FieldPath, int], moved: Mapping[FieldPath, Sizes]
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """What each field moves at its probe: fields that moved nothing in common go in one build.

    Args:
        study: builds.
        probes: a value for each field.
        moved: what the field moved at another value.
    """
    groups: list[list[FieldPath]] = []
    for path in probes:
        for group in groups:
            if all(moved[path].keys().isdisjoint(moved[other]) for other in group):
                group.append(path)
                break
        else:
            groups.append([path])
    for group in groups:
        yield from _told_apart(study, group, probes, moved)


def _told_apart(
    study: Study,
    group: Sequence[FieldPath],
    probes: Mapping[FieldPath, int],
    moved: Mapping[FieldPath, Sizes],
) -> Iterator[tuple[FieldPath, int, Sizes]]:
    """What is seen of each field of a group; nothing of a field that has to be asked alone."""
    if len(group) < 2:
        return
    heads = any(isinstance(which, str) for path in group for _, which in moved[path])
    sizes = study.at({path: probes[path] for path in group}, watch=heads)
    known = {key for path in group for key in moved[path]}
    if not isinstance(sizes, dict) or any(size and key not in known for key, size in sizes.items()):
        half = len(group) // 2
        yield from _told_apart(study, group[:half], probes, moved)
        yield from _told_apart(study, group[half:], probes, moved)
        return
    for path in group:
        mine = {key: size for key, size in sizes.items() if key in moved[path]}
        if mine:
            yield path, probes[path], mine
