"""Settings of a config that say how many layers there are, and which."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from .kinds import by_number, rises
from .reference import Builder, FieldPath, Refusal, shapes, with_values

Shapes = dict[str, tuple[int, ...]]

_FEW = 16
_FEATURES = {"out_features", "out_indices"}


def changes(
    data: dict[str, Any], length: int, left: tuple[int, ...], widths: Set[FieldPath]
) -> list[dict[FieldPath, Any]]:
    """Ways to say that of ``length`` layers some are left: a field, alone or with its lists.

    Or one entry of a list (Swin's ``depths``), a field that counts one more (Mask2Former's
    decoder), or a list of the layers that have something beside them, which is as long (Qwen3-VL).
    """
    found: list[dict[FieldPath, Any]] = []
    keep = len(left)

    def visit(node: dict[str, Any], path: FieldPath) -> None:
        as_long = [key for key, one in node.items() if isinstance(one, list) and len(one) == length]
        # where each of those layers has a width of its own, they only happen to be alike (Swin2SR)
        own = any((*path, key) in widths for key in as_long)
        lists: dict[FieldPath, Any] = {
            (*path, key): [node[key][one] for one in left] for key in as_long if not own
        }
        lists |= {
            (*path, key): _entries_left(value, left)
            for key, value in node.items()
            if by_number(value) and keep <= max(map(int, value)) < length
        }
        numbers: dict[FieldPath, Any] = {
            (*path, key): [left.index(one) for one in value if one in left]
            for key, value in node.items()
            if rises(value) and value[-1] < length != len(value)
        }
        # first, so that no field that is as large by chance goes along
        found.extend({key: value} for key, value in lists.items() if is_numbers(value))
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*path, key))
            elif type(value) is int and 0 <= value - length <= 1 and not own:
                fewer: dict[FieldPath, Any] = {(*path, key): keep + value - length}
                found.extend([fewer, {**fewer, **lists}] if lists else [fewer])
                if numbers:
                    found.append({**fewer, **lists, **numbers})
                if node.keys() >= _FEATURES:  # a backbone's stages by name, of which the last stays
                    unnamed = {(*path, name): None for name in _FEATURES}
                    found.append({**fewer, **lists, **unnamed})
            elif isinstance(value, list) and len(value) <= _FEW and (*path, key) not in widths:
                places = [(*path, key, i) for i, one in enumerate(value) if one == length]
                found.extend({place: keep} for place in places)

    visit(data, ())
    return found


def _entries_left(entries: dict[Any, Any], left: Sequence[int]) -> dict[Any, Any]:
    """What is said of the layers that are left, under their new numbers."""
    by_old = {int(number): (number, entry) for number, entry in entries.items()}
    return {
        type(by_old[old][0])(new): by_old[old][1] for new, old in enumerate(left) if old in by_old
    }


def holds(data: dict[str, Any], path: FieldPath) -> bool:
    """Whether there is such a place yet: a list may have been made shorter, or nothing."""
    node: Any = data
    for key in path:
        if not isinstance(node, (dict, list)) or (isinstance(node, list) and len(node) <= int(key)):
            return False
        node = node.get(key) if isinstance(node, dict) else node[int(key)]
    return True


def is_numbers(value: Any) -> bool:
    """Whether a list can name several layers by their numbers."""
    return rises(value) and len(value) > 1


def are_whole(value: Any) -> bool:
    """Whether this is a list of whole numbers, one at least."""
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def width_lists(builder: Builder, data: dict[str, Any], before: Shapes) -> set[FieldPath]:
    """Lists that hold a width of every layer, of so few that each can be looked at.

    Large numbers are taken for widths, but for one number for all whose double changes nothing
    (Longformer's windows); of small ones, those whose double makes a tensor longer.
    """
    found: set[FieldPath] = set()

    def visit(node: dict[str, Any], path: FieldPath) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*path, key))
            elif isinstance(value, list) and 1 < len(value) <= _FEW:
                if not are_whole(value):
                    continue
                if min(value) > _FEW and len(set(value)) > 1:
                    found.add((*path, key))
                else:
                    after = doubled((*path, key), value)
                    if after != before if min(value) > _FEW else longer(after):
                        found.add((*path, key))

    def doubled(path: FieldPath, value: list[int]) -> Shapes:
        model = builder.build(with_values(data, {(*path, len(value) - 1): 2 * value[-1]}))
        return {} if isinstance(model, Refusal) else shapes(model)

    def longer(after: Shapes) -> bool:
        return after.keys() == before.keys() and any(
            shape[:1] != before[name][:1] for name, shape in after.items()
        )

    visit(data, ())
    return found
