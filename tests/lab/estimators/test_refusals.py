"""Parameters and rows that the estimators refuse."""

import pytest

from batchnorm.errors import DivergedError, InputError
from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from support import unconverged


def test_lbfgs_is_refused_with_the_reason(iris):
    with pytest.raises(InputError, match=r"same function at each evaluation.*got 'lbfgs'"):
        BatchNormMLPClassifier(solver="lbfgs").fit(*iris)


def test_a_single_row_is_refused_and_leaves_the_estimator_unfitted(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,))
    with pytest.raises(InputError, match=r"at least 2 samples .*; got 1 sample"):
        regressor.fit(X[:1], y[:1])
    with pytest.raises(InputError, match=r"at least 2 samples .*; got 1 sample"):
        regressor.fit(X[:3], y[:3], sample_weight=[0, 2, 0])
    assert not hasattr(regressor, "network_")
    with pytest.raises(InputError, match=r"batch_size must be at least 2 .*; got 1"):
        regressor.set_params(batch_size=1).fit(X, y)


@unconverged
def test_a_single_row_can_be_fitted_without_batch_normalization(three_targets):
    X, y = three_targets
    assert BatchNormMLPRegressor((5,), batch_norm=None, max_iter=2).fit(X[:1], y[:1]).predict(X[:1]).shape == (1, 3)


def test_early_stopping_needs_a_holdout_of_two_rows(three_targets):
    X, y = three_targets
    with pytest.raises(InputError, match=r"a holdout of at least 2 rows; got 1"):
        BatchNormMLPRegressor((5,), early_stopping=True).fit(X[:9], y[:9])


def test_a_loss_that_is_not_finite_stops_the_fit_with_advice(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((5,), batch_norm=None, solver="sgd", learning_rate_init=1e6)
    with pytest.raises(
        DivergedError, match=r"stay finite; got loss .* in epoch \d+: use a smaller learning_rate_init, or scale X"
    ):
        regressor.fit(X, y)


@unconverged
def test_a_batch_size_above_the_rows_is_clipped_with_a_warning(iris):
    with pytest.warns(UserWarning, match="batch_size is 151 but there are only 150 rows"):
        BatchNormMLPClassifier((5,), batch_size=151, max_iter=1).fit(*iris)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"batch_norm": "between"}, "batch_norm.*Got 'between'"),
        ({"activation": "gelu"}, "activation.*Got 'gelu'"),
        ({"bn_momentum": 0.0}, "bn_momentum.*Got 0.0"),
        ({"bn_eps": 0.0}, "bn_eps.*Got 0.0"),
        ({"init_scale": -1.0}, "init_scale.*Got -1.0"),
        ({"hidden_layer_sizes": (5, 0)}, r"hidden_layer_sizes must be positive whole numbers; got \(5, 0\)"),
        ({"hidden_layer_sizes": (5.5,)}, r"hidden_layer_sizes must be positive whole numbers; got \(5.5,\)"),
    ],
)
def test_parameters_out_of_range_are_refused(iris, parameters, message):
    with pytest.raises(ValueError, match=message):
        BatchNormMLPClassifier(**parameters).fit(*iris)
