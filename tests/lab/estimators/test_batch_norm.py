"""Batch normalization in the estimators: its place, its options and its statistics."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from batchnorm.lab.estimators import BatchNormMLPClassifier
from batchnorm.nn import BatchNorm1d
from support import network_arrays, unconverged

PLACEMENTS = ("before", "after", None)


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
def test_unseen_digits_are_recognized(batch_norm):
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X / 16, y, random_state=0)
    classifier = BatchNormMLPClassifier(
        (32,), batch_norm=batch_norm, learning_rate_init=0.01, max_iter=15, random_state=0
    )
    assert classifier.fit(X, y).score(X_test, y_test) > 0.95


@unconverged
@pytest.mark.parametrize(("batch_norm", "layers"), [("before", 2), ("after", 2), (None, 0)])
def test_placement_momentum_and_eps_reach_the_layers(iris, batch_norm, layers):
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, bn_momentum=0.3, bn_eps=0.01, max_iter=1)
    classifier.fit(*iris)
    norms = [layer for layer in classifier.network_.modules() if isinstance(layer, BatchNorm1d)]
    assert [(norm.momentum, norm.eps) for norm in norms] == [(0.3, 0.01)] * layers
    assert [block.placement for block in classifier.network_.hidden] == [batch_norm] * 2


@unconverged
def test_no_bias_precedes_batch_normalization_and_its_intercept_is_zero(iris):
    before = BatchNormMLPClassifier((5, 4), batch_norm="before", max_iter=2).fit(*iris)
    assert [linear.bias is None for linear in before.network_.linears()] == [True, True, False]
    assert [(b.shape, b.any()) for b in before.intercepts_] == [((5,), False), ((4,), False), ((3,), True)]
    after = BatchNormMLPClassifier((5, 4), batch_norm="after", max_iter=2).fit(*iris)
    assert [(b.shape, b.any()) for b in after.intercepts_] == [((5,), True), ((4,), True), ((3,), True)]
    assert [W.shape for W in before.coefs_] == [W.shape for W in after.coefs_] == [(4, 5), (5, 4), (4, 3)]


@unconverged
def test_a_last_mini_batch_of_one_row_joins_the_one_before(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), batch_size=30, max_iter=3).fit(X[:121], y[:121])
    assert classifier.network_.hidden[0].norm.num_batches_tracked == 3 * 4
    classifier.fit(X[:122], y[:122])
    assert classifier.network_.hidden[0].norm.num_batches_tracked == 3 * 5


@unconverged
def test_prediction_uses_the_running_statistics_and_leaves_them(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=3, random_state=0).fit(X, y)
    assert not classifier.network_.training
    together = classifier.predict_proba(X)
    before = {name: values.copy() for name, values in network_arrays(classifier).items()}
    classifier.network_.train()
    np.testing.assert_array_equal(classifier.predict_proba(X), together)
    np.testing.assert_allclose(np.vstack([classifier.predict_proba(row[None]) for row in X]), together, rtol=1e-13)
    for name, values in network_arrays(classifier).items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)


ONE_STEP = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.5, "random_state": 0, "max_iter": 1}


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_alpha_shrinks_the_weights_and_spares_gamma_beta_and_biases(iris, batch_norm, weighted):
    X, y = iris
    sample_weight = np.linspace(0.5, 4, len(X)) if weighted else None
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, **ONE_STEP)
    start = clone(classifier).set_params(learning_rate_init=1e-300).fit(X, y, sample_weight)  # moves nothing
    free, decayed = (clone(classifier).set_params(alpha=alpha).fit(X, y, sample_weight) for alpha in (0.0, 3.0))
    rows = len(X) if sample_weight is None else sample_weight.sum()
    weights = {f"hidden.{i}.linear.weight" for i in range(2)} | {"output.weight"}
    for name, values in network_arrays(decayed).items():
        # d/dW alpha/2 * sum(W^2) / rows = alpha * W / rows, and a step goes learning_rate_init down it
        shrinkage = 0.5 * 3.0 * network_arrays(start)[name] / rows if name in weights else 0.0
        np.testing.assert_allclose(values, network_arrays(free)[name] - shrinkage, rtol=0, atol=1e-15, err_msg=name)
