"""Refits by least squares: exact where they can be, never worse on the data they are solved for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tp_hf_config.calibration.refit import refit_from_gram, refit_from_products
from tp_hf_config.graph.cut_list import plain_cut

_SETTINGS = settings(max_examples=60, deadline=None)


def data(seed: int, tokens: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator, dtype=torch.float64)


def some(seed: int, channels: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(channels, generator=generator)[:count].sort().values


@_SETTINGS
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4), st.data())
def test_exact_where_what_goes_is_a_combination_of_what_stays(
    seed: int, kept_count: int, gone_count: int, draw: st.DataObject
) -> None:
    channels = kept_count + gone_count
    kept = some(seed, channels, kept_count)
    rows = data(seed, 8 * channels, channels)
    gone = torch.tensor([c for c in range(channels) if c not in kept.tolist()])
    rows[:, gone] = rows[:, kept] @ data(seed + 1, kept_count, gone_count)
    weight = data(seed + 2, 5, channels)
    refit = refit_from_gram(rows.T @ rows, kept, 0.0)
    assert refit is not None
    expected = rows @ weight.T
    torch.testing.assert_close(
        rows[:, kept] @ refit.of(weight, 1).T, expected, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(refit.estimate(rows[:, kept]), rows, rtol=1e-9, atol=1e-9)


@_SETTINGS
@given(
    st.integers(0, 10**6),
    st.integers(2, 10),
    st.integers(1, 40),
    st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 100.0]),
)
def test_never_worse_than_the_plain_cut_on_its_own_data(
    seed: int, channels: int, tokens: int, ridge: float
) -> None:
    """Also with fewer tokens than channels, where only a ridge makes the solve possible."""
    kept = some(seed, channels, max(1, channels // 2))
    rows, weight = data(seed, tokens, channels), data(seed + 1, 3, channels)
    refit = refit_from_gram(rows.T @ rows, kept, ridge)
    assert refit is not None
    wanted = rows @ weight.T
    cut = (rows[:, kept] @ weight[:, kept].T - wanted).square().sum()
    refitted = (rows[:, kept] @ refit.of(weight, 1).T - wanted).square().sum()
    assert refitted <= cut * (1 + 1e-6) + 1e-9


@_SETTINGS
@given(st.integers(0, 10**6), st.integers(2, 10), st.sampled_from([0.0, 1e-4, 10.0]))
def test_behind_a_norm_never_worse_either(seed: int, channels: int, ridge: float) -> None:
    kept = some(seed, channels, max(1, channels // 2))
    values, weight = data(seed, 50, channels), data(seed + 1, 3, channels)
    whole = values / values.square().mean(1, keepdim=True).sqrt()
    part = values[:, kept]
    part = part / part.square().mean(1, keepdim=True).sqrt()
    refit = refit_from_products(part.T @ part, part.T @ whole, kept, ridge)
    assert refit is not None
    wanted = whole @ weight.T
    cut = (part @ weight[:, kept].T - wanted).square().sum()
    refitted = (part @ refit.of(weight, 1).T - wanted).square().sum()
    assert refitted <= cut * (1 + 1e-6) + 1e-9


def test_a_weight_of_any_shape_is_refitted_along_its_dimension() -> None:
    rows, kept = data(0, 60, 6), torch.tensor([0, 2, 5])
    refit = refit_from_gram(rows.T @ rows, kept, 1e-4)
    assert refit is not None
    weight = data(1, 4, 6)
    expected = refit.of(weight, 1)
    assert expected.shape == (4, 3)
    torch.testing.assert_close(refit.of(weight.T.contiguous(), 0), expected.T)
    stacked = torch.stack([weight, weight], 2)
    torch.testing.assert_close(refit.of(stacked, 1), torch.stack([expected, expected], 2))
    half = refit.of(weight.bfloat16(), 1)
    assert half.dtype == torch.bfloat16


def test_a_strong_ridge_is_the_plain_cut() -> None:
    rows, kept, weight = data(0, 60, 6), torch.tensor([0, 2, 5]), data(1, 4, 6)
    refit = refit_from_gram(rows.T @ rows, kept, 1e15)
    assert refit is not None
    torch.testing.assert_close(refit.of(weight, 1), weight[:, kept], rtol=1e-12, atol=1e-12)
    plain = plain_cut(rows[:, kept], kept, 6)
    torch.testing.assert_close(refit.estimate(rows[:, kept]), plain, rtol=1e-12, atol=1e-12)


def test_channels_that_carry_nothing_have_no_refit() -> None:
    assert refit_from_gram(torch.zeros(6, 6), torch.tensor([0, 1]), 1e-4) is None


def test_the_ridge_grows_until_the_solve_succeeds() -> None:
    rows = data(0, 60, 6)
    rows[:, 1] = rows[:, 0]  # both stay: the Gram matrix is singular
    refit = refit_from_gram(rows.T @ rows, torch.tensor([0, 1, 2]), 0.0)
    assert refit is not None
    assert bool(torch.isfinite(refit.share).all())
