"""Find which values of a field a class accepts, by building it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import lcm

from torch import nn

from ..forward.find_recipe import dry_pass
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import shapes, vanished_counts
from .field_map import FieldMap

STOPS = "the class does not run then"
"""How the reason starts if a class builds at other values but does not run."""


def refusal_of(field_map: FieldMap, values: Mapping[FieldPath, int]) -> Refusal | None:
    """Return the class's refusal of these values, or None if it builds."""
    model = field_map.build_at(values)
    return model if isinstance(model, Refusal) else None


def count_at_zero(field_map: FieldMap, new: nn.Module) -> Refusal | None:
    """Return which count of the class becomes 0 in a build at other values, or None."""
    if isinstance(field_map.unpruned, Refusal):
        return None  # the class refuses its own config: reported long before
    vanished = vanished_counts(field_map.unpruned, new)
    if not vanished:
        return None
    return Refusal(f"{vanished[0]} would be 0: a field that sets no shape would have to follow")


def build_mismatch(
    field_map: FieldMap, new: nn.Module, values: Mapping[FieldPath, int]
) -> Refusal | None:
    """Return how a build at other values differs from a model pruned to them, or None."""
    old, built = field_map.shapes, shapes(new)
    if old.keys() != built.keys():
        return Refusal(f"the class builds other tensors there: {min(old.keys() ^ built.keys())}")
    steps = {field: value - field_map.values[field] for field, value in values.items()}
    others = [
        (name, built[name][dim], pruned_size)
        for (name, dim), expression in field_map.expressions.items()
        if isinstance(dim, int) and name in built and expression.fields & steps.keys()
        if (pruned_size := expression.evaluate(steps)) != built[name][dim]
    ]
    if not others:
        return None
    name, size, pruned_size = min(others)
    return Refusal(f"the class builds {name} with {size}, pruning leaves {pruned_size}")


def run_failure(field_map: FieldMap, new: nn.Module) -> Refusal | None:
    """Return why a class stops running at other values, or None; None too if it never runs.

    A class may build what it cannot compute with (DeepSeek-V2 with an odd ``kv_lora_rank``). Where
    values of tensors decide what is computed, both passes assume the same. The pass is in float32
    whatever the model's dtype (``new`` is float32 afterwards): in another dtype, what a class casts
    to float32 is copied, and may run for that reason alone.
    """
    stopped = dry_pass(new.float(), field_map.recipe) if field_map.runs else None
    if isinstance(stopped, Refusal):
        return Refusal(f"{STOPS}: {stopped.reason}")
    return None


def ungrouped_change(
    field_map: FieldMap, values: Mapping[FieldPath, int], new: nn.Module, held: Set[tuple[str, int]]
) -> Refusal | None:
    """Return which dimension that is in no group (``held``) has an unexpected size, or None."""
    steps = {field: value - field_map.values[field] for field, value in values.items()}
    for name, shape in shapes(new).items():
        was = field_map.shapes.get(name, shape)
        for dim, (size, before) in enumerate(zip(shape, was, strict=True)):
            expression = field_map.expressions.get((name, dim))
            expected = before if expression is None else expression.evaluate(steps)
            if size != expected and (name, dim) not in held:
                return Refusal(
                    f"{name} would have {size} instead of {before} along dimension {dim}, which "
                    "follows it in steps: no unit of it holds a part of that"
                )
    return None


def multiple_of(field_map: FieldMap, field: FieldPath) -> int:
    """Return the number that a field has to stay a multiple of while all other fields stay.

    Llama's ``hidden_size`` has to be a multiple of its attention heads; most widths are free (1).
    """
    value = field_map.values[field]
    others = sorted({v for other, v in field_map.values.items() if other != field and v < value})
    pairs = {lcm(a, b) for a in others[:6] for b in (2, 4, 8)}
    for step in sorted({1, 2, 4, 8, *others, *pairs}):
        if value % step or 3 * step >= value:
            continue
        if all(refusal_of(field_map, {field: value - n * step}) is None for n in (1, 2, 3)):
            return step
    return 1


def nearest_accepted(
    field_map: FieldMap, values: dict[FieldPath, int], field: FieldPath
) -> list[int]:
    """Return the nearest values below and above that the class accepts, as far as 256 away."""
    accepted: list[int] = []
    for direction in (-1, 1):
        for distance in range(1, 257):
            value = values[field] + direction * distance
            if value >= 1 and refusal_of(field_map, {**values, field: value}) is None:
                accepted.append(value)
                break
    return accepted
