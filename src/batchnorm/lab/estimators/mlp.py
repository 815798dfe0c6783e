"""Base class of the classifier and the regressor: it fits a network and returns its outputs for new rows.

The loop is that of scikit-learn's ``MLPClassifier`` and ``MLPRegressor``: the same draws from ``random_state`` for the
holdout and for the order of the other rows, the same objective, stopping rule and attributes.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import is_classifier, is_regressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from batchnorm.errors import DivergedError, InputError
from batchnorm.lab.estimators.parameters import NetworkOptions, Parameters
from batchnorm.lab.estimators.rows import FitRows, dense
from batchnorm.lab.estimators.sample_weight import SampleWeightedBatchNorm1d, weighted_rows
from batchnorm.lab.training.network import MLP, batch_bounds
from batchnorm.lab.training.threads import limited_threads, threads_for

__all__ = ["MultilayerPerceptron"]

ROWS_AT_ONCE = 4096
"""Rows per forward of a prediction, which bounds its memory, also where a sparse X is made dense."""


class MultilayerPerceptron(Parameters, ABC):
    """Estimator that fits a `batchnorm.lab.training.network.MLP`; a subclass defines targets and loss."""

    _metric: ClassVar[Callable[..., float]]  # called with (y, predictions, sample_weight), for early stopping
    _dtype: np.dtype[Any]
    _options: NetworkOptions
    loss_: float
    best_loss_: float | None
    best_validation_score_: float | None

    @abstractmethod
    def _encode(self, y: Any, *, incremental: bool) -> NDArray[Any]:
        """Return y as the numbers (N, outputs) that the network is fitted to."""

    @abstractmethod
    def _decode(self, output: Tensor) -> NDArray[Any]:
        """Return the network's outputs (N, outputs) as predictions in the form of y."""

    @abstractmethod
    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each row, (N,)."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the network to X and y, from the start or, with ``warm_start``, from the end of the last fit.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
            float32 is fitted in float32, everything else in float64.
        y : array, shape (n_samples,) or (n_samples, n_outputs)
            The targets.
        sample_weight : array, shape (n_samples,), optional
            Number of rows that each row counts as, in the loss and in the batch statistics. Rows of weight 0 are left
            out.

        Returns
        -------
        self
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict the targets of the rows of X, with the running statistics.

        Parameters
        ----------
        X : array or sparse matrix, shape (n_samples, n_features)
            Computed in the dtype of the fit.

        Returns
        -------
        ndarray, shape (n_samples,) or (n_samples, n_outputs)
        """
        return self._decode(self._output(self._checked(X)))

    @property
    def coefs_(self) -> list[NDArray[Any]]:
        """Weights (inputs, outputs) of each linear map, input side first."""
        return [linear.weight.detach()[0].numpy() for linear in self.network_.linears()]

    @property
    def intercepts_(self) -> list[NDArray[Any]]:
        """Bias of each linear map; zeros where batch normalization follows, whose beta replaces it."""
        return [
            np.zeros(linear.weight.shape[2], self._dtype) if linear.bias is None else linear.bias.detach()[0, 0].numpy()
            for linear in self.network_.linears()
        ]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _checked(self, X: Any) -> Any:
        check_is_fitted(self)
        return validate_data(self, X, accept_sparse="csr", dtype=self._dtype, reset=False)

    def _output(self, X: Any) -> Tensor:
        self.network_.eval()
        rows = np.arange(X.shape[0])
        parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        with limited_threads(threads_for(self.network_, len(parts[0]), 1)), torch.no_grad():
            return torch.cat([self.network_(dense(X[part]))[0] for part in parts])

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, incremental: bool) -> Self:
        self._check_parameters()
        if incremental and self.early_stopping:
            raise InputError("early_stopping must be False for partial_fit, which has no holdout; got True")
        continues = hasattr(self, "network_") and (self.warm_start or incremental)
        rows = self._rows(X, y, sample_weight, incremental=incremental, continues=continues)
        random_state = check_random_state(self.random_state)
        seed = None if continues else int(random_state.randint(np.iinfo(np.int32).max))
        holdout = None
        if self.early_stopping:
            rows, holdout = rows.split(self.validation_fraction, random_state, stratify=is_classifier(self))
        bounds = self._batch_bounds(len(rows))
        options = self._network_options(rows.target.shape[1])
        if seed is not None:
            self._begin(rows, seed)
        else:
            self._options.check_same(options)
        self._options = options
        if not incremental or not hasattr(self, "_optimizer"):
            self._optimizer = self._new_optimizer()
        with limited_threads(threads_for(self.network_, bounds[0][1], 3)):
            self._train(rows, holdout, bounds, random_state, incremental=incremental)
        return self

    def _rows(self, X: Any, y: Any, sample_weight: Any, *, incremental: bool, continues: bool) -> FitRows:
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            multi_output=True,
            y_numeric=is_regressor(self),
            dtype=self._dtype if continues else (np.float64, np.float32),
            reset=not continues,
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        target = self._encode(y, incremental=incremental).astype(X.dtype, copy=False)
        if sample_weight is None:
            return FitRows(X, y, target, None)
        weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        return FitRows(X, y, target, weight).take(weight > 0)

    def _batch_bounds(self, rows: int) -> list[tuple[int, int]]:
        if self.batch_norm is not None and rows < 2:
            raise InputError(
                f"batch normalization needs at least 2 samples for a mean and a variance; got {rows} sample"
            )
        if isinstance(self.batch_size, str):
            return batch_bounds(rows, min(200, rows))
        if self.batch_size > rows:
            warnings.warn(
                f"batch_size is {self.batch_size} but there are only {rows} rows to fit; it is clipped", stacklevel=4
            )
        return batch_bounds(rows, min(int(self.batch_size), rows))

    def _begin(self, rows: FitRows, seed: int) -> None:
        hidden = self._hidden()
        self.n_outputs_, self.n_layers_ = rows.target.shape[1], len(hidden) + 2
        self.network_ = MLP(
            rows.X.shape[1],
            hidden,
            self.n_outputs_,
            activation="sigmoid" if self.activation == "logistic" else self.activation,
            placement=self.batch_norm,
            momentum=self.bn_momentum,
            eps=self.bn_eps,
        )
        if self.batch_norm is not None:
            for block, units in zip(self.network_.hidden, hidden, strict=True):
                block.norm = SampleWeightedBatchNorm1d(units, eps=self.bn_eps, momentum=self.bn_momentum)
        # Weights are drawn in float64, so that a fit in float32 starts from the same ones, rounded.
        self.network_.to("cpu", torch.float64).initialize([torch.Generator().manual_seed(seed)], scale=self.init_scale)
        self._dtype = rows.X.dtype
        self.network_.to(torch.float32 if self._dtype == np.float32 else torch.float64)
        self.t_ = 0
        self.loss_curve_: list[float] = []
        self.validation_scores_: list[float] | None = [] if self.early_stopping else None
        self.best_loss_ = self.best_validation_score_ = None
        self._best = -math.inf
        self._no_improvement_count = 0

    def _new_optimizer(self) -> torch.optim.Optimizer:
        parameters, rate = self.network_.parameters(), self._learning_rate()
        if self.solver == "adam":
            return torch.optim.Adam(parameters, rate, (self.beta_1, self.beta_2), self.epsilon)
        nesterov = self.nesterovs_momentum and self.momentum > 0
        return torch.optim.SGD(parameters, rate, self.momentum, nesterov=nesterov)

    def _train(
        self,
        rows: FitRows,
        holdout: FitRows | None,
        bounds: list[tuple[int, int]],
        random_state: np.random.RandomState,
        *,
        incremental: bool,
    ) -> None:
        order = np.arange(len(rows))
        best_state = copy.deepcopy(self.network_.state_dict())
        self.n_iter_ = 0
        try:
            for _ in range(1 if incremental else self.max_iter):
                if self.shuffle:
                    random_state.shuffle(order)
                self._epoch(rows, [order[start:stop] for start, stop in bounds])
                merit = -self.loss_ if holdout is None else self._validate(holdout)
                if self._is_best(merit) and holdout is not None:
                    best_state = copy.deepcopy(self.network_.state_dict())
                if self._no_improvement_count > self.n_iter_no_change:
                    self._print(f"No improvement by tol={self.tol:f} in {self.n_iter_no_change} epochs. Stopping.")
                    break
            else:
                if not incremental:
                    warnings.warn(
                        f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the optimization "
                        "hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=4,
                    )
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=4)
        if holdout is not None:
            self.network_.load_state_dict(best_state)
        self.network_.eval()

    @torch.enable_grad()
    def _epoch(self, rows: FitRows, batches: list[NDArray[np.intp]]) -> None:
        self.network_.train()
        total = 0.0
        for index in batches:
            objective = self._objective(*rows.batch(index))
            self._optimizer.zero_grad()
            objective.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            total += objective.item() * len(index)
        self.loss_ = total / len(rows)
        self.loss_curve_.append(self.loss_)
        self.n_iter_ += 1
        self.t_ += len(rows)
        self._print(f"Iteration {self.n_iter_}, loss = {self.loss_:.8f}")
        if not (math.isfinite(self.loss_) and all(values.isfinite().all() for values in self.network_.run_state())):
            raise DivergedError(
                f"loss and weights must stay finite; got loss {self.loss_} in epoch {self.n_iter_}: use a smaller "
                "learning_rate_init, or scale X (StandardScaler) and the targets"
            )

    def _objective(self, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        with weighted_rows(self.network_, weight):
            losses = self._losses(self.network_(x)[0], target)
        penalty = sum(linear.weight.square().sum() for linear in self.network_.linears()) * (self.alpha / 2)
        if weight is None:
            return (losses.sum() + penalty) / len(losses)
        return (weight @ losses + penalty) / weight.sum()

    def _validate(self, holdout: FitRows) -> float:
        score = self._metric(holdout.y, self._decode(self._output(holdout.X)), sample_weight=holdout.weight)
        self.validation_scores_.append(score)  # type: ignore[union-attr]  # a list with early_stopping
        self._print(f"Validation score: {score:f}")
        return score

    def _is_best(self, merit: float) -> bool:
        """Return whether the epoch is the best so far, and count the epochs without improvement.

        The merit is the validation score, or minus the loss.
        """
        self._no_improvement_count = self._no_improvement_count + 1 if merit < self._best + self.tol else 0
        if merit <= self._best:
            return False
        self._best = merit
        if self.early_stopping:
            self.best_validation_score_ = merit
        else:
            self.best_loss_ = -merit
        return True

    def _print(self, message: str) -> None:
        if self.verbose:
            print(message)  # noqa: T201 (verbose prints, as in scikit-learn)
