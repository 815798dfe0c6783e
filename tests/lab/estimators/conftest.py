"""Small standardized data sets for the tests of the estimators."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris
from sklearn.preprocessing import scale


@pytest.fixture(scope="session")
def iris():
    X, y = load_iris(return_X_y=True)
    return scale(X), y


@pytest.fixture(scope="session")
def three_targets():
    X, y = load_diabetes(return_X_y=True)
    X, y = scale(X)[:120], scale(y)[:120]
    return X, np.stack([y, X[:, 0] * X[:, 1], X[:, 2]], 1)
