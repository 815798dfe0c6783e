"""Fits and predictions of small networks run on one thread, and leave torch's number of threads as it is."""

import threading

import numpy as np
import pytest
import torch
from joblib import parallel_backend
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV

from batchnorm.errors import DivergedError
from batchnorm.lab.estimators import BatchNormMLPClassifier
from support import assert_same_network, unconverged


class Observed(BatchNormMLPClassifier):
    """A classifier that notes the number of threads of each mini-batch."""

    seen = ()

    def _losses(self, output, target):
        self.seen = {*self.seen, torch.get_num_threads()}
        return super()._losses(output, target)


@pytest.fixture(autouse=True)
def four_threads(set_threads):
    """Give torch 4 threads, and check that a test leaves them."""
    set_threads(4)
    yield
    assert torch.get_num_threads() == 4


def numbers_of_predictions(classifier, X):
    """Return the numbers of threads in the forward passes of a prediction."""
    seen = set()
    hook = classifier.network_.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    classifier.predict_proba(X)
    hook.remove()
    return seen


@unconverged
@pytest.mark.parametrize("batch_norm", ["before", "after", None])
def test_a_small_network_is_fitted_and_predicts_on_one_thread(iris, batch_norm):
    X, y = iris
    classifier = Observed(batch_norm=batch_norm, max_iter=2, early_stopping=True).fit(X, y)
    assert classifier.seen == {1}
    assert numbers_of_predictions(classifier, X) == {1}
    classifier = Observed(batch_norm=batch_norm).partial_fit(X, y, classes=np.unique(y))
    assert classifier.seen == {1}


@unconverged
def test_a_large_network_keeps_torchs_threads():
    X = np.random.default_rng(0).normal(size=(128, 1000))
    classifier = Observed((2000,), max_iter=1).fit(X, X[:, 0] > 0)
    assert classifier.seen == {4}
    assert numbers_of_predictions(classifier, X) == {4}


def test_a_fit_that_diverges_gives_the_threads_back(iris):
    X, y = iris
    with pytest.raises(DivergedError), np.errstate(all="ignore"):
        BatchNormMLPClassifier((5,), batch_norm=None, solver="sgd", learning_rate_init=1e300).fit(X * 1e30, y)


@unconverged
def test_searches_in_threads_leave_torchs_number_to_new_threads(iris):
    X, y = load_iris(return_X_y=True)
    grid = {"alpha": [1e-4, 1e-3, 1e-2], "batch_norm": ["before", None]}
    with parallel_backend("threading", n_jobs=3):
        search = GridSearchCV(BatchNormMLPClassifier((8,), max_iter=5, random_state=0), grid, cv=3).fit(X, y)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [4]
    alone = BatchNormMLPClassifier((8,), max_iter=5, random_state=0, **search.best_params_).fit(X, y)
    assert_same_network(search.best_estimator_, alone)
