"""Count, mean and sum of squared deviations, merged as if all values had been seen at once."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import batchnorm as bn
from support import randn

# Sums of fewer than 1000 float64 numbers, deviations squared: a few hundred roundings of 1e-16 at most.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def rows(*counts, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, channels, generator=generator, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(counts)
    ]


def assert_moments(found, values, tolerance=EXACT):
    """Of values (M, C), against numpy."""
    values = values.double().numpy()
    assert found.count.item() == len(values)
    np.testing.assert_allclose(found.mean.numpy(), values.mean(0), **tolerance)
    np.testing.assert_allclose(found.m2.numpy(), ((values - values.mean(0)) ** 2).sum(0), **tolerance)


def assert_same(one, other):
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_moments_are_float64_whatever_the_values_are(dtype):
    x = rows(50)[0].to(dtype)
    found = bn.Moments.of(x)
    assert {found.count.dtype, found.mean.dtype, found.m2.dtype} == {torch.float64}
    assert found.count.dim() == 0
    # below float64 the kernels add up 50 numbers of size 3 in float32: 50 * 6e-8 * 3 at the very most
    assert_moments(found, x, EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5})


@pytest.mark.parametrize(("shape", "dim"), [((5, 3, 4), 1), ((5, 4, 3), -1), ((3, 5, 4, 2), 0), ((5, 3), 1)], ids=str)
def test_channels_may_stand_in_any_dimension(shape, dim):
    x = randn(*shape, dtype=torch.float64)
    assert_moments(bn.Moments.of(x, channel_dim=dim), x.movedim(dim, -1).reshape(-1, 3))


def test_only_values_that_count_are_measured_whatever_the_others_hold():
    x = randn(6, 3, 5, dtype=torch.float64)
    mask = torch.arange(30).view(6, 5) % 3 != 0
    counted = x.movedim(1, 2)[mask]
    assert_moments(bn.Moments.of(x.masked_fill(~mask.unsqueeze(1), torch.nan), mask=mask), counted)


@settings(deadline=None)  # the first call of an operation takes far longer than the others
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 1000))
def test_merged_batches_are_the_whole_in_any_grouping_and_order(counts, seed):
    parts = rows(*counts, seed=seed)
    each = [bn.Moments.of(part) for part in parts]
    forwards = functools.reduce(bn.Moments.merge, each)
    backwards = functools.reduce(lambda later, earlier: earlier.merge(later), reversed(each))
    shuffled = functools.reduce(bn.Moments.merge, each[::2] + each[1::2])
    assert_same(forwards, backwards)
    assert_same(forwards, shuffled)
    if sum(counts):
        assert_moments(forwards, torch.cat(parts))


def test_moments_of_no_values_change_nothing():
    some = bn.Moments.of(rows(7)[0])
    for nothing in (bn.Moments.empty(3), bn.Moments.of(torch.empty(0, 3))):
        assert_same(some.merge(nothing), some)
        assert_same(nothing.merge(some), some)
        assert nothing.var().tolist() == nothing.var(unbiased=True).tolist() == [0, 0, 0]


def test_a_variance_far_below_the_squared_mean_is_kept():
    parts = [x * 0.1 + 1e6 for x in rows(100, 3, 50)]
    found = functools.reduce(bn.Moments.merge, map(bn.Moments.of, parts))
    # The values themselves are rounded by 1e6 * 1e-16 = 1e-10, a 1e-9th of their deviation.
    np.testing.assert_allclose(found.var().numpy(), torch.cat(parts).numpy().var(0), rtol=1e-8)


def test_the_unbiased_variance_is_numpys_with_ddof_1_and_0_of_one_value():
    x = rows(9)[0]
    np.testing.assert_allclose(bn.Moments.of(x).var(unbiased=True).numpy(), x.numpy().var(0, ddof=1), **EXACT)
    assert bn.Moments.of(x[:1]).var(unbiased=True).tolist() == [0, 0, 0]


def test_without_torch_distributed_there_is_one_rank():
    some = bn.Moments.of(rows(7)[0])
    assert some.all_reduce() is some


@pytest.mark.parametrize(
    ("x", "options", "rule"),
    [
        (torch.ones(3), {}, "x must have at least 2 dimensions"),
        (torch.ones(3, 2), {"channel_dim": 2}, "channel_dim=2"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "floating"),
        (torch.ones(3, 2), {"mask": torch.ones(2, dtype=torch.bool)}, "mask"),
    ],
)
def test_a_batch_without_channels_is_refused(x, options, rule):
    with pytest.raises(bn.InputError, match=rule):
        bn.Moments.of(x, **options)


def test_moments_of_other_channels_do_not_merge():
    with pytest.raises(bn.InputError, match=r"\[2, 3\]"):
        bn.Moments.empty(2).merge(bn.Moments.empty(3))
