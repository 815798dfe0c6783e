"""Verdicts and caveats of results that are written by hand."""

import math
from dataclasses import replace

import pytest

from batchnorm.lab.comparison.measures import summarize_pairs
from batchnorm.lab.comparison.result import ArmResult, Ratio, Result
from batchnorm.lab.comparison.verdict import bounds_text, caveat, ratio_text, steps_text, verdict
from batchnorm.lab.training.runs import Target
from batchnorm.lab.training.settings import ARMS


def result(before, after, *, headline=True, value=0.95, medians=(300, 50, 60), diverged=(0, 0, 0)):
    arms = {
        arm: ArmResult(0.3, [], 0, [median] * 10, median, bad, None, [], math.nan)
        for arm, median, bad in zip(ARMS, medians, diverged, strict=True)
    }
    return Result(
        score_name="accuracy",
        target=Target("score", value, "a validation accuracy of 0.95, 0.99 of the best"),
        headline=headline,
        grid=[0.1, 0.3, 1.0],
        evaluation_steps=[],
        arms=arms,
        ratios={"before": Ratio(**vars(summarize_pairs(before))), "after": Ratio(**vars(summarize_pairs(after)))},
        sensitivity=[],
        stacking=None,
    )


def pairs(*ratios):
    return [(float(ratio), float(ratio)) for ratio in ratios]


CLEAR = pairs(3, 4, 5, 5, 5, 6, 6, 7, 8, 9)
NONE = pairs(0.5, 0.6, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 2.5)
HARM = pairs(0.1, 0.2, 0.2, 0.25, 0.25, 0.25, 0.3, 0.4, 0.5, 0.6)
OPEN = [*pairs(3, 4, 5, 5), *[(10.0, math.inf)] * 6]


def test_a_clear_gain_is_stated_with_its_interval():
    text = verdict(result(CLEAR, CLEAR), "digits", 2000)
    assert text == (
        "On digits batch norm needs 5.5x fewer steps before the nonlinearity (97.9% CI 4 to 8) and "
        "5.5x fewer steps after it (97.9% CI 4 to 8) to reach a validation accuracy of 0.95."
    )


def test_an_unclear_effect_is_called_unclear():
    text = verdict(result(NONE, NONE), "wine", 2000)
    assert text == (
        "On wine batch norm does not clearly help the network reach a validation accuracy of 0.95 sooner, either "
        "before the nonlinearity (ratio of steps 1.1, 97.9% CI 0.6 to 2) or "
        "after it (ratio of steps 1.1, 97.9% CI 0.6 to 2)."
    )


def test_harm_is_stated_as_more_steps():
    text = verdict(result(HARM, NONE), "wine", 2000)
    assert text == (
        "On wine batch norm does not help the network reach a validation accuracy of 0.95 sooner; it needs "
        "4x more steps before the nonlinearity (97.9% CI 2 to 5); "
        "the effect after it (ratio of steps 1.1, 97.9% CI 0.6 to 2) is not clear."
    )


def test_a_gain_and_a_harm_are_both_stated():
    text = verdict(result(CLEAR, HARM), "wine", 2000)
    assert "5.5x fewer steps before" in text
    assert "4x more steps after it (97.9% CI 2 to 5)" in text


def test_a_ratio_that_is_only_bounded_is_stated_as_a_bound():
    text = verdict(result(OPEN, CLEAR), "digits", 2000)
    assert "at least 10x fewer steps before the nonlinearity (97.9% CI 4 to unbounded)" in text
    assert "In 6 of the 2 x 10 pairs" in caveat(result(OPEN, CLEAR), 360)


def test_too_few_seeds_for_an_interval_make_no_claim():
    few = result(CLEAR[:4], CLEAR[:4])
    few.arms["none"] = replace(few.arms["none"], steps=[1] * 4)
    assert "does not clearly help" in verdict(few, "digits", 2000)
    assert "With 4 seeds an interval contains the true ratio with at most 87.5% confidence" in caveat(few, 360)


def test_the_caveat_names_a_missing_target_first():
    assert caveat(result(CLEAR, CLEAR, headline=False, value=-math.inf), 360).startswith("No run without batch norm")


def test_with_a_target_score_the_caveat_does_not_mention_the_loss():
    assert "validation loss" not in caveat(result(CLEAR, CLEAR, headline=False), 36)


def test_without_a_headline_the_verdict_states_medians_and_the_caveat_the_reason():
    text = verdict(result(CLEAR, CLEAR, headline=False), "wine", 2000)
    assert "x fewer" not in text
    assert "300 without batch norm, 50 with it before the nonlinearity and 60 after it" in text
    assert "Only 36 validation rows" in caveat(result(CLEAR, CLEAR, headline=False), 36)


def test_no_ratio_is_given_where_no_arm_arrives():
    unknown = [(0.0, math.inf)] * 10
    text = verdict(result(unknown, unknown, medians=(None, None, None)), "wine", 500)
    assert "no arm had most of its runs reach" in text


@pytest.mark.parametrize(
    ("diverged", "words"),
    [
        ((10, 0, 0), "and with it before the nonlinearity and after it trained"),
        ((10, 10, 10), "and so did those with it"),
    ],
)
def test_a_baseline_that_never_trained_is_the_verdict(diverged, words):
    text = verdict(result(CLEAR, CLEAR, headline=False, value=-math.inf, diverged=diverged), "wine", 500)
    assert "diverged at every learning rate" in text
    assert words in text


def test_a_rate_at_the_edge_of_the_grid_is_the_caveat():
    edged = result(CLEAR, CLEAR)
    edged.arms["before"] = replace(edged.arms["before"], learning_rate=1.0)
    assert caveat(edged, 360).startswith("The best learning rate of before is at the edge of the grid")
    assert caveat(result(CLEAR, CLEAR), 360).startswith("The interval covers initial weights and batch order")


def test_numbers_in_words():
    assert bounds_text((5.0, 5.0)) == "5"
    assert bounds_text((5.0, math.inf)) == "at least 5"
    assert bounds_text((0.0, 0.25)) == "at most 0.25"
    assert bounds_text((0.0, math.inf)) == "unknown"
    assert bounds_text((3.0, 12.4)) == "3 to 12"
    assert steps_text(None, 2000) == "> 2000"
    assert steps_text(305.0, 2000) == "305"
    assert ratio_text(summarize_pairs(CLEAR)) == "5.5 [4, 8]"
    assert ratio_text(summarize_pairs(OPEN)) == ">=10 [4, inf]"
