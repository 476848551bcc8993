"""Find the settings of a config that give the number of layers, or name some of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, value_at, with_values
from ..model.shapes import Shapes

_FEW = 16
"""Lists of up to so many entries are looked at; numbers above it may be widths."""
FEATURES = {"out_features", "out_indices"}
"""Fields in which a backbone names the stages that it returns."""


def changes(
    data: dict[str, Any], length: int, keep: tuple[int, ...], widths: Set[FieldPath]
) -> list[dict[FieldPath, Any]]:
    """Return changes of the config after which only the layers to ``keep`` may remain, in order.

    A change sets a field that counts layers, alone or together with the lists that have an entry
    for each layer. It may also set one entry of a list (Swin's ``depths``), a field that counts one
    more (Mask2Former's decoder), or a list of the layers that have something beside them, which is
    as long (Qwen3-VL). ``widths`` are lists that hold a width of each layer; these stay.
    """
    candidates: list[dict[FieldPath, Any]] = []
    count = len(keep)

    def visit(node: dict[str, Any], field: FieldPath) -> None:
        as_long = [key for key, v in node.items() if isinstance(v, list) and len(v) == length]
        # layers that each have a width of their own are only alike by chance (Swin2SR)
        has_widths = any((*field, key) in widths for key in as_long)
        lists: dict[FieldPath, Any] = {
            (*field, key): [node[key][n] for n in keep] for key in as_long if not has_widths
        }
        lists |= {
            (*field, key): entries_of_kept(value, keep)
            for key, value in node.items()
            if by_number(value) and count <= max(map(int, value)) < length
        }
        numbers: dict[FieldPath, Any] = {
            (*field, key): [keep.index(n) for n in value if n in keep]
            for key, value in node.items()
            if rises(value) and value[-1] < length != len(value)
        }
        # first, so that no field that equals the length by chance changes too
        candidates.extend({key: value} for key, value in lists.items() if may_name_layers(value))
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*field, key))
            elif type(value) is int and 0 <= value - length <= 1 and not has_widths:
                fewer: dict[FieldPath, Any] = {(*field, key): count + value - length}
                candidates.extend([fewer, {**fewer, **lists}] if lists else [fewer])
                if numbers:
                    candidates.append({**fewer, **lists, **numbers})
                # a backbone names its stages; without names it returns the last one
                if node.keys() >= FEATURES:
                    unnamed = {(*field, name): None for name in FEATURES}
                    candidates.append({**fewer, **lists, **unnamed})
            elif isinstance(value, list) and len(value) <= _FEW and (*field, key) not in widths:
                entries = [(*field, key, i) for i, entry in enumerate(value) if entry == length]
                candidates.extend({entry: count} for entry in entries)

    visit(data, ())
    return candidates


def with_rules(
    change: Mapping[FieldPath, Any], data: dict[str, Any], length: int, keep: Sequence[int]
) -> Iterator[dict[FieldPath, Any]]:
    """Yield a change of :func:`changes` with a rule beside its number of layers restated.

    A rule says how many of the first or last layers are of one kind (Gemma 4's that share keys and
    values).
    """
    for field in [field for field, value in change.items() if type(value) is int]:
        node = value_at(data, field[:-1])
        for key, count in restated(node, length, keep) if isinstance(node, dict) else ():
            if (*field[:-1], key) not in change:
                yield {**change, (*field[:-1], key): count}


def restated(
    values: Mapping[str, Any], length: int, keep: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """Yield settings that may say how many of the first or last layers are of one kind.

    Each with its value for the layers to ``keep``, where that is another. ``values`` are a
    config's settings beside the number of layers, ``length``.
    """
    for key, value in values.items():
        if type(value) is int and 0 < value <= length and key not in of_every_config():
            first = sum(number < value for number in keep)
            last = sum(number >= length - value for number in keep)
            yield from ((key, count) for count in dict.fromkeys((first, last)) if count != value)


@functools.cache
def of_every_config() -> frozenset[str]:
    """Return the fields that every config may have (labels, tokens, generation): no layers."""
    from transformers import GenerationConfig, PretrainedConfig

    configs: tuple[Any, ...] = (PretrainedConfig, GenerationConfig)
    return frozenset(name for config in configs for name in config().to_dict())


def entries_of_kept(entries: dict[Any, Any], keep: Sequence[int]) -> dict[Any, Any]:
    """Return the entries about the layers to keep, under their new numbers."""
    by_old = {int(number): (number, entry) for number, entry in entries.items()}
    return {
        type(by_old[old][0])(new): by_old[old][1] for new, old in enumerate(keep) if old in by_old
    }


def holds(data: dict[str, Any], field: FieldPath) -> bool:
    """True if the config can hold this field: an earlier change may have shortened its list."""
    node: Any = data
    for key in field:
        if not isinstance(node, (dict, list)) or (isinstance(node, list) and len(node) <= int(key)):
            return False
        node = node.get(key) if isinstance(node, dict) else node[int(key)]
    return True


def rises(value: Any) -> bool:
    """True if a list may hold numbers of layers: rising whole numbers from 0 on, at least one."""
    return is_whole_number_list(value) and value == sorted(set(value)) and value[0] >= 0


def by_number(value: Any) -> bool:
    """True if this is a dictionary of entries for some layers, by their numbers (Gemma 4)."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def may_name_layers(value: Any) -> bool:
    """True if a list may name several layers by their numbers."""
    return rises(value) and len(value) > 1


def is_whole_number_list(value: Any) -> bool:
    """True if this is a list of whole numbers, at least one."""
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def width_lists(builder: Builder, data: dict[str, Any], before: Shapes) -> set[FieldPath]:
    """Return the lists that hold a width of each layer, among lists short enough to look at each.

    Lists of large numbers hold widths, unless all numbers are equal and doubling the last one
    changes no shape (Longformer's windows). Lists of small numbers do if doubling the last one
    changes how long some tensor is along its first dimension. ``before`` is what the class builds.
    """
    lists: set[FieldPath] = set()

    def visit(node: dict[str, Any], field: FieldPath) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, (*field, key))
            elif is_whole_number_list(value) and 1 < len(value) <= _FEW:
                if min(value) > _FEW and len(set(value)) > 1:
                    lists.add((*field, key))
                else:
                    wider = with_values(data, {(*field, key, len(value) - 1): 2 * value[-1]})
                    after = builder.shapes_at(wider)
                    if after != before if min(value) > _FEW else _longer(before, after):
                        lists.add((*field, key))

    visit(data, ())
    return lists


def _longer(before: Shapes, after: Shapes | Refusal) -> bool:
    """True if some tensor has another first dimension, and no tensor was added or removed."""
    return (
        not isinstance(after, Refusal)
        and after.keys() == before.keys()
        and any(shape[:1] != before[name][:1] for name, shape in after.items())
    )
