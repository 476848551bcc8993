"""Fields that a class accepts only in proportion: Mamba 2's heads times head dim is inner width.

No such field can be probed alone. So one of them follows from the others in every build, and the
others are probed like any field. Which one follows does not matter to the class; it only decides
how simple the expressions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from ..model.config_json import FieldPath
from .expressions import Power
from .fit_expressions import expressions, powers
from .probe import Probe, Study

RatioPartners = dict[FieldPath, tuple[FieldPath, ...]]
"""Field -> the fields that have to change with it, by the same factor."""


def find_ratio_partners(study: Study, values: Mapping[FieldPath, int]) -> RatioPartners:
    """Return the refused fields that the class accepts in proportion with others, and the others.

    Two fields are partners if the class accepts both at twice their value, and builds other sizes
    then.
    """
    accepted: RatioPartners = {}
    for field, other in combinations(study.refused, 2):
        sizes = study.at({field: 2 * values[field], other: 2 * values[other]}, watch=False)
        if isinstance(sizes, dict) and any(sizes.values()):
            accepted[field] = (*accepted.get(field, ()), other)
            accepted[other] = (*accepted.get(other, ()), field)
    return accepted


def let_follow(
    study: Study, ratio_partners: RatioPartners, values: Mapping[FieldPath, int]
) -> dict[FieldPath, list[Probe]]:
    """Make one field of each proportion follow from the others in all builds from now on.

    Of the fields that can follow, the one is chosen that makes the expressions simplest, and added
    to ``study.ratio_rules``. Return the probes of the other fields of each proportion.
    """
    probes: dict[FieldPath, list[Probe]] = {}
    for fields in _proportions(ratio_partners):
        before = study.ratio_rules
        tried: list[tuple[tuple[int, ...], Power, FieldPath, dict[FieldPath, list[Probe]]]] = []
        for follower in fields:
            rule = _rule(follower, fields, ratio_partners, values)
            study.ratio_rules = {**before, follower: rule}
            other_probes = _probe_all(study, rule, values)
            if other_probes is not None:
                complexity = _complexity(study, values, other_probes)
                tried.append((complexity, rule, follower, other_probes))
        study.ratio_rules = before
        if tried:
            _, rule, follower, other_probes = min(tried, key=lambda attempt: attempt[0])
            study.ratio_rules = {**before, follower: rule}
            probes |= other_probes
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


def _rule(
    follower: FieldPath,
    fields: Sequence[FieldPath],
    ratio_partners: RatioPartners,
    values: Mapping[FieldPath, int],
) -> Power:
    """Return how a field follows: in proportion to its partners, inversely to the other fields."""
    others = {field: values[field] for field in fields if field != follower}
    exponents = {field: 1 if field in ratio_partners[follower] else -1 for field in others}
    return Power(values[follower], exponents, others)


def _probe_all(
    study: Study, rule: Power, values: Mapping[FieldPath, int]
) -> dict[FieldPath, list[Probe]] | None:
    """Probe each field that the rule's field follows from; None if one cannot be probed."""
    probes: dict[FieldPath, list[Probe]] = {}
    for field in rule.exponents:
        field_probes = study.alone(field, values[field])
        if not isinstance(field_probes, list) or not field_probes:
            return None
        probes[field] = field_probes
    return probes


def _complexity(
    study: Study, values: Mapping[FieldPath, int], probes: Mapping[FieldPath, list[Probe]]
) -> tuple[int, ...]:
    """Return how complex the expressions are, as numbers to compare in this order.

    They are the number of quantities without a rule, the number of times that a field is in several
    terms of an expression, and the number of fields in all terms.
    """
    straight = expressions(study, values, probes)
    curved, unfitted = powers(study, values, probes, straight)
    several = parts = 0
    for expression in straight.values():
        products = expression.monomials(values)
        own = [sum(field in fields for fields in products) for field in probes]
        several += sum(number > 1 for number in own)
        parts += sum(own)
    return len(unfitted), several, parts + sum(len(power.fields) for power in curved.values())
