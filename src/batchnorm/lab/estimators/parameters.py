"""Parameters of the estimators: their names, defaults, ranges and meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, is_classifier
from sklearn.utils._param_validation import Interval, Options, StrOptions

from batchnorm.errors import InputError
from batchnorm.lab.training.settings import Placement

__all__ = ["ATTRIBUTES", "PARAMETERS", "NetworkOptions", "Parameters"]

NORMALIZED_CLASSES_RATE = {"adam": 0.01, "sgd": 0.1}
"""The automatic learning rates of classification with batch normalization (benchmarks/learning_rates.py)."""

PARAMETERS = """hidden_layer_sizes : sequence of int or int
        Units of each hidden layer.
    activation : str
        "identity", "sigmoid" (or "logistic", scikit-learn's name for it), "tanh" or "relu".
    batch_norm : "before", "after" or None
        Position of batch normalization relative to the nonlinearity of each hidden layer. With "before" the preceding
        linear map has no bias, which the normalization would subtract.
    bn_momentum : float
        Weight of a mini-batch's moments in the running statistics, as in torch. The initial values, mean 0 and variance
        1, have a weight of (1 - bn_momentum)^k after k mini-batches.
    bn_eps : float
        Added to the variance.
    solver : "adam" or "sgd"
        "lbfgs" is refused, because it needs the same function at each evaluation.
    alpha : float
        Strength of the L2 penalty ``alpha/2 * sum(W^2)`` on the weights of the linear maps; gamma, beta and biases have
        no penalty. As in scikit-learn the penalty is divided by the number of rows of the mini-batch (or the sum of
        their sample weights) and added to their mean loss.
    batch_size : int or "auto"
        Rows per mini-batch; "auto" is ``min(200, n_samples)``. A last mini-batch of one row joins the previous one.
    learning_rate_init : float or "auto"
        The learning rate, which is constant. "auto" is 0.01 for "adam" and 0.1 for "sgd" in classification with batch
        normalization, and scikit-learn's default of 0.001 otherwise.
    max_iter : int
        Maximum number of epochs per fit.
    shuffle : bool
        Whether each epoch has a new order of the rows.
    init_scale : float
        Factor of the initial weights, which are drawn by He's rule for relu and Xavier's otherwise; biases start at 0.
    random_state : int, RandomState or None
        Source of the initial weights, the holdout and the order of the other rows. Torch's global generator is neither
        read nor changed.
    tol : float
        Minimum improvement of the loss (of the validation score with ``early_stopping``) that counts as one.
    verbose : bool
        Whether to print the loss of each epoch.
    warm_start : bool
        Whether a fit continues with the network of the last fit.
    momentum : float
        Momentum of "sgd"; that of the running statistics is ``bn_momentum``.
    nesterovs_momentum : bool
        Whether "sgd" uses Nesterov's momentum.
    early_stopping : bool
        Whether to score a holdout after each epoch, stop on its score and keep the network with the best one.
    validation_fraction : float
        Share of the rows in the holdout of ``early_stopping``.
    beta_1, beta_2, epsilon : float
        Constants of "adam".
    n_iter_no_change : int
        Number of consecutive epochs without improvement after which one more stops the fit."""

ATTRIBUTES = """network_ : batchnorm.lab.training.network.MLP
        The fitted torch module, in eval mode; it maps (N, features) to (1, N, outputs).
    coefs_, intercepts_ : list of ndarray
        Weights (inputs, outputs) and bias of each linear map; the intercepts are 0 where "before" leaves none.
    loss_, best_loss_ : float
        Mean objective of the last epoch, and of the best one (None with ``early_stopping``).
    loss_curve_ : list of float
        ``loss_`` of each epoch.
    validation_scores_, best_validation_score_ : list of float, float
        {score} on the holdout after each epoch, and the best; None without ``early_stopping``.
    n_iter_, t_ : int
        Epochs of the last fit, and rows seen since the network was initialized.
    n_features_in_, n_outputs_, n_layers_ : int
        Number of features, of network outputs, and of layers including input and output.
    feature_names_in_ : ndarray of str
        Names of the features, where X had them.
    out_activation_ : str
        Function from the network's outputs to predictions: "softmax", "logistic" or "identity"."""


@dataclass(frozen=True)
class NetworkOptions:
    """Options of a fitted network, which a fit that continues with it can't change.

    Attributes
    ----------
    hidden_layer_sizes, activation, batch_norm, bn_momentum, bn_eps, early_stopping
        The parameters of these names.
    n_outputs_ : int
        Number of network outputs.
    """

    hidden_layer_sizes: tuple[int, ...]
    n_outputs_: int
    activation: str
    batch_norm: Placement
    bn_momentum: float
    bn_eps: float
    early_stopping: bool

    def check_same(self, other: NetworkOptions) -> None:
        """Raise `InputError` unless the options of a fit that continues are these."""
        for field in fields(self):
            before, now = getattr(self, field.name), getattr(other, field.name)
            if now != before:
                raise InputError(
                    f"warm_start and partial_fit continue with the same network, whose {field.name} is {before!r}; got "
                    f"{now!r}"
                )


class Parameters(BaseEstimator):  # type: ignore[misc]  # scikit-learn is published without types
    """Constructor of both estimators, and the check of its parameters, which scikit-learn's machinery makes."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions({"identity", "sigmoid", "logistic", "tanh", "relu"})],
        "batch_norm": [StrOptions({"before", "after"}), None],
        "bn_momentum": [Interval(Real, 0, 1, closed="right")],
        "bn_eps": [Interval(Real, 0, None, closed="neither")],
        "solver": [StrOptions({"sgd", "adam"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate_init": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "init_scale": [Interval(Real, 0, None, closed="neither")],
        "random_state": ["random_state"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="both")],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "beta_1": [Interval(Real, 0, 1, closed="left")],
        "beta_2": [Interval(Real, 0, 1, closed="left")],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), Options(Real, {np.inf})],
    }

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str = "relu",
        *,
        batch_norm: Placement = "before",
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        solver: str = "adam",
        alpha: float = 1e-4,
        batch_size: int | str = "auto",
        learning_rate_init: float | str = "auto",
        max_iter: int = 200,
        shuffle: bool = True,
        init_scale: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.batch_norm: Placement = batch_norm
        self.bn_momentum = bn_momentum
        self.bn_eps = bn_eps
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.init_scale = init_scale
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change

    def _check_parameters(self) -> None:
        if self.solver == "lbfgs":
            raise InputError(
                "solver must be 'adam' or 'sgd': L-BFGS needs the same function at each evaluation, and the statistics "
                "of each mini-batch make it another one; got 'lbfgs'"
            )
        self._validate_params()
        if not all(isinstance(units, Integral) and units > 0 for units in self._hidden()):
            raise InputError(f"hidden_layer_sizes must be positive whole numbers; got {self.hidden_layer_sizes!r}")
        if self.batch_norm is not None and self.batch_size == 1:
            raise InputError("batch_size must be at least 2 with batch normalization; got 1")

    def _learning_rate(self) -> float:
        if isinstance(self.learning_rate_init, str):
            normalized_classes = self.batch_norm is not None and is_classifier(self)
            return NORMALIZED_CLASSES_RATE[self.solver] if normalized_classes else 0.001
        return float(self.learning_rate_init)

    def _hidden(self) -> tuple[int, ...]:
        return tuple(np.ravel(self.hidden_layer_sizes).tolist())

    def _network_options(self, outputs: int) -> NetworkOptions:
        return NetworkOptions(
            hidden_layer_sizes=self._hidden(),
            n_outputs_=outputs,
            activation=self.activation,
            batch_norm=self.batch_norm,
            bn_momentum=self.bn_momentum,
            bn_eps=self.bn_eps,
            early_stopping=self.early_stopping,
        )
