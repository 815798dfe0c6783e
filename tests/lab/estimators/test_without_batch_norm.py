"""Without batch normalization, fits are those of scikit-learn's own estimators."""

import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier, MLPRegressor

from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from support import unconverged


def continued_from_the_same_weights(ours, theirs, X, y, sample_weight=None):
    """Fit one epoch each, give ours the weights of theirs, and fit both on from there."""
    for estimator in (ours, theirs):
        estimator.set_params(warm_start=True, max_iter=1).fit(X, y, sample_weight)
    for to, of in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        to[...] = of
    for estimator in (ours, theirs):
        estimator.set_params(max_iter=15).fit(X, y, sample_weight)


SOLVERS = {
    "sgd": {"solver": "sgd", "momentum": 0.0},
    "heavy ball": {"solver": "sgd", "nesterovs_momentum": False},
    "nesterov": {"solver": "sgd"},
    "adam": {"solver": "adam", "epsilon": 1e-30},  # theirs is added before the bias correction, so none is compared
}


@unconverged
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_batch_normalization_a_regression_goes_as_scikit_learns(three_targets, solver, weighted):
    X, y = three_targets
    weight = np.linspace(0.2, 3, len(X)) if weighted else None
    shared = {
        "hidden_layer_sizes": (7, 5),
        "activation": "tanh",
        "batch_size": 50,
        "alpha": 0.5,
        "learning_rate_init": 0.01,
        "random_state": 3,
        **SOLVERS[solver],
    }
    ours, theirs = BatchNormMLPRegressor(batch_norm=None, **shared), MLPRegressor(**shared)
    continued_from_the_same_weights(ours, theirs, X, y, weight)
    # 45 steps of rounding, each step of Lipschitz constant near 1: some hundred epsilons, with room
    for our, their in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-12)
    assert (ours.n_iter_, ours.t_, ours.n_layers_) == (theirs.n_iter_, theirs.t_, theirs.n_layers_)


@unconverged
@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_without_batch_normalization_a_classification_goes_as_scikit_learns(iris, kind):
    X, y = iris
    y = {"binary": y == 1, "multiclass": y, "multilabel": np.stack([y == 1, y > 0], 1).astype(int)}[kind]
    shared = {"hidden_layer_sizes": (6,), "batch_size": 40, "solver": "sgd", "alpha": 0.1, "random_state": 0}
    ours, theirs = BatchNormMLPClassifier(batch_norm=None, **shared), MLPClassifier(**shared)
    continued_from_the_same_weights(ours, theirs, X, y)
    np.testing.assert_allclose(ours.loss_curve_[1:], theirs.loss_curve_[1:], rtol=1e-12)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-11)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    assert ours.out_activation_ == theirs.out_activation_
    assert ours.n_outputs_ == theirs.n_outputs_


@unconverged
@pytest.mark.parametrize("weighted", [False, True])
def test_without_batch_normalization_early_stopping_goes_as_scikit_learns(iris, weighted):
    X, y = iris
    weight = np.linspace(0.2, 3, len(X)) if weighted else None
    shared = {"hidden_layer_sizes": (6,), "early_stopping": True, "validation_fraction": 0.3, "random_state": 1}
    ours, theirs = BatchNormMLPClassifier(batch_norm=None, **shared), MLPClassifier(**shared)
    for estimator in (ours, theirs):
        estimator.set_params(solver="sgd", learning_rate_init=0.05)
    continued_from_the_same_weights(ours, theirs, X, y == 1, weight)
    np.testing.assert_allclose(ours.validation_scores_[1:], theirs.validation_scores_[1:], rtol=1e-12)
