"""Kinds of targets, of matrices and of dtypes."""

import numpy as np
import polars
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import make_classification, make_multilabel_classification
from sklearn.utils import get_tags

from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
from support import assert_same_network, network_arrays, unconverged

ONE_STEP = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.5, "random_state": 0, "max_iter": 1}


@unconverged
def test_several_labels_a_row_are_predicted_together():
    X, y = make_multilabel_classification(200, 10, n_classes=4, random_state=0)
    classifier = BatchNormMLPClassifier((32,), batch_size=50, learning_rate_init=0.02, max_iter=100, random_state=0)
    classifier.fit(X, y)
    assert classifier.out_activation_ == "logistic"
    predicted, probability = classifier.predict(X), classifier.predict_proba(X)
    np.testing.assert_array_equal(predicted, (probability > 0.5).astype(int))
    assert (predicted == y).mean() > 0.95
    thin = clone(classifier).fit(X, sparse.csr_array(y)).predict(X)
    np.testing.assert_array_equal(thin.toarray(), predicted)
    assert get_tags(classifier).classifier_tags.multi_label
    step = clone(classifier).partial_fit(X, y, classes=[0, 1, 2, 3])
    np.testing.assert_array_equal(
        step.predict_proba(X), clone(classifier).set_params(max_iter=1).fit(X, y).predict_proba(X)
    )


def test_several_targets_are_regressed_together(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((64,), learning_rate_init=0.03, alpha=0.0, tol=1e-3, random_state=0).fit(X, y)
    assert regressor.predict(X).shape == y.shape
    assert regressor.score(X, y) > 0.9
    one = BatchNormMLPRegressor((8,), learning_rate_init=0.03, tol=1e-2, random_state=0).fit(X, y[:, 0])
    assert one.predict(X).shape == (len(X),)


@unconverged
@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csc_matrix])
def test_sparse_rows_give_the_same_fit_as_dense_rows(kind):
    X, y = make_classification(60, 12, random_state=0)
    X[np.abs(X) < 0.8] = 0
    classifier = BatchNormMLPClassifier((8,), batch_size=25, max_iter=5, random_state=0)
    weight = np.arange(60) % 3
    dense = clone(classifier).fit(X, y, weight)
    thin = classifier.fit(kind(X), y, weight)
    assert_same_network(thin, dense)
    np.testing.assert_array_equal(thin.predict_proba(kind(X)), dense.predict_proba(X))


@unconverged
def test_a_fit_computes_in_the_dtype_of_x(three_targets):
    X, y = three_targets
    regressor = BatchNormMLPRegressor((8,), max_iter=20, random_state=0)
    double, single = clone(regressor).fit(X, y), clone(regressor).fit(X.astype(np.float32), y)
    for fitted, dtype in ((double, np.float64), (single, np.float32)):
        assert {n.dtype for n in network_arrays(fitted).values() if n.dtype != np.int64} == {np.dtype(dtype)}
        assert {n.dtype for n in fitted.coefs_ + fitted.intercepts_} == {np.dtype(dtype)}
        assert fitted.predict(X).dtype == dtype
    np.testing.assert_allclose(single.predict(X), double.predict(X), atol=1e-4)
    whole = clone(regressor).fit((10 * X).astype(int), y)
    assert whole.network_.output.weight.dtype == torch.float64


@unconverged
def test_a_fit_in_float32_starts_from_the_weights_of_float64(iris):
    X, y = iris
    still = BatchNormMLPClassifier((5,), **ONE_STEP).set_params(learning_rate_init=1e-300)
    double, single = clone(still).fit(X, y), clone(still).fit(X.astype(np.float32), y)
    for wide, narrow in zip(double.coefs_, single.coefs_, strict=True):
        np.testing.assert_array_equal(narrow, wide.astype(np.float32))


@unconverged
def test_the_features_of_a_data_frame_are_named(iris):
    X, y = iris
    names = ["a", "b", "c", "d"]
    classifier = BatchNormMLPClassifier((5,), max_iter=2).fit(polars.DataFrame(X, schema=names), y)
    assert list(classifier.feature_names_in_) == names
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(polars.DataFrame(X, schema=["d", "c", "b", "a"]))


def test_log_probabilities_are_finite_where_probabilities_underflow():
    X = np.array([[-1.0], [1.0]] * 20)
    classifier = BatchNormMLPClassifier((4,), batch_norm=None, random_state=0, learning_rate_init=0.1).fit(
        X, X[:, 0] > 0
    )
    far = 1e4 * X[:2]
    assert (classifier.predict_proba(far) == np.array([[1.0, 0.0], [0.0, 1.0]])).all()
    assert np.isfinite(classifier.predict_log_proba(far)).all()
    np.testing.assert_allclose(classifier.predict_log_proba(X), np.log(classifier.predict_proba(X)), rtol=1e-12)
