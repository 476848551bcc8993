"""Which values of a field a class accepts, found by asking it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import lcm

from torch import nn

from .dry_pass import dry_pass
from .learn import ConfigMap
from .reference import FieldPath, Refusal, shapes, vanished_counts

STOPS = "the class does not run then"


def accepts(known: ConfigMap, values: Mapping[FieldPath, int]) -> Refusal | None:
    """The class's own words where it refuses these values; None where it builds."""
    model = known.build_at(values)
    return model if isinstance(model, Refusal) else None


def vanishing(known: ConfigMap, new: nn.Module) -> str | None:
    """Which count of the class is 0 in a build at other values, though it was not before."""
    if isinstance(known.unpruned, Refusal):
        return None  # its own config: refused long ago
    vanished = vanished_counts(known.unpruned, new)
    if not vanished:
        return None
    return f"{vanished[0]} would be 0: a field that sets no shape would have to follow"


def other_tensors(known: ConfigMap, new: nn.Module, values: Mapping[FieldPath, int]) -> str | None:
    """Why what the class builds at other values is not what pruning leaves."""
    old, built = known.shapes, shapes(new)
    if old.keys() != built.keys():
        return f"the class builds other tensors there: {min(old.keys() ^ built.keys())}"
    moves = {path: value - known.values[path] for path, value in values.items()}
    others = [
        (name, built[name][dim], left)
        for (name, dim), expression in known.expressions.items()
        if isinstance(dim, int) and name in built and expression.fields & moves.keys()
        if (left := expression.evaluate(moves)) != built[name][dim]
    ]
    if not others:
        return None
    name, size, left = min(others)
    return f"the class builds {name} with {size}, pruning leaves {left}"


def stopping(known: ConfigMap, new: nn.Module) -> str | None:
    """Why a class does not run at other values, where it does at those that it has.

    It may build what it cannot compute with (DeepSeek-V2 with an odd ``kv_lora_rank``).  Where
    values decide what is computed, both passes take the same for granted.  In float32, whatever the
    model is in: what a class casts to it is copied, and may run by that alone.

    Args:
        known: the class.
        new: the build at the other values, without data; it is float32 afterwards.
    """
    stopped = dry_pass(new.float()) if known.runs else None
    if isinstance(stopped, Refusal):
        return f"{STOPS}: {stopped.reason}"
    return None


def straying(
    known: ConfigMap, values: Mapping[FieldPath, int], new: nn.Module, held: Set[tuple[str, int]]
) -> str | None:
    """Which dimension is not what the map says of other values, and in no group.

    Args:
        known: the class.
        values: of the fields that are not as they were.
        new: the build at these.
        held: dimensions that are in a group.
    """
    moves = {path: value - known.values[path] for path, value in values.items()}
    for name, shape in shapes(new).items():
        was = known.shapes.get(name, shape)
        for dim, (size, before) in enumerate(zip(shape, was, strict=True)):
            expression = known.expressions.get((name, dim))
            expected = before if expression is None else expression.evaluate(moves)
            if size != expected and (name, dim) not in held:
                return (
                    f"{name} would have {size} instead of {before} along dimension {dim}, which "
                    "follows it in steps: no unit of it holds a part of that"
                )
    return None


def multiple_of(known: ConfigMap, path: FieldPath) -> int:
    """The number that a field has to stay a multiple of, with all other fields as they are.

    Llama's ``hidden_size`` has to be a multiple of its attention heads; most widths are free (1).
    """
    value = known.values[path]
    others = sorted({v for other, v in known.values.items() if other != path and v < value})
    pairs = {lcm(a, b) for a in others[:6] for b in (2, 4, 8)}
    for step in sorted({1, 2, 4, 8, *others, *pairs}):
        if value % step or 3 * step >= value:
            continue
        if all(accepts(known, {path: value - n * step}) is None for n in (1, 2, 3)):
            return step
    return 1


def nearest_accepted(known: ConfigMap, values: dict[FieldPath, int], path: FieldPath) -> list[int]:
    """The nearest value below and above that the class accepts with the other ``values``."""
    found: list[int] = []
    for direction in (-1, 1):
        for distance in range(1, 257):
            value = values[path] + direction * distance
            if value >= 1 and accepts(known, {**values, path: value}) is None:
                found.append(value)
                break
    return found
