"""Whole numbers only: fields from dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import combinations
from itertools import product as every
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tp_hf_config.fieldmap.field_map import Expression, Power, followed, product
from tp_hf_config.fieldmap.solve import Conflict, Problem, solve
from tp_hf_config.model.config_json import FieldPath

HEADS: FieldPath = ("num_attention_heads",)
DIM: FieldPath = ("head_dim",)
HIDDEN: FieldPath = ("hidden_size",)
FFN: FieldPath = ("intermediate_size",)
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def line(base: int, **slopes: int) -> Expression:
    return Expression(
        base, {frozenset({(name,)}): Fraction(value) for name, value in slopes.items()}
    )


def met_by(problem: Problem, values: Mapping[FieldPath, int]) -> bool:
    steps = {name: value - problem.base[name] for name, value in values.items()}
    return all(
        problem.expressions[key].evaluate(steps) == target
        for key, target in problem.targets.items()
    )


# Expressions


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_a_product_is_the_product_everywhere(pairs: list[tuple[int, int]], factor: int):
    base = {(f"f{i}",): value for i, (value, _) in enumerate(pairs)}
    expression = product(factor * prod(base.values()), base)
    steps = {(f"f{i}",): after - before for i, (before, after) in enumerate(pairs)}
    assert expression.evaluate(steps) == factor * prod(after for _, after in pairs)
    assert expression.evaluate({}) == expression.base
    assert expression.fields == frozenset(base)


def test_products_of_the_fields_themselves():
    base = {HEADS: 4, DIM: 8, FFN: 3}  # 2 * heads * dim + heads + 5 * ffn + 7
    both = frozenset({HEADS, DIM})
    heads, dim, ffn = (frozenset({name}) for name in (HEADS, DIM, FFN))
    terms = {heads: Fraction(17), dim: Fraction(8), both: Fraction(2), ffn: Fraction(5)}
    expression = Expression(90, terms)
    assert expression.monomials(base) == {both: 2, heads: 1, ffn: 5}
    triple = product(96, base)
    assert triple.monomials(base) == {frozenset(base): 1}


INNER = Power(16, {HIDDEN: 1, HEADS: -1}, {HIDDEN: 64, HEADS: 4})
"""A head dim that is hidden over heads."""


def test_a_field_follows_where_it_is_whole():
    assert followed({DIM: INNER}, {HIDDEN: 32}) == {DIM: 8}
    assert followed({DIM: INNER}, {HIDDEN: 48, HEADS: 3}) == {DIM: 16}
    assert followed({DIM: INNER}, {HIDDEN: 34}) == {}
    assert followed({DIM: INNER}, {HIDDEN: 32, DIM: 16}) == {}  # said itself
    assert followed({DIM: INNER}, {FFN: 2}) == {}


@pytest.mark.parametrize(
    ("hidden", "heads", "dim"), [(32, 2, 16), (32, 4, 8), (48, 3, 16), (64, 4, 16)]
)
def test_what_is_kept_in_proportion_is_found(hidden: int, heads: int, dim: int):
    kept = Power(1, {**INNER.exponents, DIM: -1}, {**INNER.values, DIM: 16})
    rows = ("embed.weight", 1), ("A_log", 0), ("in proportion", "proportion")
    expressions = dict(
        zip(rows, (line(64, hidden_size=1), line(4, num_attention_heads=1), kept), strict=True)
    )
    targets = dict(zip(rows, (hidden, heads, 1), strict=True))
    problem = Problem(expressions, {HIDDEN: 64, HEADS: 4, DIM: 16}, targets)
    assert solve(problem) == {HIDDEN: hidden, HEADS: heads, DIM: dim}


@EXAMPLES
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_move_of_is_the_inverse_of_evaluate(a: int, b: int, to_a: int, to_b: int):
    expression = product(a * b, {("a",): a, ("b",): b})
    steps = {("a",): to_a - a, ("b",): to_b - b}
    assert expression.step_to(("b",), steps, to_a * to_b) == to_b - b
    assert expression.step_to(("a",), steps, to_a * to_b) == to_a - a
    assert expression.step_to(("c",), steps, to_a * to_b) is None


def test_move_of_a_field_whose_slope_vanishes():
    # a * b + 3, where a moved to 0: b has no say left
    expression = product(12, {("a",): 3, ("b",): 4})
    assert expression.step_to(("b",), {("a",): -3}, 12) is None


def test_fractions_stay_exact():
    assert product(8, {("a",): 3}).evaluate({("a",): 1}) == Fraction(32, 3)


# Solving


def test_nothing_asked_nothing_moves():
    assert solve(Problem({}, {HIDDEN: 64, FFN: 128}, {})) == {HIDDEN: 64, FFN: 128}


def test_fields_that_no_target_moves_keep_their_value():
    problem = Problem(
        {("up", 0): product(128, {FFN: 128})}, {HIDDEN: 64, FFN: 128}, {("up", 0): 96}
    )
    assert solve(problem) == {HIDDEN: 64, FFN: 96}


def test_a_dimension_that_is_a_multiple_plus_something():
    problem = Problem({("w", 0): line(70, a=3)}, {("a",): 20}, {("w", 0): 55})
    assert solve(problem) == {("a",): 15}


def test_a_product_with_one_factor_known_elsewhere():
    problem = Problem(
        {
            ("q", 0): product(64, {HEADS: 4, DIM: 16}),
            ("q", "heads"): product(4, {HEADS: 4}),
        },
        {HEADS: 4, DIM: 16},
        {("q", 0): 36, ("q", "heads"): 3},
    )
    assert solve(problem) == {HEADS: 3, DIM: 12}


def heads_times_dim(target: int, *hold: FieldPath) -> Problem:
    return Problem(
        {("q", 0): product(32, {HEADS: 4, DIM: 8})},
        {HEADS: 4, DIM: 8},
        {("q", 0): target},
        hold,
    )


def test_heads_times_head_dim_is_ambiguous():
    result = solve(heads_times_dim(24))
    assert isinstance(result, Conflict)
    assert list(result.ambiguous) == [{HEADS: 3, DIM: 8}, {HEADS: 4, DIM: 6}] or list(
        result.ambiguous
    ) == [{HEADS: 4, DIM: 6}, {HEADS: 3, DIM: 8}]
    assert result.needs == {}


@pytest.mark.parametrize(
    ("hold", "expected"),
    [
        ((HEADS,), {HEADS: 4, DIM: 6}),
        ((DIM,), {HEADS: 3, DIM: 8}),
        ((HEADS, DIM), {HEADS: 4, DIM: 6}),
        ((DIM, HEADS), {HEADS: 3, DIM: 8}),
        ((HIDDEN, DIM), {HEADS: 3, DIM: 8}),
    ],
)
def test_what_is_to_be_held_decides_in_order(
    hold: tuple[FieldPath, ...], expected: dict[FieldPath, int]
):
    assert solve(heads_times_dim(24, *hold)) == expected


def test_only_one_of_the_two_is_whole():
    assert solve(heads_times_dim(28)) == {HEADS: 4, DIM: 7}
    # 28 is no multiple of 8: holding the head dim is impossible, so it moves all the same
    assert solve(heads_times_dim(28, DIM)) == {HEADS: 4, DIM: 7}


def test_nothing_moved_is_not_ambiguous():
    assert solve(heads_times_dim(32)) == {HEADS: 4, DIM: 8}


def test_no_whole_number_fits():
    result = solve(heads_times_dim(31))
    assert isinstance(result, Conflict)
    assert not result.ambiguous
    assert result.needs.keys() <= {HEADS, DIM}
    ((field, needs),) = result.needs.items()
    assert (
        needs
        == {
            HEADS: {Fraction(31, 8): [("q", 0)]},
            DIM: {Fraction(31, 4): [("q", 0)]},
        }[field]
    )


def test_layers_of_different_widths():
    up = {(f"layers.{i}.up", 0): product(128, {FFN: 128}) for i in range(3)}
    targets = dict(zip(up, (96, 128, 128), strict=True))
    result = solve(Problem(up, {FFN: 128, HIDDEN: 64}, targets))
    assert result == Conflict(
        {FFN: {96: [("layers.0.up", 0)], 128: [("layers.1.up", 0), ("layers.2.up", 0)]}}
    )


@pytest.mark.parametrize("target", [0, -3])
def test_a_width_is_at_least_one(target: int):
    result = solve(Problem({("w", 0): product(8, {FFN: 8})}, {FFN: 8}, {("w", 0): target}))
    assert result == Conflict({FFN: {target: [("w", 0)]}})


def test_a_dimension_that_no_field_sets():
    problem = Problem({("w", 0): Expression(8, {})}, {FFN: 8}, {("w", 0): 7})
    assert solve(problem) == Conflict({("no field",): {0: []}})


def test_a_contradiction_between_known_fields():
    # up says 6; the product then needs hidden 5 in one place, 4 in another
    problem = Problem(
        {
            ("up", 0): product(8, {FFN: 8}),
            ("mix", 0): product(32, {FFN: 8, HIDDEN: 4}),
            ("in", 0): product(4, {HIDDEN: 4}),
        },
        {FFN: 8, HIDDEN: 4},
        {("up", 0): 6, ("mix", 0): 30, ("in", 0): 4},
    )
    result = solve(problem)
    assert isinstance(result, Conflict)
    # nobody is listed for the values that were settled before: "the rest needs 4"
    assert result.needs == {
        HIDDEN: {4: [], 5: [("mix", 0)]},
        FFN: {6: [], Fraction(15, 2): [("mix", 0)]},
    }


# Properties

NAMES: tuple[FieldPath, ...] = (("a",), ("text", "b"), ("sizes", 0), ("sizes", 1), ("e",))


@st.composite
def chains(draw: Any) -> tuple[Problem, dict[FieldPath, int]]:
    """Every field follows from an observable in which only earlier ones also take part."""
    fields = draw(st.permutations(NAMES))[: draw(st.integers(1, 5))]
    base = {name: draw(st.integers(1, 40)) for name in fields}
    hidden = {name: draw(st.integers(1, 40)) for name in fields}
    steps = {name: hidden[name] - base[name] for name in fields}
    expressions: dict[Any, Expression] = {}
    for i, name in enumerate(fields):
        for copy in range(draw(st.integers(1, 3))):
            others = draw(st.lists(st.sampled_from(fields[:i]), unique=True)) if i else []
            mixed = [name, *others]
            if draw(st.booleans()):
                factor = draw(st.integers(1, 3))
                expression = product(
                    factor * prod(base[n] for n in mixed), {n: base[n] for n in mixed}
                )
            else:
                terms = {
                    frozenset(chosen): Fraction(draw(st.integers(-3, 3)))
                    for size in (1, 2)
                    for chosen in combinations(mixed, size)
                }
                terms = {key: value for key, value in terms.items() if value}
                expression = Expression(draw(st.integers(1, 500)), terms)
            assume(expression.step_to(name, steps, int(expression.evaluate(steps))) is not None)
            expressions[(f"layers.{i}.{copy}", draw(st.integers(0, 1)))] = expression
    targets = {key: int(expression.evaluate(steps)) for key, expression in expressions.items()}
    order = draw(st.permutations(list(targets)))
    return Problem(expressions, base, {key: targets[key] for key in order}), hidden


@EXAMPLES
@given(chains())
def test_hidden_values_are_recovered(drawn: tuple[Problem, dict[FieldPath, int]]):
    problem, hidden = drawn
    assert solve(problem) == hidden


@EXAMPLES
@given(chains(), st.data())
def test_a_wrong_target_is_a_conflict_that_names_a_field_of_it(drawn: Any, data: Any):
    problem, hidden = drawn
    # every target is asked for by two observables; one of them is then off
    twins = {(f"twin.{name}", dim): e for (name, dim), e in problem.expressions.items()}
    wrong = data.draw(st.sampled_from(list(problem.targets)))
    off = data.draw(st.integers(-5, 5).filter(bool))
    targets = {
        **problem.targets,
        **{(f"twin.{name}", dim): value for (name, dim), value in problem.targets.items()},
        wrong: problem.targets[wrong] + off,
    }
    result = solve(Problem({**problem.expressions, **twins}, problem.base, targets))
    assert isinstance(result, Conflict)
    assert not result.ambiguous
    assert result.needs
    named = {key for by_value in result.needs.values() for who in by_value.values() for key in who}
    assert result.needs.keys() <= hidden.keys()
    assert wrong in named or (f"twin.{wrong[0]}", wrong[1]) in named


@st.composite
def products(draw: Any) -> Problem:
    """Products of one to three of three fields, evaluated somewhere: often entangled."""
    fields = NAMES[:3]
    base = {name: draw(st.integers(1, 6)) for name in fields}
    hidden = {name: draw(st.integers(1, 6)) for name in fields}
    expressions = {}
    for i in range(draw(st.integers(1, 3))):
        mixed = draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3, unique=True))
        expressions[(f"w{i}", 0)] = product(
            prod(base[name] for name in mixed), {name: base[name] for name in mixed}
        )
    targets = {
        key: prod(hidden[name] for name in expression.fields)
        for key, expression in expressions.items()
    }
    hold = draw(st.lists(st.sampled_from(fields), unique=True))
    return Problem(expressions, base, targets, hold)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(products())
def test_whatever_is_answered_meets_the_targets(problem: Problem):
    result = solve(problem)
    if not isinstance(result, Conflict):
        assert result.keys() == problem.base.keys()
        assert met_by(problem, result)
        return
    if result.ambiguous:
        assert len(result.ambiguous) > 1
        for solution in result.ambiguous:
            open_fields = [name for name in problem.base if name not in solution]
            assert any(
                met_by(problem, {**solution, **dict(zip(open_fields, values, strict=True))})
                for values in every(range(1, 37), repeat=len(open_fields))
            ), solution
        return
    # A conflict: no single field that moves meets the targets
    for name in problem.base:
        for value in range(1, 217):
            assert not met_by(problem, {**problem.base, name: value})


@settings(max_examples=200, deadline=None, derandomize=True)
@given(products(), st.sampled_from(NAMES[:3]))
def test_what_is_held_is_held_where_that_is_possible(problem: Problem, name: FieldPath):
    problem = Problem(problem.expressions, problem.base, problem.targets, (name,))
    free = solve(Problem(problem.expressions, problem.base, problem.targets))
    result = solve(problem)
    if isinstance(free, Conflict) and free.ambiguous and not isinstance(result, Conflict):
        assert met_by(problem, result)
        if any(solution.get(name) == problem.base[name] for solution in free.ambiguous):
            assert result[name] == problem.base[name]
