"""See how each config field changes a model's sizes: two probes of it, alone or with others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from math import prod

from ..forward.head_splits import observe
from ..model.build import Refusal
from ..model.config_json import FieldPath
from ..model.shapes import shapes, vanished_counts
from .field_map import Expression, Power, Quantity, Values, product
from .probe import (
    UNSET_PROBES,
    Probe,
    Probes,
    Sizes,
    Study,
    breaks_off,
    extrapolated,
    may_matter,
    on_a_line,
    probe_values,
    show_heads,
)


def all_implied(study: Study, unset: Sequence[FieldPath]) -> dict[FieldPath, int]:
    """Return the unset fields that set a quantity, with the values that they imply."""
    implied = {field: _implied(study, field) for field in unset}
    return {field: value for field, value in implied.items() if value is not None}


def _implied(study: Study, field: FieldPath) -> int | None:
    """Return the value that an unset field implies, from two probes; setting it changes nothing."""
    probes: list[Probe] = []
    for probe_value in UNSET_PROBES:
        sizes = study.at({field: probe_value}, watch=False)
        if isinstance(sizes, Refusal) and "'int' object" in sizes.reason:
            break  # Python's message: the field is no number
        if study.counts_layers(field):
            break
        if isinstance(sizes, dict):
            if not any(sizes.values()):
                break
            probes.append(Probe(probe_value, sizes))
        if len(probes) == 2:
            break
    if len(probes) < 2:
        return None
    first, second = probes
    candidates: set[Fraction] = set()
    for key in first.sizes.keys() & second.sizes.keys():
        if not first.sizes[key] or not second.sizes[key]:
            continue
        slope = Fraction(first.sizes[key] - second.sizes[key], first.value - second.value)
        if slope:
            candidates.add(first.value + (study.base[key] - first.sizes[key]) / slope)
    if len(candidates) != 1:
        return None
    (value,) = candidates
    if value.denominator != 1 or value < 1:
        return None
    same = study.at({field: int(value)}, watch=False)
    if not isinstance(same, dict) or any(same.values()):
        return None
    return int(value)


def independent(study: Study, implied: Values, values: Values) -> dict[FieldPath, int]:
    """Return the unset fields that may keep their value while any other field changes.

    DeBERTa's ``attention_head_size`` has to follow the hidden size: with its old value the forward
    pass stops earlier than without a value.
    """
    result = dict(implied)
    for other in values:
        may_follow = [
            (field, value)
            for field, value in result.items()
            if values[other] % value == 0 and not _is_in_every_config(field)
        ]
        if not may_follow:
            continue
        doubled = {other: 2 * values[other]}
        followed = study.build(doubled)
        if isinstance(followed, Refusal) or shapes(followed) == study.shapes:
            continue
        for field, value in may_follow:
            constant = study.build({**doubled, field: value})
            if isinstance(constant, Refusal) or shapes(followed) == shapes(constant):
                continue
            steps = [observe(model, study.recipe).steps for model in (constant, followed)]
            if steps[0] < steps[1]:
                del result[field]
    return result


def _is_in_every_config(field: FieldPath) -> bool:
    """True if every config has the field, so that its default is no width of one class."""
    from transformers import PretrainedConfig

    return hasattr(PretrainedConfig, str(field[-1]))


def sensitivities(study: Study) -> tuple[dict[FieldPath, list[Probe]], dict[FieldPath, FieldPath]]:
    """Return up to two probes of each field with an effect, and field -> field it must equal."""
    values = study.values
    probes: dict[FieldPath, list[Probe]] = {}
    refused: list[FieldPath] = []
    rebuilt: list[FieldPath] = []
    for field in values:
        field_probes = study.alone(field)
        if isinstance(field_probes, Refusal):
            refused.append(field)
        elif field_probes is None:
            rebuilt.append(field)
        elif field_probes:
            probes[field] = field_probes
            if len(field_probes) == 2 and all(breaks_off(probe.sizes) for probe in field_probes):
                _replace_second(study, field, field_probes)
    for field in refused:
        field_probes = _with_partner(study, field, probes)
        if field_probes:
            probes[field] = field_probes
    must_equal: dict[FieldPath, FieldPath] = {}
    still_refused = [field for field in refused if field not in probes]
    for field, other in (*combinations(rebuilt, 2), *combinations(still_refused, 2)):
        if {field, other} & (probes.keys() | must_equal.keys()):
            continue
        if values[field] == values[other] and not study.counts_layers(field):
            field_probes = _joint_probes(study, field, other)
            if field_probes:
                probes[field], must_equal[other] = field_probes, field
    # the class refuses to change them, alone or with one other field
    study.refused = [field for field in still_refused if field not in probes.keys() | must_equal]
    show_heads(study, probes)
    return probes, must_equal


def _partners(study: Study, field: FieldPath, others: Sequence[FieldPath]) -> Iterator[FieldPath]:
    """Yield the fields with which the class may accept twice the value of a refused field."""
    alone = study.build(study.times(2, field))

    def changes_nothing(some: Sequence[FieldPath]) -> bool:
        return isinstance(alone, Refusal) and study.build(study.times(2, field, *some)) == alone

    return may_matter(others, changes_nothing)


def _replace_second(study: Study, field: FieldPath, probes: list[Probe]) -> None:
    """Replace the second probe by one at a lower value at which the forward pass gets further."""
    value = study.values[field]
    for lower_value in (other for other in reversed(probe_values(value)) if other < value):
        sizes = study.at({field: lower_value})
        if isinstance(sizes, dict) and not breaks_off(sizes):
            lower = Probe(lower_value, sizes)
            if on_a_line(study.base, value, probes[0], lower):  # else a size was rounded
                probes[1] = lower
                break


def non_size_followers(study: Study, moving: Collection[FieldPath]) -> dict[FieldPath, FieldPath]:
    """Return fields that set no shape, but must equal another field so that no count becomes 0.

    DeepSeek's latent attention has no key/value heads, but ``num_key_value_groups`` is heads over
    ``num_key_value_heads``.
    """
    values, must_equal = study.values, dict[FieldPath, FieldPath]()
    may_vanish = [field for field in values if field in moving and study.vanishing.get(field, True)]

    def changes_nothing(some: Sequence[FieldPath]) -> bool:
        halves = {field: values[field] // 2 for field in some if values[field] > 1}
        return _vanishes(study, halves) is False

    for field in may_matter(may_vanish, changes_nothing):
        # half too: some fields have to divide another width
        lower_values = (values[field] * 3 // 4, values[field] // 2)
        lower = next(
            (value for value in lower_values if value and _vanishes(study, {field: value})), None
        )
        if lower is None:
            continue
        equal = [p for p in values.keys() - set(moving) if values[p] == values[field]]
        for other in equal:
            if _vanishes(study, {field: lower, other: lower}) is False:
                must_equal[other] = field
                break
    return must_equal


def _vanishes(study: Study, values: Values) -> bool | None:
    """True if some count becomes 0 at these values; None if the class refuses them."""
    model = study.build(values)
    return None if isinstance(model, Refusal) else bool(vanished_counts(study.model, model))


def _joint_probes(study: Study, field: FieldPath, other: FieldPath) -> list[Probe]:
    probes: list[Probe] = []
    for factor in (2, 3):
        sizes = study.at(study.times(factor, field, other))
        if sizes is None:
            break
        if isinstance(sizes, dict) and sizes:
            probes.append(Probe(factor * study.values[field], sizes))
    return probes


def _with_partner(study: Study, field: FieldPath, probes: Probes) -> list[Probe]:
    """Return one probe of a field that the class accepts only together with another, or none."""
    for partner in _partners(study, field, list(probes)):
        sizes_at = {probe.value: probe.sizes for probe in probes[partner]}
        for factor in (2, 3):
            joint_values = study.times(factor, field, partner)
            now, then = study.values[partner], joint_values[partner]
            joint_sizes = study.at(joint_values, watch=False)
            if not isinstance(joint_sizes, dict):
                continue
            partner_sizes = sizes_at.get(then) or study.at({partner: then}, watch=False)
            if isinstance(partner_sizes, Refusal):  # alone, only a little more is accepted (Phi-3)
                partner_sizes = extrapolated(study.base, now, probes[partner], then)
                # head counts too: no probe of the field alone shows them
                joint_sizes = study.at(joint_values)
            if not isinstance(partner_sizes, dict) or not isinstance(joint_sizes, dict):
                continue
            sizes = {  # less the changes due to the partner
                key: size + joint_sizes.get(key, size) - partner_sizes.get(key, size)
                for key, size in study.base.items()
                if joint_sizes.get(key, size) != partner_sizes.get(key, size)
                and joint_sizes.get(key, size)
                and partner_sizes.get(key, size)
            }
            if sizes:
                return [Probe(joint_values[field], sizes)]
    return []


def fit_expressions(study: Study, probes: Probes) -> dict[Quantity, Expression]:
    """Return an expression for each quantity that is linear in each field."""
    slopes: dict[Quantity, dict[FieldPath, Fraction]] = {}
    inexact: set[Quantity] = set()
    for field, field_probes in probes.items():
        for key in {key for probe in field_probes for key in probe.sizes}:
            field_slopes = {
                Fraction(probe.sizes.get(key, study.base[key]) - study.base[key])
                / (probe.value - study.values[field])
                for probe in field_probes
                if probe.sizes.get(key) != 0
            }
            if len(field_slopes) == 1:
                slope = field_slopes.pop()
                if slope:
                    slopes.setdefault(key, {})[field] = slope
            elif field_slopes:  # an image's number of patches: only the proof checks it
                inexact.add(key)
    pairs = _pairs(study, probes, slopes)
    return {
        key: _expression(study, key, by_field, pairs)
        for key, by_field in slopes.items()
        if key not in inexact
    }


def fit_powers(
    study: Study, probes: Probes, straight: Collection[Quantity]
) -> tuple[dict[Quantity, Power], dict[Quantity, frozenset[FieldPath]]]:
    """Return quantities that are powers of fields, and the rest -> the fields that change them."""
    sizes: dict[Quantity, dict[FieldPath, list[tuple[int, int]]]] = {}
    for field, field_probes in probes.items():
        for probe in field_probes:
            for key, size in probe.sizes.items():
                if key not in straight and size:
                    sizes.setdefault(key, {}).setdefault(field, []).append((probe.value, size))
    fitted: dict[Quantity, Power] = {}
    unfitted: dict[Quantity, frozenset[FieldPath]] = {}
    for key, by_field in sizes.items():
        exponents = {
            field: _exponent(study.values[field], study.base[key], points)
            for field, points in by_field.items()
        }
        if all(exponents.values()):
            fitted[key] = Power(study.base[key], exponents, study.times(1, *exponents))
        else:
            unfitted[key] = frozenset(by_field)
    return fitted, unfitted


def _pairs(
    study: Study, probes: Probes, slopes: Mapping[Quantity, Mapping[FieldPath, Fraction]]
) -> list[tuple[dict[FieldPath, int], Sizes]]:
    """Return builds with two fields changed: the steps of both, and all sizes."""
    wanted = {
        frozenset(pair)
        for key, by_field in slopes.items()
        if len(by_field) > 1 and not _is_product(study, key, by_field)
        for pair in combinations(by_field, 2)
    }
    result: list[tuple[dict[FieldPath, int], Sizes]] = []
    for pair in wanted:
        pair_values = {field: probes[field][0].value for field in pair}
        sizes = study.at(pair_values)
        if isinstance(sizes, dict):
            steps = {field: pair_values[field] - study.values[field] for field in pair}
            result.append((steps, {**study.base, **sizes}))
    return result


def _expression(
    study: Study,
    key: Quantity,
    slopes: Mapping[FieldPath, Fraction],
    pairs: list[tuple[dict[FieldPath, int], Sizes]],
) -> Expression:
    """Return the expression of one quantity; ``pairs`` show the products of fields in it."""
    base = study.base[key]
    if len(slopes) > 1 and _is_product(study, key, slopes):
        return product(base, study.times(1, *slopes))
    terms = {frozenset({field}): slope for field, slope in slopes.items()}
    for steps, sizes in pairs:
        if steps.keys() <= slopes.keys():
            straight = base + sum((slopes[p] * step for p, step in steps.items()), Fraction(0))
            cross = (sizes[key] - straight) / prod(steps.values())
            if cross:
                terms[frozenset(steps)] = cross
    return Expression(base, terms)


def _is_product(study: Study, key: Quantity, slopes: Mapping[FieldPath, Fraction]) -> bool:
    base = study.base[key]
    return all(slope * study.values[field] == base for field, slope in slopes.items())


def _exponent(value: int, base: int, points: Sequence[tuple[int, int]]) -> int:
    """Return the power of a field that a size is: 1, -1, 2, -2, or 0 if none of them fits."""
    for exponent in (1, -1, 2, -2):
        powers = [base * Fraction(then, value) ** exponent for then, _ in points]
        exact = [size == power for power, (_, size) in zip(powers, points, strict=True)]
        # quotients are rounded down: 40 channels are 20 in each of 2 heads, 6 in each of 6
        rounded = exponent < 0 and [*map(int, powers)] == [size for _, size in points]
        if all(exact) or (rounded and any(exact)):
            return exponent
    return 0


# field -> the fields that have to change with it, by the same factor
RatioPartners = dict[FieldPath, tuple[FieldPath, ...]]


def find_ratio_partners(study: Study) -> RatioPartners:
    """Return the refused fields that the class accepts in proportion with others."""
    # none can be probed alone: Mamba 2's heads times head dim is its inner width
    accepted: RatioPartners = {}
    for field, other in combinations(study.refused, 2):
        sizes = study.at(study.times(2, field, other), watch=False)
        if isinstance(sizes, dict) and any(sizes.values()):
            accepted[field] = (*accepted.get(field, ()), other)
            accepted[other] = (*accepted.get(other, ()), field)
    return accepted


def let_follow(study: Study, ratio_partners: RatioPartners) -> dict[FieldPath, list[Probe]]:
    """Choose one field of each proportion that builds compute from the others from now on.

    The choice makes the expressions simplest; it is added to ``study.ratio_rules``. Returns the
    probes of the other fields.
    """
    probes: dict[FieldPath, list[Probe]] = {}
    for fields in _proportions(ratio_partners):
        before = study.ratio_rules
        tried: list[tuple[tuple[int, int], dict[FieldPath, Power], dict[FieldPath, list[Probe]]]]
        tried = []
        for follower in fields:
            # in proportion to its partners, inverse to the other fields
            others = study.times(1, *(field for field in fields if field != follower))
            exponents = {field: 1 if field in ratio_partners[follower] else -1 for field in others}
            rule = {follower: Power(study.values[follower], exponents, others)}
            study.ratio_rules = before | rule
            results = {field: study.alone(field) for field in others}
            found = {field: p for field, p in results.items() if isinstance(p, list) and p}
            if found.keys() == others.keys():
                tried.append((_complexity(study, found), rule, found))
        study.ratio_rules = before
        if tried:
            _, rule, found = min(tried, key=lambda attempt: attempt[0])
            study.ratio_rules = before | rule
            probes |= found
    return probes


def _proportions(ratio_partners: RatioPartners) -> Iterator[list[FieldPath]]:
    """Yield the fields of each proportion: those that are partners directly or through others."""
    remaining = sorted(ratio_partners, key=str)
    while remaining:
        connected = [remaining[0]]
        for field in connected:
            connected += [other for other in ratio_partners[field] if other not in connected]
        remaining = [field for field in remaining if field not in connected]
        yield sorted(connected, key=str)


def _complexity(study: Study, probes: Probes) -> tuple[int, int]:
    """Return how complex the expressions are: unfitted quantities first, then repeated fields."""
    straight = fit_expressions(study, probes)
    unfitted = fit_powers(study, probes, straight)[1]
    products = [expression.monomials(study.values) for expression in straight.values()]
    repeated = (sum(field in one for one in fields) > 1 for fields in products for field in probes)
    return len(unfitted), sum(repeated)
