"""The sign test, its correction, and the words of verdicts."""

import itertools
import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from batchnorm.lab.claims.judgment import ALPHA, holm, judge, power, sentence
from batchnorm.lab.claims.measurement import Effect, Measurement, sign_test

STEPS = Effect("fewer steps", "fewer steps", "more steps", "ratio", 1.1)
SECONDS = replace(STEPS, family="seconds")
DECADES = Effect("a wider range", "decades more", "decades fewer", "difference", 1.1)


def ratio(*amounts, subject="before", effect=STEPS, reason=None):
    pairs = [amount if isinstance(amount, tuple) else (amount, amount) for amount in amounts]
    return Measurement(subject, effect, pairs, reason)


def difference(*amounts):
    return ratio(*amounts, effect=DECADES)


@pytest.mark.parametrize("pairs", [1, 5, 10, 13])
def test_the_sign_test_is_the_exact_binomial_one(pairs):
    for agreeing in range(pairs + 1):
        expected = binomtest(agreeing, pairs, alternative="greater").pvalue
        assert sign_test(agreeing, pairs) == pytest.approx(expected, rel=1e-12)


def test_holm_rejects_what_its_step_down_procedure_rejects():
    p_values = [0.3, 0.004, 0.012, 0.03, 0.001]
    rejected = set()
    for rank, index in enumerate(sorted(range(5), key=lambda i: p_values[i])):
        if p_values[index] > ALPHA / (5 - rank):
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= ALPHA} == rejected == {1, 4, 2}


def test_without_an_effect_a_claim_holds_in_at_most_alpha_of_all_sign_patterns():
    """Under the null each of the 2^8 patterns of signs is as likely as any other."""
    patterns = list(itertools.product((0.5, 2.0), repeat=8))
    holds = sum(judge([ratio(*pattern)])[0].verdict == "holds" for pattern in patterns)
    assert 0 < holds / len(patterns) <= ALPHA


def test_a_claim_holds_if_all_pairs_agree_and_does_not_hold_if_none_gains():
    assert judge([ratio(*[2.0] * 10)])[0].verdict == "holds"
    assert judge([ratio(*[1.0] * 10)])[0].verdict == "does not hold"
    assert judge([ratio(*[0.5] * 10)])[0].verdict == "does not hold"
    assert judge([ratio(*[2.0] * 5, *[0.5] * 5)])[0].verdict == "undecided"


def test_a_pair_that_is_only_bounded_counts_as_far_as_its_bounds_go():
    assert judge([ratio(*[(1.5, math.inf)] * 10)])[0].verdict == "holds"
    assert judge([ratio(*[(0.0, math.inf)] * 10)])[0].verdict == "undecided"
    assert judge([ratio(*[(0.0, 0.9)] * 10)])[0].verdict == "does not hold"


def test_a_verdict_takes_five_seeds():
    four, five = (judge([ratio(*[2.0] * seeds)])[0] for seeds in (4, 5))
    assert (four.verdict, five.verdict) == ("undecided", "holds")
    assert four.reason == "a verdict takes at least 5 seeds; got 4"


def test_a_claim_must_show_more_the_more_claims_are_judged_with_it():
    nine_of_ten = ratio(*[2.0] * 9, 0.5)
    alone = judge([nine_of_ten])[0]
    among = judge([nine_of_ten, *[ratio(*[2.0] * 5, *[0.5] * 5)] * 5])[0]
    assert alone.verdict == "holds"
    assert among.verdict == "undecided"
    assert among.adjusted_holds == pytest.approx(6 * alone.p_holds)


def test_effects_in_seconds_change_no_verdict_on_steps():
    steps = ratio(*[2.0] * 9, 0.5)
    seconds = [ratio(*[amount] * 10, effect=SECONDS) for amount in (0.2, 2.0, 3.0)]
    assert judge([steps, *seconds])[0] == judge([steps])[0]


def test_a_measurement_with_a_reason_is_undecided_and_no_test():
    reason = "there is nothing to compare"
    finding, other = judge([ratio(*[2.0] * 10, reason=reason), ratio(*[2.0] * 10)])
    assert (finding.verdict, finding.reason, finding.p_holds) == ("undecided", reason, None)
    assert other.adjusted_holds == other.p_holds


def test_power_is_the_share_of_studies_in_which_enough_pairs_agree():
    ten = power(10, 14)
    assert ten.pairs_needed == 10
    assert ten.power == pytest.approx(0.9**10)
    two = power(10, 2)
    assert two.pairs_needed == 9
    assert two.power == pytest.approx(0.9**10 + 10 * 0.9**9 * 0.1)
    assert power(4, 14).pairs_needed is None
    assert "take more seeds" in power(4, 14).text


def text_of(measurement):
    return judge([measurement])[0].text


def test_a_ratio_is_worded_as_a_factor_above_one():
    assert text_of(ratio(*[4.0] * 10)) == "4x fewer steps [4, 4]"
    assert text_of(ratio(*[0.25] * 10)) == "4x more steps [4, 4]"
    assert text_of(ratio(*[(3.0, math.inf)] * 10)) == "at least 3x fewer steps [3, inf]"
    assert text_of(ratio(*[(0.0, math.inf)] * 10)) == "unknown"


def test_a_difference_is_worded_by_its_sign_without_minus_zero():
    assert text_of(difference(*[0.5] * 3, *[1.5] * 7)) == "1.5 decades more [0.5, 1.5]"
    assert text_of(difference(*[-1.0] * 5, *[0.0] * 2, *[-2.0] * 3)) == "1 decade fewer [0, 2]"
    assert text_of(difference((-math.inf, math.inf))) == "unknown"


def test_the_sentence_names_verdicts_placements_and_reasons():
    findings = judge([ratio(*[2.0] * 10), ratio(*[2.0] * 3, subject="after")])
    assert sentence("Batch norm is faster", findings) == (
        "Batch norm is faster: holds before the nonlinearity (2x fewer steps [2, 2]); "
        "undecided after it (2x fewer steps [2, 2]; a verdict takes at least 5 seeds; got 3)."
    )
