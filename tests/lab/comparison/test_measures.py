"""Measures of runs that are written by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.lab.comparison.measures import (
    best_rate,
    choose_rate,
    choose_target,
    order_statistic,
    ratio_bounds,
    summarize_pairs,
    summarize_rates,
)
from batchnorm.lab.comparison.scores import paired_difference
from batchnorm.lab.training.runs import Run, Target, evaluation_steps, median_steps, steps_to

STEPS = [1, 2, 3, 4, 5, 6]


def run(scores, rate=0.1, seed=0, diverged_at=None, losses=None):
    losses = losses or [1 - score for score in scores]
    return Run("none", rate, seed, diverged_at, [], losses, list(scores))


def score(value):
    return Target("score", value, "")


def test_a_target_is_reached_at_the_first_of_three_consecutive_evaluations():
    assert steps_to(run([0.9, 0.9, 0.1, 0.9, 0.9, 0.9]), score(0.9), STEPS) == 4
    assert steps_to(run([0.1, 0.9, 0.9, 0.1, 0.9, 0.9]), score(0.9), STEPS) is None
    assert steps_to(run([0.9] * 6), score(0.9), STEPS) == 1


def test_a_loss_is_reached_from_above():
    falling = run([0.0] * 6, losses=[5.0, 4.0, 3.0, 2.0, 1.0, 1.0])
    assert steps_to(falling, Target("loss", 3.0, ""), STEPS) == 3


def test_a_diverged_run_never_arrives_even_if_it_had_arrived_before():
    scores = [0.9, 0.9, 0.9, 0.9, math.nan, math.nan]
    assert steps_to(run(scores), score(0.9), STEPS) == 1
    assert steps_to(run(scores, diverged_at=5), score(0.9), STEPS) is None


@given(st.integers(1, 5000))
def test_evaluations_are_dense_to_20_then_5_percent_apart_and_include_the_last(steps):
    chosen = evaluation_steps(steps)
    assert chosen[: min(20, steps)] == list(range(1, min(20, steps) + 1))
    assert chosen[-1] == steps
    assert all(a < b <= math.ceil(1.05 * a) for a, b in itertools.pairwise(chosen[19:]))


def test_median_steps_need_more_than_half_of_the_runs_to_arrive():
    assert median_steps([10, 20, 30]) == 20
    assert median_steps([10, None, 30]) == 30
    assert median_steps([10, None]) is None
    assert median_steps([10, 20, None, None]) is None
    assert median_steps([None]) is None


def baseline(*best):
    """Three seeds at two learning rates; the second is better."""
    return [run([0.5, 0.5], 0.1, seed) for seed in range(3)] + [
        run([value, 0.1], 0.3, seed) for seed, value in enumerate(best)
    ]


def target(runs, rows=200, given=None, task="classification", constant=2.0):
    return choose_target(runs, task=task, validation_rows=rows, constant_loss=constant, target_score=given)


def test_the_target_is_099_of_the_median_best_score_rounded_down_to_a_row():
    chosen = target(baseline(0.8, 0.9, 0.95))
    assert chosen.measure == "score"
    assert chosen.value == 178 / 200  # 0.99 x 0.9 x 200 = 178.2


def test_a_given_target_score_overrides_the_rule():
    assert target(baseline(0.8, 0.9, 0.95), rows=50, given=0.7).value == 0.7


def test_on_few_rows_the_target_is_099_of_the_best_reduction_of_the_loss():
    chosen = target(baseline(0.8, 0.9, 0.95), rows=99)
    assert chosen.measure == "loss"
    assert chosen.value == pytest.approx(2.0 - 0.99 * (2.0 - 0.1))


def test_where_no_score_is_positive_the_loss_is_the_target():
    runs = [run([-0.5, -0.2], seed=seed, losses=[3.0, 2.5]) for seed in range(3)]
    chosen = target(runs, task="regression")
    assert chosen.measure == "loss"
    assert chosen.value == pytest.approx(2.5 / 0.99)


def test_no_run_reaches_the_target_where_every_baseline_run_diverged():
    runs = [run([0.5, math.nan], seed=seed, diverged_at=2) for seed in range(3)]
    chosen = target(runs)
    assert chosen.value == -math.inf
    assert steps_to(run([1.0] * 6), chosen, STEPS) is None


def test_a_diverged_run_counts_as_the_worst_of_its_rate():
    runs = [run([0.9] * 3, 0.3, 0), run([0.99] * 3, 0.3, 1, diverged_at=3), run([0.99] * 3, 0.3, 2, diverged_at=3)]
    runs += [run([0.5] * 3, 0.1, seed) for seed in range(3)]
    assert best_rate(runs, "score") == (0.1, 0.5)


def arrivals(rate, *steps):
    """Runs at a rate that arrive at these steps of 6, None for never."""
    return [
        run([0.9 if step and s >= step else 0.1 for s in range(1, 9)], rate, seed) for seed, step in enumerate(steps)
    ]


def test_the_chosen_rate_has_the_fewest_median_steps_of_those_where_all_seeds_arrive():
    evaluations = list(range(1, 9))
    runs = arrivals(0.1, 5, 5, 5) + arrivals(0.3, 1, 1, None) + arrivals(1.0, 3, 4, 5)
    summaries = summarize_rates(runs, score(0.9), evaluations)
    assert [s.reached for s in summaries] == [3, 2, 3]
    assert [s.median_steps for s in summaries] == [5, 1, 4]
    assert choose_rate(summaries) == 1.0


def test_the_rate_where_most_seeds_arrive_is_chosen_and_ties_go_to_the_loss():
    evaluations = list(range(1, 9))
    runs = arrivals(0.1, 5, None, None) + arrivals(0.3, 6, 6, None)
    assert choose_rate(summarize_rates(runs, score(0.9), evaluations)) == 0.3
    tied = arrivals(0.1, 5, 5, 5) + arrivals(0.3, 5, 5, 5)
    for one in tied[3:]:
        one.validation_loss = [0.01] * 8
    assert choose_rate(summarize_rates(tied, score(0.9), evaluations)) == 0.3


def test_a_ratio_is_exact_or_bounded():
    assert ratio_bounds(100, 20, 1000) == (5, 5)
    assert ratio_bounds(None, 20, 1000) == (50, math.inf)
    assert ratio_bounds(100, None, 1000) == (0, 0.1)
    assert ratio_bounds(None, None, 1000) == (0, math.inf)


@pytest.mark.parametrize(
    ("count", "k", "confidence"), [(10, 2, 0.978515625), (5, 1, 0.9375), (1, 1, 0.0), (6, 1, 0.96875)]
)
def test_the_order_statistics_of_the_interval(count, k, confidence):
    assert order_statistic(count) == (k, pytest.approx(confidence))


def test_the_order_statistics_cover_the_median_with_the_stated_confidence():
    random = np.random.default_rng(0)
    draws = np.sort(random.normal(size=(20_000, 10)), axis=1)
    k, confidence = order_statistic(10)
    covered = ((draws[:, k - 1] < 0) & (draws[:, 10 - k] > 0)).mean()
    assert covered == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / 20_000))


def test_the_summary_of_known_pairs_is_their_median_and_its_interval_the_2nd_to_9th():
    pairs = [(float(r), float(r)) for r in (4, 1, 3, 2, 9, 7, 8, 5, 6, 10)]
    ratio = summarize_pairs(pairs)
    assert ratio.median == (5.5, 5.5)
    assert ratio.interval == (2.0, 9.0)
    assert (ratio.at_least, ratio.at_most, ratio.unknown) == (0, 0, 0)


def test_pairs_that_are_only_bounded_bound_the_median_and_are_counted():
    known = [(float(r), float(r)) for r in range(1, 8)]
    ratio = summarize_pairs([*known, (20.0, math.inf), (2.0, math.inf), (0.0, 0.5)])
    assert ratio.median == (3.5, 4.5)
    assert ratio.interval == (1.0, math.inf)
    assert (ratio.at_least, ratio.at_most, ratio.unknown) == (2, 1, 0)
    assert summarize_pairs([(0.0, math.inf)] * 10).median == (0.0, math.inf)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=12))
def test_censoring_at_the_budget_never_excludes_the_true_median(steps):
    true = np.median([a / b for a, b in steps])
    censored = [ratio_bounds(a if a <= 50 else None, b if b <= 50 else None, 50) for a, b in steps]
    low, high = summarize_pairs(censored).median
    assert low <= true * (1 + 1e-12)
    assert high >= true * (1 - 1e-12)


def test_the_difference_of_scores_is_that_of_the_means_with_a_bootstrap_interval():
    random = np.random.default_rng(0)
    none = (random.random((10, 400)) < 0.10).astype(float)
    arm = (random.random((10, 400)) < 0.05).astype(float)
    difference = paired_difference(arm, none, None, seed=0)
    assert difference.estimate == pytest.approx(none.mean() - arm.mean())
    low, high = difference.interval
    assert low < difference.estimate < high
    # independent errors: the standard error of a mean of 4000 paired differences, twice each way
    error = (none - arm).std() / math.sqrt(4000)
    assert high - low == pytest.approx(2 * 1.96 * error * math.sqrt(2), rel=0.35)


def test_the_difference_of_r_squared_is_in_units_of_the_targets_variance():
    y = np.random.default_rng(0).normal(size=300)
    spread = (y - y.mean()) ** 2
    none, arm = np.tile(0.5 * spread, (4, 1)), np.tile(0.2 * spread, (4, 1))
    difference = paired_difference(arm, none, spread, seed=0)
    assert difference.estimate == pytest.approx(0.3)
    assert difference.interval == pytest.approx([0.3, 0.3])
