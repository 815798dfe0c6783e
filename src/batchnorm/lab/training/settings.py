"""Settings of a comparison, checked when they are made. Importing this file does not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from batchnorm.errors import InputError

__all__ = [
    "ARMS",
    "PLACEMENTS",
    "Activation",
    "Arm",
    "Inputs",
    "Optimizer",
    "Placement",
    "Settings",
    "check_init",
    "neighboring_rate",
]

Activation: TypeAlias = Literal["identity", "sigmoid", "tanh", "relu"]
Placement: TypeAlias = Literal["before", "after"] | None
Arm = Literal["none", "before", "after"]
Optimizer: TypeAlias = Literal["sgd", "adam"]
Inputs: TypeAlias = Literal["standardized", "unscaled"]

ARMS: tuple[Arm, ...] = get_args(Arm)
PLACEMENTS: dict[Arm, Placement] = {"none": None, "before": "before", "after": "after"}

LEARNING_RATES: dict[Optimizer, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "adam": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
}

GRID_FACTOR = 3.0


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison; network and batch size default to those of Ioffe & Szegedy (2015), section 4.1.

    Parameters
    ----------
    hidden : tuple of int
        Units of each hidden layer.
    activation : str
        "identity", "sigmoid", "tanh" or "relu".
    batch_size : int
        Rows per mini-batch.
    optimizer : "sgd" or "adam"
        Stochastic gradient descent without momentum, or Adam with its usual constants.
    learning_rates : tuple of float, optional
        The grid to search, as it is; by default 7 values, about a factor of 3 apart, and one more where the best is at
        an edge.
    search_seeds, seeds : int
        Runs per learning rate in the search, and fresh runs per arm to confirm it.
    steps : int
        Gradient steps per run.
    init : str, optional
        "xavier", "he" or "gaussian:SD"; by default He for relu and Xavier otherwise.
    init_scale : float
        Factor of the initial weights.
    inputs : "standardized" or "unscaled"
        Whether numbers are standardized on the training rows.
    target_score : float, optional
        The validation score to reach; by default 0.99 of the best without batch normalization.
    seed : int
        Seed of the split, the initial weights and the order of the rows.
    null_arm : "none", "before" or "after", optional
        Gives every arm this network, each with fresh seeds of its own: an A/A check, in which no claim should hold.
    """

    hidden: tuple[int, ...] = (100, 100, 100)
    activation: str = "sigmoid"
    batch_size: int = 60
    optimizer: Optimizer = "sgd"
    learning_rates: tuple[float, ...] | None = None
    search_seeds: int = 3
    seeds: int = 10
    steps: int = 2000
    init: str | None = None
    init_scale: float = 1.0
    inputs: Inputs = "standardized"
    target_score: float | None = None
    seed: int = 0
    null_arm: Arm | None = None

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise InputError(f"hidden must name at least one layer of at least 1 unit; got {list(self.hidden)}")
        if self.activation not in get_args(Activation):
            raise InputError(f"activation must be one of {', '.join(get_args(Activation))}; got {self.activation!r}")
        if self.optimizer not in LEARNING_RATES:
            raise InputError(f"optimizer must be one of {', '.join(LEARNING_RATES)}; got {self.optimizer!r}")
        if self.inputs not in get_args(Inputs):
            raise InputError(f"inputs must be one of {', '.join(get_args(Inputs))}; got {self.inputs!r}")
        for name, minimum in {"batch_size": 2, "search_seeds": 1, "seeds": 1, "steps": 1, "seed": 0}.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} must be at least {minimum}; got {getattr(self, name)}")
        rates = self.learning_rates
        if rates is not None and (not rates or any(not 0 < rate < math.inf for rate in rates)):
            raise InputError(f"learning_rates must be positive and finite; got {list(rates)}")
        if not 0 < self.init_scale < math.inf:
            raise InputError(f"init_scale must be positive and finite; got {self.init_scale}")
        if self.target_score is not None and not 0 < self.target_score <= 1:
            raise InputError(f"target_score must be positive and at most 1; got {self.target_score}")
        if self.init is not None:
            check_init(self.init)

    @property
    def grid(self) -> tuple[float, ...]:
        """The learning rates to search first, in ascending order and without duplicates."""
        return tuple(sorted(set(self.learning_rates or LEARNING_RATES[self.optimizer])))

    @property
    def sweep_steps(self) -> int:
        """Steps per run of a sweep over learning rates or initial weights, which has many runs: an eighth."""
        return max(self.steps // 8, 1)

    @property
    def variant_steps(self) -> int:
        """Steps per run of a variant of the set-up: half."""
        return max(self.steps // 2, 1)


def neighboring_rate(rate: float, steps: int) -> float:
    """Return the learning rate that is this many steps along the grid 1, 3, 10, 30, ... away.

    A rate that is not on this grid is multiplied by 3 per step.

    >>> neighboring_rate(10.0, 1), neighboring_rate(0.01, -1), neighboring_rate(0.2, 1)
    (30.0, 0.003, 0.6)
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    leading = rate / 10.0**exponent
    if round(leading, 6) not in (1.0, 3.0):
        return float(f"{rate * GRID_FACTOR**steps:.6g}")
    index = 2 * exponent + (round(leading) == 3) + steps
    return float(f"{(1, 3)[index % 2]}e{index // 2}")


def check_init(init: str) -> None:
    """Raise `InputError` unless the rule for initial weights is "xavier", "he" or "gaussian:SD"."""
    if init in ("xavier", "he"):
        return
    name, _, deviation = init.partition(":")
    try:
        fits = name == "gaussian" and 0 < float(deviation) < math.inf
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"init must be xavier, he or gaussian:SD with a positive SD; got {init!r}")
