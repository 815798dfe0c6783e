"""Stopping of a fit: by the loss, by a holdout, by max_iter and by Ctrl-C."""

import contextlib
import io

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning

from batchnorm.errors import InputError
from batchnorm.lab.estimators import BatchNormMLPClassifier
from support import assert_same_network, unconverged


def test_a_fit_stops_when_the_loss_no_longer_improves(iris):
    classifier = BatchNormMLPClassifier((5,), tol=0.05, n_iter_no_change=3, learning_rate_init=0.01, random_state=0)
    classifier.fit(*iris)
    losses = np.array(classifier.loss_curve_)
    assert len(losses) == classifier.n_iter_ < classifier.max_iter
    assert (classifier.loss_, classifier.best_loss_) == (losses[-1], losses.min())
    bests = np.minimum.accumulate(losses)
    no_improvement = losses[1:] > bests[:-1] - 0.05
    assert no_improvement[-4:].all()
    assert not any(no_improvement[i : i + 4].all() for i in range(len(no_improvement) - 4))


def test_a_fit_that_has_not_converged_warns(iris):
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(3\) reached") as caught:
        BatchNormMLPClassifier((5,), max_iter=3).fit(*iris)
    assert caught[0].filename == __file__


@unconverged
def test_early_stopping_keeps_the_network_that_was_best_on_the_holdout(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), early_stopping=True, learning_rate_init=0.03, random_state=2)
    classifier.fit(X, y)
    scores = classifier.validation_scores_
    best = int(np.argmax(scores))
    assert best + 1 < len(scores) == classifier.n_iter_
    assert (classifier.best_validation_score_, classifier.best_loss_) == (scores[best], None)
    assert_same_network(classifier, clone(classifier).set_params(max_iter=best + 1).fit(X, y))
    with pytest.raises(InputError, match="early_stopping must be False"):
        classifier.partial_fit(X, y)


@unconverged
def test_verbose_prints_each_epoch(iris, capsys):
    classifier = BatchNormMLPClassifier((5,), max_iter=2, early_stopping=True, verbose=True, random_state=0).fit(*iris)
    expected = [
        line
        for i, (loss, score) in enumerate(zip(classifier.loss_curve_, classifier.validation_scores_, strict=True), 1)
        for line in (f"Iteration {i}, loss = {loss:.8f}", f"Validation score: {score:f}")
    ]
    assert capsys.readouterr().out.splitlines() == expected


class InterruptingAtTheThirdLine(io.StringIO):
    def write(self, text):
        if self.getvalue().count("\n") == 2:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupted_fit_warns_and_keeps_its_network(iris):
    classifier = BatchNormMLPClassifier((5,), verbose=True)
    with contextlib.redirect_stdout(InterruptingAtTheThirdLine()), pytest.warns(UserWarning, match="interrupted"):
        classifier.fit(*iris)
    assert classifier.n_iter_ == 3
    assert not classifier.network_.training
