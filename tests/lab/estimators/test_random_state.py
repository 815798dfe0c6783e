"""random_state: the one source of initial weights, holdout and order of the rows."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from batchnorm.lab.estimators import BatchNormMLPClassifier
from support import assert_same_network, unconverged

ONE_STEP = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.5, "random_state": 0, "max_iter": 1}


@unconverged
def test_random_state_decides_everything_and_torchs_state_nothing(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), batch_size=40, max_iter=3)
    first = clone(classifier).set_params(random_state=0).fit(X, y)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float16)
    try:
        second = clone(classifier).set_params(random_state=0)
        with torch.no_grad():
            second.fit(X, y)
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_network(second, first)
    third = clone(classifier).set_params(random_state=1).fit(X, y)
    assert not np.allclose(third.coefs_[0], first.coefs_[0])


@unconverged
@pytest.mark.parametrize(
    ("activation", "bound"), [("relu", (6 / 4) ** 0.5), ("tanh", (6 / 104) ** 0.5), ("logistic", (6 / 104) ** 0.5)]
)
def test_weights_begin_uniform_by_the_rule_of_the_activation_times_init_scale(iris, activation, bound):
    still = BatchNormMLPClassifier(activation=activation, **ONE_STEP).set_params(learning_rate_init=1e-300)
    weights = clone(still).fit(*iris).coefs_[0]
    assert 0.97 * bound < np.abs(weights).max() <= bound  # 0.97^400 = 5e-6: so seldom are all 400 draws smaller
    np.testing.assert_array_equal(still.set_params(init_scale=4.0).fit(*iris).coefs_[0], 4 * weights)


@unconverged
def test_logistic_is_another_name_for_sigmoid(iris):
    classifier = BatchNormMLPClassifier((5,), max_iter=3, random_state=0)
    logistic, sigmoid = (clone(classifier).set_params(activation=name).fit(*iris) for name in ("logistic", "sigmoid"))
    assert_same_network(logistic, sigmoid)
    assert isinstance(logistic.network_.hidden[0].activation, torch.nn.Sigmoid)
