"""Classification by a multilayer perceptron with batch normalization."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
from torch import Tensor
from torch.nn import functional as F

from batchnorm.errors import InputError
from batchnorm.lab.estimators.mlp import MultilayerPerceptron
from batchnorm.lab.estimators.parameters import ATTRIBUTES, PARAMETERS

__all__ = ["BatchNormMLPClassifier"]


class BatchNormMLPClassifier(ClassifierMixin, MultilayerPerceptron):  # type: ignore[misc]  # noqa: D101
    __doc__ = f"""Multilayer perceptron for classification, with batch normalization in each hidden layer.

    scikit-learn's ``MLPClassifier`` with the layers of Ioffe & Szegedy (2015): cross-entropy is minimized over
    mini-batches, each normalized with its own mean and variance; predictions use the running statistics. Targets may be
    binary, multiclass or multilabel, and X may be sparse; fits run on the CPU in the dtype of X.

    Parameters
    ----------
    {PARAMETERS}

    Attributes
    ----------
    classes_ : ndarray
        The labels, in the order of the columns of `predict_proba`.
    {ATTRIBUTES.format(score="Accuracy")}

    Raises
    ------
    InputError
        A `ValueError`: a parameter is out of its range, or there is a single row to fit.
    DivergedError
        The loss or a weight is no longer finite after an epoch.

    References
    ----------
    Ioffe & Szegedy (2015), "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift"; He et al. (2015), "Delving Deep into Rectifiers"; Glorot & Bengio (2010), "Understanding the difficulty
    of training deep feedforward neural networks"; Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization".

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = BatchNormMLPClassifier((16,), learning_rate_init=0.02, tol=1e-3, random_state=0).fit(X, y)
    >>> classifier.predict(X[:3])
    array([0, 0, 0])
    >>> classifier.score(X, y) > 0.9
    True
    """

    _metric = staticmethod(accuracy_score)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """Fit one more epoch, to the given rows, from the end of the last call.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
            The rows.
        y : array, shape (n_samples,) or (n_samples, n_outputs)
            Their targets, in which some classes may be missing.
        sample_weight : array, shape (n_samples,), optional
            Number of rows that each row counts as.
        classes : array, shape (n_classes,), optional
            All classes of all calls; needed in the first one.

        Returns
        -------
        self
        """
        if _check_partial_fit_first_call(self, classes):
            self._label_binarizer = LabelBinarizer().fit(y if type_of_target(y).startswith("multilabel") else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Return the probability of each class, or of each label of multilabel targets, (n_samples, n_classes)."""
        return self._log_probabilities(X).exp().numpy()

    def predict_log_proba(self, X: Any) -> NDArray[Any]:
        """Return the logarithm of `predict_proba`, which is finite also where that underflows to 0."""
        return self._log_probabilities(X).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    @property
    def out_activation_(self) -> str:
        """The softmax for more than 2 classes, otherwise the logistic function of each output."""
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _encode(self, y: Any, *, incremental: bool) -> NDArray[Any]:
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
        else:
            classes = unique_labels(y)
            if not incremental and set(classes) != set(self.classes_):
                raise InputError(
                    f"with warm_start, y must have the same classes as in the previous fit, {self.classes_}; got "
                    f"{classes}"
                )
            if len(np.setdiff1d(classes, self.classes_)):
                raise InputError(f"y may only have the classes {self.classes_}; got {classes}")
        return self._label_binarizer.transform(y)  # type: ignore[no-any-return]

    def _decode(self, output: Tensor) -> NDArray[Any]:
        # An output of 0 is a probability of one half. For several classes the largest output decides.
        return self._label_binarizer.inverse_transform(output.numpy(), threshold=0.0)  # type: ignore[no-any-return]

    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        if self.out_activation_ == "softmax":
            return F.cross_entropy(output, target, reduction="none")
        return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)

    def _log_probabilities(self, X: Any) -> Tensor:
        output = self._output(self._checked(X))
        if self.out_activation_ == "softmax":
            return F.log_softmax(output, 1)
        if self.n_outputs_ == 1:
            output = torch.cat([-output, output], 1)
        return F.logsigmoid(output)
