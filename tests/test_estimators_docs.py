"""docs/estimators.md quotes the committed measurements, and these argue for the defaults that it states."""

import inspect
import statistics

import pytest

import batchnorm as bn
from batchnorm.lab.estimators.parameters import NORMALIZED_CLASSES_RATE
from batchnorm.lab.training import threads
from support import ROOT, benchmark_results, benchmark_script

PAGE = (ROOT / "docs/estimators.md").read_text()
TEXT = " ".join(PAGE.split())


@pytest.mark.parametrize("name", ["estimators", "learning_rates"])
def test_the_sentences_and_tables_of_the_page_are_those_of_the_committed_files(name):
    assert benchmark_script(name).filled(PAGE, benchmark_results(name)) == PAGE


def rates(**wanted):
    """Return the records of ours that have these values."""
    records = benchmark_results("learning_rates")["results"]
    return [each for each in records if ({"library": "batchnorm"} | wanted).items() <= each.items()]


def medians(**wanted):
    return [statistics.median(record["epochs"]) for record in rates(**wanted)]


CLASSES = ("iris", "wine", "breast_cancer", "digits")
RATES = {"adam": 0.01, "sgd": 0.1}


def test_the_automatic_rate_of_adam_needs_fewer_epochs_than_scikit_learns():
    pairs = [
        [medians(solver="adam", batch_norm="before", data=data, rate=rate)[0] for rate in (RATES["adam"], 0.001)]
        for data in CLASSES
    ]
    assert all(fast <= slow for fast, slow in pairs)
    assert sum(fast < slow / 2 for fast, slow in pairs) >= 3


@pytest.mark.parametrize("solver", RATES)
@pytest.mark.parametrize("data", CLASSES)
def test_the_automatic_rates_cost_no_accuracy_beyond_the_noise_of_the_splits(solver, data):
    fast, slow = (
        rates(solver=solver, batch_norm="before", data=data, rate=rate)[0]["scores"] for rate in (RATES[solver], 0.001)
    )
    loss = [b - a for a, b in zip(fast, slow, strict=True)]
    assert statistics.fmean(loss) < 2 * statistics.stdev(loss) / len(loss) ** 0.5


def test_what_the_page_says_of_threads_is_in_the_code():
    assert benchmark_results("estimators")["settings"]["work_per_thread"] == threads.WORK_PER_THREAD == 400e6
    assert "every 400 MB of work" in TEXT
    assert "two threads begin at 167,000 weights" in TEXT
    assert round(2 * threads.WORK_PER_THREAD / (8 * 200 * 3), -3) == 167_000
    assert 64 * 100 + 100 * 10 == 7400


def test_one_thread_takes_less_processor_time_than_two_wherever_one_is_chosen():
    records = [each for each in benchmark_results("estimators")["sizes"] if each["chosen"] == 1]
    assert len(records) > 6
    assert all(each["processor_ms"]["1"] < each["processor_ms"]["2"] for each in records)


def test_as_they_are_fits_take_no_more_processor_time_than_on_two_threads():
    times = {
        (each["data"], each["condition"], each["threads"]): each["processor_ms"]
        for each in benchmark_results("estimators")["epochs"]
        if (each["library"], each["batch_norm"]) == ("ours", "before")
    }
    for data in ("digits", "wine", "breast_cancer", "diabetes"):
        for condition in ("idle", "busy"):
            assert times[data, condition, "chosen"] < times[data, condition, "2"]


def test_the_rates_of_the_page_are_those_of_the_code():
    assert NORMALIZED_CLASSES_RATE == RATES
    assert 'is 0.01 for `solver="adam"` and 0.1 for `"sgd"` in classification with batch normalization' in TEXT
    assert inspect.signature(bn.BatchNormMLPClassifier).parameters["learning_rate_init"].default == "auto"
