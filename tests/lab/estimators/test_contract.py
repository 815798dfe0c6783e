"""The estimators keep scikit-learn's contract: its checks, parameters, pipelines and pickles."""

import collections
import doctest
import inspect
import pickle
import re

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from support import ROOT, assert_same_network, unconverged

PLACEMENTS = ("before", "after", None)


@pytest.mark.slow
@unconverged
@pytest.mark.parametrize(
    "estimator",
    [
        BatchNormMLPClassifier((20,), learning_rate_init=0.02, max_iter=60),
        BatchNormMLPRegressor((20,), learning_rate_init=0.02, max_iter=60),
    ],
    ids=["classifier", "regressor"],
)
def test_check_estimator_fails_nothing_and_skips_only_the_impossible(estimator):
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed
    assert collections.Counter(result["status"] for result in results)["passed"] > 50
    reasons = [str(result["exception"]) for result in results if result["status"] == "skipped"]
    # scikit-learn's own MLPs have no decision_function either
    allowed = re.compile(r"pandas is not installed|SCIPY_ARRAY_API is not set|does not have a decision_function")
    assert [reason for reason in reasons if not allowed.search(reason)] == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [(BatchNormMLPClassifier, MLPClassifier), (BatchNormMLPRegressor, MLPRegressor)]
)
def test_a_parameter_of_scikit_learn_has_its_default_except_the_learning_rate(ours, theirs):
    ours, theirs = (inspect.signature(estimator).parameters for estimator in (ours, theirs))
    shared = ours.keys() & theirs.keys()
    assert ours.keys() - shared == {"batch_norm", "bn_momentum", "bn_eps", "init_scale"}
    differing = {name: ours[name].default for name in shared if ours[name].default != theirs[name].default}
    assert differing == {"learning_rate_init": "auto"}


@unconverged
@pytest.mark.parametrize(
    ("estimator", "solver", "batch_norm", "rate"),
    [
        (BatchNormMLPClassifier, "adam", "before", 0.01),
        (BatchNormMLPClassifier, "adam", "after", 0.01),
        (BatchNormMLPClassifier, "adam", None, 0.001),
        (BatchNormMLPClassifier, "sgd", "before", 0.1),
        (BatchNormMLPClassifier, "sgd", None, 0.001),
        (BatchNormMLPRegressor, "adam", "before", 0.001),
        (BatchNormMLPRegressor, "sgd", "before", 0.001),
    ],
)
def test_the_automatic_rate_is_scikit_learns_except_for_normalized_classes(iris, estimator, solver, batch_norm, rate):
    shared = {"hidden_layer_sizes": (5,), "solver": solver, "batch_norm": batch_norm, "max_iter": 2, "random_state": 0}
    chosen = estimator(**shared).fit(*iris)
    assert_same_network(chosen, estimator(**shared, learning_rate_init=rate).fit(*iris))
    assert chosen.learning_rate_init == "auto"


def test_a_learning_rate_by_another_name_is_refused(iris):
    with pytest.raises(ValueError, match="learning_rate_init"):
        BatchNormMLPClassifier(learning_rate_init="fast").fit(*iris)


@unconverged
def test_a_pickled_classifier_predicts_the_same(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=5, random_state=0).fit(X, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(classifier)).predict_proba(X), classifier.predict_proba(X))


@unconverged
def test_a_grid_search_over_a_pipeline_finds_a_placement(iris):
    X, y = load_iris(return_X_y=True)
    classifier = BatchNormMLPClassifier((8,), learning_rate_init=0.05, max_iter=30, random_state=0)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), classifier), {"batchnormmlpclassifier__batch_norm": PLACEMENTS}, cv=3
    )
    search.fit(X, y)
    assert search.best_score_ > 0.93
    assert len(set(search.cv_results_["mean_test_score"])) > 1


def test_the_examples_of_the_page_run():
    failed, attempted = doctest.testfile(str(ROOT / "docs/estimators.md"), module_relative=False)
    assert (failed, attempted > 10) == (0, True)
