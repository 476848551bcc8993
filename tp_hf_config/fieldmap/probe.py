"""Probe a field: give it another value, build the class, and see which sizes changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import permutations
from typing import TypeVar

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.find_recipe import find_recipe
from ..forward.head_splits import HeadSplits, counts_of, observe
from ..forward.run_recipe import MakeInputs, RunRecipe
from ..model.build import Builder, Refusal
from ..model.config_json import FieldPath, value_at, with_values
from ..model.shapes import Shapes, named_modules, shapes, vanished_counts
from .field_map import Depth, Power, Quantity, Values, followed

Sizes = dict[Quantity, int]
UNSET_PROBES = (24, 40, 8, 2, 4, 1)  # values at which a field that has no value is probed


@dataclass(frozen=True)
class Probe:
    value: int
    sizes: Sizes  # of changed quantities; 0 if the forward pass stopped before


Probes = Mapping[FieldPath, Sequence[Probe]]


def probe_values(value: int) -> list[int]:
    """Return other values to probe a field at, those first that classes are likely to accept."""
    tried = [2 * value, 3 * value, value + 1, 4 * value]
    if value > 1:
        if value % 2 == 0 and value > 2:  # not 2 to 1: one head is no split
            tried.insert(1, value // 2)
        tried += [value - 1, 1]
        tried += [value // factor for factor in (3, 5, 7) if value % factor == 0]
    return list(dict.fromkeys(other for other in tried if other != value and other > 0))


def breaks_off(sizes: Sizes) -> bool:
    """True if a projection's width changed and the forward pass stopped before splitting it."""
    # Falcon's heads are in groups of whole numbers; twice as many groups need not divide them
    return any(
        not size and sizes.get((f"{name}.weight", 0))
        for (name, which), size in sizes.items()
        if isinstance(which, str)
    )


def on_a_line(base: Sizes, value: int, one: Probe, two: Probe) -> bool:
    """True if two probes change every size that both observed by the same amount per field unit."""
    return all(
        (one.sizes[key] - base[key]) * (two.value - value)
        == (two.sizes[key] - base[key]) * (one.value - value)
        for key in one.sizes.keys() & two.sizes.keys()
        if one.sizes[key] and two.sizes[key]
    )


def extrapolated(base: Sizes, value: int, probes: Sequence[Probe], then: int) -> Sizes | None:
    """Return sizes on the straight lines through the probes; None: no lines, or not whole."""
    first, *others = probes
    if not all(on_a_line(base, value, first, other) for other in others):
        return None
    sizes: Sizes = {}
    for key, size in first.sizes.items():
        change, remainder = divmod((size - base[key]) * (then - value), first.value - value)
        if remainder or not size:
            return None
        sizes[key] = base[key] + change
    return sizes


def is_rounded(base: Sizes, value: int, one: Probe, two: Probe) -> bool:
    """True if a size is in proportion to the field in ``one``, not in ``two`` (CANINE's shards)."""
    return any(
        one.sizes[key] * value == base[key] * one.value
        and two.sizes[key] * value != base[key] * two.value
        for key in one.sizes.keys() & two.sizes.keys()
        if one.sizes[key] and two.sizes[key]
    )


_OTHER_TENSORS = 5  # values with other tensors that are tried before a field is given up
_ROUNDED = 3  # values with a rounded size that are tried before one of them is used


class Study:
    """Builds a class around one shallow config, and compares what it builds."""

    def __init__(
        self,
        builder: Builder,
        depth: Depth,
        implied: Values,
        recipe: RunRecipe | None = None,
        make_inputs: MakeInputs | None = None,
        values: Values | None = None,
    ):
        self.builder = builder
        self.values = values or {}  # the fields to probe, as the config has or implies them
        # fields that the class accepts no other value of, alone or with one other field
        self.refused: list[FieldPath] = []
        self.ratio_rules: dict[FieldPath, Power] = {}  # fields that follow others in every build
        self.first = cache(depth.first)
        self.data = with_values(depth.data, implied)
        model = self.build({})
        if isinstance(model, Refusal):
            raise UnsupportedModelError(
                f"the class cannot be built from its own config: {model.reason}"
            )
        self.model = model
        self.shapes = shapes(model)
        self.recipe = find_recipe(model, make_inputs) if recipe is None else recipe
        self.splits = observe(model, self.recipe)
        self.base = self._sizes(self.shapes, self.splits)
        self.attributes = _numbers(model)  # numeric ones of its modules
        self.split_weights = {f"{name}.weight" for name in self.splits.heads}
        self._repeating: Counter[FieldPath] = Counter()
        self.vanishing: dict[FieldPath, bool] = {}  # whether a lower value made some count 0

    def build(self, values: Values) -> nn.Module | Refusal:
        return self.builder.build(
            with_values(self.data, {**values, **followed(self.ratio_rules, values)})
        )

    def at(self, values: Values, watch: bool = True) -> Sizes | Refusal | None:
        """Return the quantities that change at these values, with their sizes; None: other tensors.

        A size that was not observed is 0. Head counts are observed only with ``watch``.
        """
        model = self.build(values)
        if isinstance(model, Refusal):
            return model
        built = shapes(model)
        if built.keys() != self.shapes.keys():
            repeats = all(self.shapes.get(name, shape) == shape for name, shape in built.items())
            self._repeating.update(list(values) if repeats and len(values) == 1 else [])
            return None
        if any(len(shape) != len(self.shapes[name]) for name, shape in built.items()):
            return None  # a dense layer became one in groups (ConvBERT)
        own_values = {field: value_at(self.data, field) or 0 for field in values}
        lower = [field for field, value in values.items() if value < own_values[field]]
        if lower:
            vanished = bool(vanished_counts(self.model, model))
            self.vanishing.update(
                dict.fromkeys(lower, vanished) if len(values) == 1 or not vanished else {}
            )
        sizes = self._sizes(built, HeadSplits())
        moved = {key[0] for key, size in sizes.items() if self.base[key] != size}
        changed = _changed(self.attributes, _numbers(model))
        if not moved and not changed:
            return {}
        sizes = dict.fromkeys(self.base, 0) | sizes
        may_split = bool(moved & self.split_weights) or self._around_splits(changed)
        if watch and may_split:  # head counts may change where no projection does (Swin)
            sizes |= self._sizes(built, observe(model, self.recipe))
        elif not moved & self.split_weights:
            sizes = self.base | sizes  # head counts change only with a projection
            sizes |= {key: self.base[key] for key, size in sizes.items() if not size}
        return {key: size for key, size in sizes.items() if self.base.get(key, size) != size}

    def _around_splits(self, changed: Collection[str]) -> bool:
        """True if one of these modules holds a projection that is split, one or two levels down."""
        around = set()
        for name in self.splits.heads:
            parent = name.rpartition(".")[0]
            around |= {parent, parent.rpartition(".")[0]}
        return bool(around & set(changed))

    def counts_layers(self, field: FieldPath) -> bool:
        """True if at least two other values of a field only added or removed tensors."""
        return self._repeating[field] > 1  # once may be a projection between two equal widths

    def _sizes(self, built: Shapes, splits: HeadSplits) -> Sizes:
        """Return the quantities of a built model, of the first layer of each kind."""
        sizes: Sizes = {
            (name, dim): size for name, shape in built.items() for dim, size in enumerate(shape)
        }
        for name, pieces in splits.heads.items():
            counts = counts_of(pieces, self.splits.heads.get(name, ()))
            sizes.update({(name, which): count for which, count in counts.items()})
        return {key: size for key, size in sizes.items() if self.first(key[0]) == key[0]}

    def times(self, factor: int, *fields: FieldPath) -> dict[FieldPath, int]:
        return {field: factor * self.values[field] for field in fields}

    def alone(self, field: FieldPath) -> list[Probe] | Refusal | None:
        """Return up to two probes of one field by itself; empty: it sets nothing.

        If no probe succeeds, return the first refusal, or None if some value builds other tensors.
        """
        value, probes, rounded = self.values[field], list[Probe](), list[Probe]()
        failures: list[Refusal | None] = []
        for other in probe_values(value):
            heads = any(isinstance(which, str) for probe in probes for _, which in probe.sizes)
            sizes = self.at({field: other}, watch=heads or not probes)
            if not isinstance(sizes, dict):
                failures.append(sizes)
                if self.counts_layers(field) or failures.count(None) == _OTHER_TENSORS:
                    break
                continue
            if not sizes:
                return probes
            if not any(sizes.values()):
                continue  # the forward pass stopped earlier (a router short of experts)
            if probes:  # what changes only now was rounded: six heads need not divide a width
                sizes = {key: size for key, size in sizes.items() if key in probes[0].sizes}
            candidate = Probe(other, sizes)
            uneven = bool(probes) and is_rounded(self.base, value, probes[0], candidate)
            (rounded if uneven else probes).append(candidate)
            if len(probes) == 2 or len(rounded) == _ROUNDED:
                break
        probes += rounded[: 2 - len(probes)]
        if probes or not failures:
            return probes
        return None if None in failures else failures[0]


def _numbers(model: nn.Module) -> dict[str, dict[str, float]]:
    return {
        name: {key: value for key, value in vars(module).items() if type(value) in (int, float)}
        for name, module in named_modules(model)
    }


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [name for name, numbers in after.items() if before.get(name) != numbers]


_Fields = TypeVar("_Fields")


def may_matter(
    fields: Sequence[_Fields], changes_nothing: Callable[[Sequence[_Fields]], bool]
) -> Iterator[_Fields]:
    """Yield the fields, or lists of fields, that can change the result, in order (bisection)."""
    if not fields or changes_nothing(fields):
        return
    if len(fields) == 1:
        yield fields[0]
        return
    half = len(fields) // 2
    yield from may_matter(fields[:half], changes_nothing)
    yield from may_matter(fields[half:], changes_nothing)


def show_heads(study: Study, probes: Probes) -> None:
    """Add to the probes the head counts that show only if head_dim does not change.

    Qwen2-VL's rotary sections add up to head_dim: with another head count or hidden size alone, the
    forward pass stops before the queries are split. So both are doubled in one build.
    """
    hidden_counts = _hidden_heads(study, probes)
    unobserved = {
        field: {k for k in hidden_counts if all(probe.sizes.get(k) == 0 for probe in field_probes)}
        for field, field_probes in probes.items()
    }
    moved = {
        field: {key for probe in field_probes for key in probe.sizes}
        for field, field_probes in probes.items()
    }
    for count, width in permutations(filter(unobserved.get, unobserved), 2):
        keys = {
            key
            for key in hidden_counts & unobserved[count] & unobserved[width]
            if (f"{key[0]}.weight", 0) in moved[width]
            and not {(f"{key[0]}.weight", 0), (f"{key[0]}.weight", 1)} & moved[count]
        }
        sizes = study.at(study.times(2, count, width)) if keys else None
        if not isinstance(sizes, dict):
            continue
        for key in (key for key in keys if sizes.get(key) == 2 * study.base[key]):
            hidden_counts.discard(key)
            for probe in probes[count]:
                share = Fraction(probe.value * study.base[key], study.values[count])
                probe.sizes[key] = int(share) if share.denominator == 1 else 0
            for probe in probes[width]:
                del probe.sizes[key]


def _hidden_heads(study: Study, probes: Probes) -> set[Quantity]:
    """Return the head counts that change in no probe of any field."""
    sizes = [probe.sizes for field_probes in probes.values() for probe in field_probes]
    return {
        key
        for key in study.base
        if isinstance(key[1], str) and not any(changed.get(key) for changed in sizes)
    }
