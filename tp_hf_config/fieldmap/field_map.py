"""The field map of a class: which config fields set which dimensions, learned around one config.

Sizes are exact expressions: sums of products, and products of powers, of fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, reduce
from itertools import combinations
from math import isqrt, lcm, prod
from typing import Any

from torch import nn

from ..forward.find_recipe import dry_pass
from ..forward.head_splits import HeadSplits
from ..forward.run_recipe import PLAIN, RunRecipe
from ..model.build import Builder, Refusal
from ..model.config_json import EntryOfKind, FieldPath, field_name, with_values
from ..model.shapes import Shapes, shapes, vanished_counts

# (tensor name, dimension), or (layer name, name of its head count as ``heads_of`` returns it)
Quantity = tuple[str, int | str]
Values = Mapping[FieldPath, int]  # of fields, or their steps (changes of value)


@dataclass(frozen=True)
class Expression:
    """``base`` plus, for sets of fields, a coefficient times their steps (changes of value)."""

    base: int  # the size when no field changes
    terms: Mapping[frozenset[FieldPath], Fraction]  # fields -> coefficient; no constant term

    @property
    def fields(self) -> frozenset[FieldPath]:
        return frozenset(name for names in self.terms for name in names)

    def evaluate(self, steps: Values) -> Fraction:
        total = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            total += coefficient * prod(steps.get(name, 0) for name in fields)
        return total

    def times(self, ratio: Fraction) -> Expression:
        if ratio == 1:
            return self
        terms = {fields: coefficient * ratio for fields, coefficient in self.terms.items()}
        return Expression(int(self.base * ratio), terms)

    def around(
        self, steps: Values, renamed: Mapping[FieldPath, FieldPath] | None = None
    ) -> Expression:
        """Return the same size around other field values (``steps`` away), with fields renamed."""
        names, terms = renamed or {}, dict[frozenset[FieldPath], Fraction]()
        for fields, coefficient in self.terms.items():
            for size in range(1, len(fields) + 1):
                for chosen in map(frozenset, combinations(fields, size)):
                    rest = prod(steps.get(name, 0) for name in fields - chosen)
                    moved = frozenset(names.get(name, name) for name in chosen)
                    terms[moved] = terms.get(moved, Fraction(0)) + coefficient * rest
        base = int(self.evaluate(steps))
        return Expression(base, {fields: factor for fields, factor in terms.items() if factor})

    def monomials(self, values: Values) -> Mapping[frozenset[FieldPath], Fraction]:
        """Return the size as a sum of products of field values: fields -> factor, no constant."""
        return self.around({name: -value for name, value in values.items()}).terms

    def step_to(self, name: FieldPath, steps: Values, target: int) -> Fraction | None:
        """Return the step of one field that makes the size ``target``; None: it has no effect."""
        slope = Fraction(0)
        rest = Fraction(self.base)
        for fields, coefficient in self.terms.items():
            value = coefficient * prod(steps.get(other, 0) for other in fields if other != name)
            if name in fields:
                slope += value
            else:
                rest += value
        return (target - rest) / slope if slope else None


@dataclass(frozen=True)
class Power:
    """``base`` times a power of each field over its base value (hidden size over heads)."""

    base: int  # the size when no field changes
    exponents: Values  # each is 1, 2, -1 or -2
    values: Values  # the base value of each field

    @property
    def fields(self) -> frozenset[FieldPath]:
        return frozenset(self.exponents)

    def evaluate(self, steps: Values) -> Fraction:
        return prod(
            (self._factor(name, steps) for name in self.exponents), start=Fraction(self.base)
        )

    def times(self, ratio: Fraction) -> Power:
        return self if ratio == 1 else replace(self, base=int(self.base * ratio))

    def step_to(self, name: FieldPath, steps: Values, target: int) -> Fraction | None:
        """Return the step to ``target``; roots are rounded down: check it with ``evaluate``."""
        if name not in self.exponents:
            return None
        others = (self._factor(other, steps) for other in self.exponents if other != name)
        ratio = target / prod(others, start=Fraction(self.base))
        exponent = self.exponents[name]
        if exponent < 0:
            ratio = 1 / ratio
        if abs(exponent) == 2:
            ratio = Fraction(isqrt(ratio.numerator), isqrt(ratio.denominator))
        return self.values[name] * (ratio - 1)

    def _factor(self, name: FieldPath, steps: Values) -> Fraction:
        value = self.values[name]
        factor: Fraction = Fraction(value + steps.get(name, 0), value) ** self.exponents[name]
        return factor


def followed(rules: Mapping[FieldPath, Power], values: Values) -> dict[FieldPath, int]:
    """Return the values that the rules set for fields not given; none that is not whole."""
    following: dict[FieldPath, int] = {}
    for name, rule in rules.items():
        if name not in values and rule.fields & values.keys():
            steps = {p: values[p] - rule.values[p] for p in rule.fields & values.keys()}
            value = rule.evaluate(steps)
            if value.denominator == 1:
                following[name] = int(value)
    return following


def product(base: int, values: Values) -> Expression:
    """Return the expression for ``base`` times each field over its base value."""
    names = sorted(values, key=str)
    return Expression(
        base,
        {
            frozenset(chosen): Fraction(base, prod(values[name] for name in chosen))
            for size in range(1, len(names) + 1)
            for chosen in combinations(names, size)
        },
    )


@dataclass(frozen=True, eq=False)
class FieldMap:
    """Which config fields set which dimensions of a class, learned around one config."""

    builder: Builder
    data: dict[str, Any]  # the config's JSON when the map was learned, with every default
    values: dict[FieldPath, int]  # the fields that set something, as ``data`` has or implies them
    unset: frozenset[FieldPath]  # those of ``values`` that are None or absent in ``data``
    expressions: dict[Quantity, Expression]  # of the shallow model, as ``powers`` and ``unfitted``
    depth: Depth
    splits: HeadSplits  # of the shallow model
    # OPT builds other layers if ``word_embed_proj_dim`` is not ``hidden_size``
    must_equal: dict[FieldPath, FieldPath] = dataclasses.field(default_factory=dict)
    # field that cannot change alone -> fields that may change in proportion with it: in Mamba 2,
    # hidden size times ``expand`` is heads times head dim
    ratio_partners: dict[FieldPath, tuple[FieldPath, ...]] = dataclasses.field(default_factory=dict)
    # for one field of each proportion, how the other fields determine it
    ratio_rules: dict[FieldPath, Power] = dataclasses.field(default_factory=dict)
    # ``values``, and the fields that set sizes but not linearly (an image's size)
    sizes: dict[FieldPath, int] = dataclasses.field(default_factory=dict)
    # not linear, but powers of fields (hidden size over heads)
    powers: dict[Quantity, Power] = dataclasses.field(default_factory=dict)
    # neither (rounded sizes) -> the fields that change them
    unfitted: dict[Quantity, frozenset[FieldPath]] = dataclasses.field(default_factory=dict)
    # other whole numbers that the class reads and that set no quantity
    non_size_fields: dict[FieldPath, int] = dataclasses.field(default_factory=dict)
    recipe: RunRecipe = PLAIN
    digest: str | None = None  # of the class's code, for the cache on disk; None: not cached

    def count_fields(self) -> frozenset[FieldPath]:
        """Return the fields that set the number of heads of some layer's output."""
        return frozenset(
            field
            for (_, which), expression in self.expressions.items()
            if isinstance(which, str)
            for field in expression.fields
        )

    def moves_shapes(self, field: FieldPath) -> bool:
        return any(
            isinstance(which, int) and field in expression.fields
            for (_, which), expression in self.expressions.items()
        )

    def config_at(self, values: Values, shallow: bool = True) -> dict[str, Any]:
        """Return the config's JSON with these values and with the fields that depend on them."""
        # unset fields are written out, so that they do not change with other fields
        full = {field: self.values[field] for field in self.unset}
        full.update({**values, **followed(self.ratio_rules, values)})
        for follower, leader in self.must_equal.items():
            if leader in values:
                full[follower] = values[leader]
        return with_values(self.depth.data if shallow else self.data, full)

    def build_at(self, values: Values) -> nn.Module | Refusal:
        return self.builder.build(self.config_at(values))

    def shapes_at(self, values: Values) -> Shapes | Refusal:
        return self.builder.shapes_at(self.config_at(values))

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """Cache for the results of experiments with this field map, by kind of experiment."""
        return {}

    @cached_property
    def unpruned(self) -> nn.Module | Refusal:
        return self.build_at({})

    @cached_property
    def runs(self) -> bool:
        """True if the shallow model completes a forward pass on the meta device, in float32."""
        model = self.build_at({})
        if isinstance(model, Refusal):
            return False
        return not isinstance(dry_pass(model.float(), self.recipe), Refusal)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {} if isinstance(self.unpruned, Refusal) else shapes(self.unpruned)

    def splits_of(self, name: str) -> tuple[tuple[int, ...], ...] | None:
        """Return (heads, [parts,] head_dim) for each piece of a full model's layer output."""
        return self.full_splits(self.depth.canonical(name))

    def full_splits(self, shallow_name: str) -> tuple[tuple[int, ...], ...] | None:
        splits = self.splits.heads.get(shallow_name)
        if splits is None or not self.depth.pieces:
            return splits
        ratio = self.depth.times_outputs(shallow_name, sum(map(prod, splits)), self.shapes)
        return tuple((int(heads * ratio), *sizes) for heads, *sizes in splits)

    def fields_of(self, name: str, which: int | str) -> frozenset[FieldPath]:
        """Return the fields that set a dimension or head count (``heads_of``) of the full model."""
        expression = self.expressions.get((self.depth.canonical(name), which))
        return expression.fields if expression else frozenset()

    def expression_of(self, name: str, which: int | str) -> Expression | None:
        expression = self.expressions.get((self.depth.canonical(name), which))
        return expression and expression.times(self.depth.times(name, which))

    def power_of(self, name: str, which: int | str) -> Power | None:
        power = self.powers.get((self.depth.canonical(name), which))
        return power and power.times(self.depth.times(name, which))


def nonlinear_fields(field_map: FieldMap) -> frozenset[FieldPath]:
    powers = (power.fields for power in field_map.powers.values())
    return frozenset().union(*powers, *field_map.unfitted.values())


def state_of(field_map: FieldMap) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(field_map)} - {"builder", "digest"}
    return {name: getattr(field_map, name) for name in names}


def from_state(builder: Builder, digest: str | None, state: Mapping[str, Any]) -> FieldMap:
    attention = state["recipe"].attention
    return FieldMap(builder=builder.with_attention(attention), digest=digest, **state)


# name of a list of layers -> for each of its layers, the number of another layer
Numbers = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Depth:
    """A config with the fewest layers that contain every kind, and how names map onto it."""

    data: dict[str, Any]  # the shallow config's JSON
    # for each change that removed layers, and each layer before it: the number of the first
    # remaining layer of its kind
    steps: tuple[Numbers, ...] = ()
    # for each layer of the shallow model: the number of the first layer of its kind
    first_of_kind: Numbers = dataclasses.field(default_factory=dict)
    # for each change, and each remaining layer: the number that a layer of its kind had before;
    # another for each layer while there are enough
    stands_for: tuple[Numbers, ...] = ()
    # tensor dims outside the layers with an equal piece for every layer (Gemma 4's embedding) ->
    # size in the full model over size in the shallow one
    pieces: Mapping[tuple[str, int], Fraction] = dataclasses.field(default_factory=dict)
    # list in the config with an entry for each layer -> the keys of its entries for each kind
    entries: Mapping[FieldPath, tuple[EntryOfKind, ...]] = dataclasses.field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def canonical(self, name: str) -> str:
        """Return the shallow model's name for a tensor or module of the full model."""
        if name not in self._canonical:
            self._canonical[name] = reduce(renumbered, self.steps, name)
        return self._canonical[name]

    @cached_property
    def _canonical(self) -> dict[str, str]:  # a cache: a deep model's names are asked for often
        return {}

    @property
    def entry_names(self) -> list[str]:
        """The fields in ``entries`` as text: ``intermediate_size[0-3]``."""
        return [field_name((*field, key)) for field, keys in self.entries.items() for key in keys]

    def by_kinds(self, values: Values) -> dict[FieldPath, int]:
        """Return fields with their values, with one field for all entries of each kind of layer."""
        result: dict[FieldPath, int] = {}
        for field, value in values.items():
            keys = self.entries.get(field[:-1], field[-1:])
            result.update({(*field[:-1], key): value for key in keys if key == field[-1]})
        return result

    def times(self, name: str, which: int | str) -> Fraction:
        """Return the size of a quantity in the full model over its size in the shallow one."""
        if isinstance(which, str) or not self.pieces:
            return Fraction(1)
        return self.pieces.get((self.canonical(name), which), Fraction(1))

    def times_outputs(self, shallow_name: str, outputs: int, shallow_shapes: Shapes) -> Fraction:
        """Return how many outputs a layer has in the full model, over those in the shallow one."""
        weight = f"{shallow_name}.weight"  # of an embedding, the outputs are the last dim
        ratios = (
            self.pieces.get((weight, dim))
            for dim, size in enumerate(shallow_shapes.get(weight, ()))
            if size == outputs
        )
        return next((ratio for ratio in ratios if ratio is not None), Fraction(1))

    def with_all_pieces(self, shallow_shapes: Shapes) -> Shapes:
        full = dict(shallow_shapes)
        for (name, dim), ratio in self.pieces.items():
            if name in full:
                shape = full[name]
                full[name] = (*shape[:dim], int(shape[dim] * ratio), *shape[dim + 1 :])
        return full

    def first(self, name: str) -> str:
        """Return a shallow model's name as it is in the first layer of the same kind."""
        return renumbered(name, self.first_of_kind)

    def origin(self, name: str) -> str:
        """Return the full model's name for a tensor or module of the shallow model."""
        for step in reversed(self.stands_for):
            name = renumbered(name, step, new=True)
        return name


def renumbered(name: str, numbers: Numbers, new: bool = False) -> str:
    """Return a name with other numbers of layers.

    A list inside a layer is looked up in ``numbers`` by the layer's number in ``name`` if ``new``,
    otherwise by its number in the result.
    """
    if not numbers:
        return name
    parts: list[str] = []
    prefix: list[str] = []
    for part in name.split("."):
        list_numbers = numbers.get(".".join(prefix))
        number = (
            str(list_numbers[int(part)]) if list_numbers is not None and part.isdigit() else part
        )
        parts.append(number)
        prefix.append(part if new else number)
    return ".".join(parts)


STOPS = "the class does not run then"  # start of the reason if a class builds but does not run


def refusal_of(field_map: FieldMap, values: Values) -> Refusal | None:
    model = field_map.build_at(values)
    return model if isinstance(model, Refusal) else None


def count_at_zero(field_map: FieldMap, new: nn.Module) -> Refusal | None:
    """Return which count of the class becomes 0 in a build at other values, or None."""
    if isinstance(field_map.unpruned, Refusal):
        return None  # the class refuses its own config, which is reported elsewhere
    vanished = vanished_counts(field_map.unpruned, new)
    if not vanished:
        return None
    return Refusal(f"{vanished[0]} would be 0: a field that sets no shape would have to change too")


def build_mismatch(field_map: FieldMap, new: nn.Module, values: Values) -> Refusal | None:
    """Return how a build at other values differs from a model pruned to them, or None."""
    old, built = field_map.shapes, shapes(new)
    if old.keys() != built.keys():
        return Refusal(
            f"the class builds other tensors with these values: {min(old.keys() ^ built.keys())}"
        )
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
    return Refusal(f"the class builds {name} with size {size}, but pruning gives {pruned_size}")


def run_failure(field_map: FieldMap, new: nn.Module) -> Refusal | None:
    """Return why a class stops running (DeepSeek-V2 with an odd ``kv_lora_rank``), or None."""
    # Both passes assume the same where tensor values decide what is computed. In another dtype,
    # what a class casts to float32 is copied, and may run for that reason alone.
    stopped = dry_pass(new.float(), field_map.recipe) if field_map.runs else None
    if isinstance(stopped, Refusal):
        return Refusal(f"{STOPS}: {stopped.reason}")
    return None


def ungrouped_change(
    field_map: FieldMap, values: Values, new: nn.Module, held: Set[tuple[str, int]]
) -> Refusal | None:
    """Return which dimension outside all groups (``held``) has an unexpected size, or None."""
    steps = {field: value - field_map.values[field] for field, value in values.items()}
    for name, shape in shapes(new).items():
        was = field_map.shapes.get(name, shape)
        for dim, (size, before) in enumerate(zip(shape, was, strict=True)):
            expression = field_map.expressions.get((name, dim))
            expected = before if expression is None else expression.evaluate(steps)
            if size != expected and (name, dim) not in held:
                return Refusal(
                    f"dimension {dim} of {name} would change from {before} to {size}, but no unit "
                    "contains a part of it"
                )
    return None


def multiple_of(field_map: FieldMap, field: FieldPath) -> int:
    """Return what a field has to be a multiple of (Llama's hidden size: its heads), or 1."""
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
    accepted: list[int] = []
    for direction in (-1, 1):
        for distance in range(1, 257):
            value = values[field] + direction * distance
            if value >= 1 and refusal_of(field_map, {**values, field: value}) is None:
                accepted.append(value)
                break
    return accepted
