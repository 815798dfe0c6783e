"""Fits that continue: partial_fit and warm_start."""

import pickle
import re

import numpy as np
import pytest
from sklearn.base import clone

from batchnorm.errors import InputError
from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from support import assert_same_network, unconverged


@unconverged
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("pickled", [False, True])
def test_partial_fits_equal_a_fit_of_as_many_epochs(iris, solver, pickled):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), solver=solver, shuffle=False, batch_size=40, random_state=0, max_iter=6)
    step_by_step = clone(classifier)
    for _ in range(6):
        step_by_step.partial_fit(X, y, classes=[0, 1, 2])
        if pickled:
            step_by_step = pickle.loads(pickle.dumps(step_by_step))
    classifier.fit(X, y)
    assert_same_network(step_by_step, classifier)
    assert step_by_step.loss_curve_ == classifier.loss_curve_
    assert (step_by_step.n_iter_, step_by_step.t_) == (1, classifier.t_)


@unconverged
def test_warm_start_continues_the_last_fit(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,), solver="sgd", momentum=0.0, shuffle=False, random_state=0)
    whole = clone(regressor).set_params(max_iter=10).fit(X, y)
    halves = regressor.set_params(max_iter=5, warm_start=True).fit(X, y).fit(X, y)
    assert_same_network(halves, whole)
    assert halves.loss_curve_ == whole.loss_curve_
    assert (halves.n_iter_, halves.t_) == (5, 10 * len(X))
    anew = regressor.set_params(warm_start=False).fit(X, y)
    assert anew.loss_curve_ == whole.loss_curve_[:5]


@unconverged
@pytest.mark.parametrize(
    "change", [{"hidden_layer_sizes": (6,)}, {"batch_norm": "after"}, {"activation": "tanh"}, {"bn_momentum": 0.5}]
)
def test_a_fit_that_continues_can_not_change_the_network(iris, change):
    classifier = BatchNormMLPClassifier((5,), warm_start=True, max_iter=1).fit(*iris).set_params(**change)
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=rf"{name} is .*; got {re.escape(repr(value))}"):
        classifier.fit(*iris)


@unconverged
def test_classes_are_given_first_and_kept(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=1)
    with pytest.raises(ValueError, match="classes must be passed"):
        classifier.partial_fit(X, y)
    classifier.partial_fit(X[:60], y[:60], classes=[0, 1, 2])
    assert classifier.predict_proba(X).shape == (150, 3)
    with pytest.raises(InputError, match=r"\[0 1 2\]; got \[0 1 2 3\]"):
        classifier.partial_fit(X, np.append(y[:-1], 3))
    warm = BatchNormMLPClassifier((5,), warm_start=True, max_iter=1).fit(X, y)
    with pytest.raises(InputError, match=r"same classes .*\[0 1 2\]; got \[0 1\]"):
        warm.fit(X[:100], y[:100])
