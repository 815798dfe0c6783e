"""Regression by a multilayer perceptron with batch normalization."""

from __future__ import annotations

from typing import Any, Self

from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from torch import Tensor

from batchnorm.lab.estimators.mlp import MultilayerPerceptron
from batchnorm.lab.estimators.parameters import ATTRIBUTES, PARAMETERS

__all__ = ["BatchNormMLPRegressor"]


class BatchNormMLPRegressor(RegressorMixin, MultilayerPerceptron):  # type: ignore[misc]  # noqa: D101
    __doc__ = f"""Multilayer perceptron for regression, with batch normalization in each hidden layer.

    scikit-learn's ``MLPRegressor`` with the layers of Ioffe & Szegedy (2015): half the squared error, summed over
    the targets, is minimized over mini-batches, each normalized with its own mean and variance; predictions use the
    running statistics. There may be several targets, and X may be sparse; fits run on the CPU in the dtype of X.

    Parameters
    ----------
    {PARAMETERS}

    Attributes
    ----------
    {ATTRIBUTES.format(score="R^2")}

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
    >>> from sklearn.datasets import make_regression
    >>> X, y = make_regression(n_features=5, noise=0.1, random_state=0)
    >>> regressor = BatchNormMLPRegressor((32,), learning_rate_init=0.02, tol=1.0, random_state=0).fit(X, y)
    >>> regressor.score(X, y) > 0.9
    True
    """

    out_activation_ = "identity"
    _metric = staticmethod(r2_score)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit one more epoch, to the given rows, from the end of the last call.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
            The rows.
        y : array, shape (n_samples,) or (n_samples, n_outputs)
            Their targets.
        sample_weight : array, shape (n_samples,), optional
            Number of rows that each row counts as.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, incremental=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _encode(self, y: Any, *, incremental: bool) -> NDArray[Any]:
        return y.reshape(len(y), -1)  # type: ignore[no-any-return]

    def _decode(self, output: Tensor) -> NDArray[Any]:
        return output.numpy().squeeze(1) if self.n_outputs_ == 1 else output.numpy()

    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1)
