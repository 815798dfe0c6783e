"""Gradient descent on the squared error of a linear neuron with two weights, whose loss is a bowl."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "LossSurface", "descent", "least_squares", "loss_surface", "steps_to_minimum"]

REMAINING_LOSS = 0.01
MAX_STEPS = 1e15
GRID = 41
FIRST_STEPS = 20
LATER_STEPS = 60
Array = NDArray[np.float64]


@dataclass(frozen=True)
class LossSurface:
    """The loss of a linear neuron over its two weights, and the path of gradient descent on it.

    Attributes
    ----------
    x, y : list of float
        Grid of the first and of the second weight.
    loss : list of list of float
        A row per value of ``y``.
    path : list of list of float
        The weights at some of the steps.
    path_steps : list of float
        The steps of the path, from 0.
    minimum : list of float
        The weights of least loss.
    condition : float
        The largest over the least curvature.
    steps : float
        Steps to the minimum (see `steps_to_minimum`); infinite where no number of steps gets there.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float]]
    path: list[list[float]]
    path_steps: list[float]
    minimum: list[float]
    condition: float
    steps: float


def least_squares(x: Array, y: Array) -> Array:
    """Return the weights (2,) of the least mean((x w - y)^2)."""
    return np.asarray(np.linalg.lstsq(x, y, rcond=None)[0])


def _curvatures(x: Array) -> tuple[Array, Array]:
    """Return the curvatures of the loss in ascending order, and their directions in columns."""
    curvatures, directions = np.linalg.eigh(2 * x.T @ x / len(x))
    return curvatures, directions


def steps_to_minimum(x: Array, y: Array) -> float:
    """Return the steps of gradient descent from w = 0, with rate 1 / curvature, until 99% of the excess loss is gone.

    ``x`` is (rows, 2), ``y`` (rows,). In each direction of the Hessian a step shrinks the excess of the mean squared
    error by (1 - curvature / largest curvature)^2, so the number of steps follows without taking them. It is infinite
    where a direction that matters is flat to rounding.
    """
    curvatures, directions = _curvatures(x)
    excess = curvatures * (directions.T @ least_squares(x, y)) ** 2
    shrink = 1 - curvatures / curvatures[-1]
    if excess.sum() == 0:
        return 0.0

    def remaining(steps: float) -> float:
        return float((excess * shrink ** (2 * steps)).sum() / excess.sum())

    low, high = 0, 1
    while remaining(high) > REMAINING_LOSS:
        low, high = high, high * 2
        if high > MAX_STEPS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if remaining(middle) > REMAINING_LOSS else (low, middle)
    return float(high)


def descent(x: Array, y: Array) -> tuple[Array, Array]:
    """Return some steps of gradient descent, all of the first and ever fewer later, and the weights (points, 2)."""
    curvatures, directions = _curvatures(x)
    minimum = least_squares(x, y)
    last = min(steps_to_minimum(x, y), MAX_STEPS)
    steps = np.unique(np.concatenate([np.arange(FIRST_STEPS), np.geomspace(1, max(last, 1), LATER_STEPS)]).round())
    shrink = (1 - curvatures / curvatures[-1])[None, :] ** steps[:, None]
    return steps, np.asarray(minimum - (shrink * (directions.T @ minimum)) @ directions.T)


def loss_surface(x: Array, y: Array) -> LossSurface:
    """Return the loss around its minimum, over a range that includes the path of gradient descent."""
    curvatures, _ = _curvatures(x)
    minimum = least_squares(x, y)
    points, path = descent(x, y)
    reach = 1.25 * float(max(np.abs(path - minimum).max(), np.abs(minimum).max())) or 1.0  # one scale for both weights
    axes = [np.linspace(weight - reach, weight + reach, GRID) for weight in minimum]
    w1, w2 = np.meshgrid(*axes)
    second, cross, square = x.T @ x / len(x), x.T @ y / len(x), float(y @ y / len(y))
    loss = (
        second[0, 0] * w1**2
        + 2 * second[0, 1] * w1 * w2
        + second[1, 1] * w2**2
        - 2 * (cross[0] * w1 + cross[1] * w2)
        + square
    )
    return LossSurface(
        x=axes[0].tolist(),
        y=axes[1].tolist(),
        loss=loss.tolist(),
        path=path.tolist(),
        path_steps=points.tolist(),
        minimum=minimum.tolist(),
        condition=float(curvatures[-1] / curvatures[0]) if curvatures[0] > 0 else math.inf,
        steps=steps_to_minimum(x, y),
    )
