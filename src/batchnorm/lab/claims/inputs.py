"""Claim: normalized inputs make the loss rounder, so that gradient descent gets to its minimum in fewer steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_selection import f_classif, f_regression

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.judgment import FEWEST_PAIRS, Effect, Measurement
from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.comparison.scores import paired_difference
from batchnorm.lab.comparison.study import Study

__all__ = ["CLAIM", "InputsDetails", "LossSurface", "steps_to_minimum"]

MARGIN = 1.1
ENOUGH = 0.01
FEWEST_ROWS_A_PART = 8
MOST_PARTS = 20
GRID = 41
PATH = 60
Array = NDArray[np.float64]
FEWER_STEPS = Effect(
    "fewer steps of a neuron", "fewer steps to the minimum", "more steps to the minimum", "ratio", MARGIN
)


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


@dataclass(frozen=True)
class InputsDetails(Details):
    """Details of the linear neuron: its two columns, its target, and its loss with raw and with normalized inputs."""

    columns: list[str]
    told_apart: str
    raw: LossSurface
    normalized: LossSurface


@dataclass(frozen=True)
class _Neuron:
    """Rows, two columns of theirs and what a linear neuron is to say of them."""

    columns: tuple[int, int]
    told_apart: str
    raw: Array
    normalized: Array
    y: Array
    validation: tuple[Array, Array]


def _design(_: Study) -> str:
    return (
        "One linear neuron w1*x1 + w2*x2 on the two columns that tell most (by their F statistics; of several classes "
        "the two that they tell best apart), squared error of the standardized target, on raw and on normalized "
        "inputs. Gradient descent starts at w = 0 and takes the largest step that is safe everywhere, one over the "
        f"largest curvature; counted are its steps until {1 - ENOUGH:.0%} of the loss that can be shed is shed. For "
        f"the verdict the training rows are dealt into up to {MOST_PARTS} parts, and the steps with raw "
        "inputs over those with normalized ones are taken part by part. It does not hold where a gain of "
        "10% is excluded."
    )


def _scores(x: Array, y: NDArray[Any], task: str) -> Array:
    """F statistic of each column; 0 where it does not vary."""
    varies = np.ptp(x, axis=0) > 0
    scores = np.zeros(x.shape[1])
    if varies.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            scores[varies] = (f_classif if task == "classification" else f_regression)(x[:, varies], y)[0]
    return np.nan_to_num(scores, posinf=np.finfo(float).max)


def _best_two(scores: Array) -> tuple[int, int]:
    first, second = sorted(np.argsort(-scores, kind="stable")[:2].tolist())
    return int(first), int(second)


def _choose(study: Study) -> _Neuron | None:
    """The two columns, and the two classes; None where there are not two columns that vary."""
    dataset = study.dataset
    train, validation = dataset.parts["train"], dataset.parts["validation"]
    x, y = dataset.x[train], dataset.y[train]
    if np.count_nonzero(np.ptp(x, axis=0) > 0) < 2:
        return None
    kept = np.ones(len(y), bool)
    held = np.ones(len(validation), bool)
    told_apart = dataset.target
    if dataset.task == "classification":
        best, (a, b) = -math.inf, (0, 1)
        for pair in itertools.combinations(np.unique(y).tolist(), 2):
            rows = np.isin(y, pair)
            scores = _scores(x[rows], y[rows], dataset.task)
            total = float(np.sort(scores)[-2:].sum())
            if total > best:
                best, (a, b), columns = total, pair, _best_two(scores)
        kept, held = np.isin(y, (a, b)), np.isin(dataset.y[validation], (a, b))
        told_apart = f"{dataset.target}: {dataset.classes[a]} from {dataset.classes[b]}"
        if len(dataset.classes) == 2:
            told_apart = dataset.target
    else:
        columns = _best_two(_scores(x, y, dataset.task))
    chosen = x[kept][:, columns]
    numbers = y[kept].astype(float)
    centre, scale = chosen.mean(0), chosen.std(0)
    middle, spread = numbers.mean(), numbers.std()
    held_x = (dataset.x[validation][held][:, columns] - centre) / scale
    held_y = (dataset.y[validation][held].astype(float) - middle) / spread
    return _Neuron(
        columns, told_apart, chosen, (chosen - centre) / scale, (numbers - middle) / spread, (held_x, held_y)
    )


def _fit(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Curvatures (ascending) with their directions, and the weights of least squared error, of mean((x w - y)^2)."""
    curvatures, directions = np.linalg.eigh(2 * x.T @ x / len(x))
    return curvatures, directions, np.asarray(np.linalg.lstsq(x, y, rcond=None)[0])


def steps_to_minimum(x: Array, y: Array) -> float:
    """Steps of gradient descent from w = 0 with rate 1 / curvature until 99% of the excess loss is gone.

    ``x`` is (rows, 2), ``y`` (rows,). In the directions of the Hessian the excess of mean squared error shrinks by
    (1 - curvature / largest)^2 a step, so that the steps follow without taking them. Infinite where a direction
    that matters is flat to rounding.
    """
    curvatures, directions, minimum = _fit(x, y)
    excess = curvatures * (directions.T @ minimum) ** 2
    shrink = 1 - curvatures / curvatures[-1]
    if excess.sum() == 0:
        return 0.0

    def left(steps: float) -> float:
        return float((excess * shrink ** (2 * steps)).sum() / excess.sum())

    low, high = 0, 1
    while left(high) > ENOUGH:
        low, high = high, high * 2
        if high > 1e15:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) > ENOUGH else (low, middle)
    return float(high)


def _descent(x: Array, y: Array) -> tuple[Array, Array]:
    """Steps of gradient descent, all the first ones and then ever fewer, and the weights (points, 2) there."""
    curvatures, directions, minimum = _fit(x, y)
    last = steps_to_minimum(x, y)
    last = min(last, 1e15)
    steps = np.unique(np.concatenate([np.arange(20), np.geomspace(1, max(last, 1), PATH)]).round())
    shrink = (1 - curvatures / curvatures[-1])[None, :] ** steps[:, None]
    return steps, np.asarray(minimum - (shrink * (directions.T @ minimum)) @ directions.T)


def _surface(x: Array, y: Array) -> LossSurface:
    """Return the loss around its minimum, over a range that holds the path of gradient descent too."""
    curvatures, _, minimum = _fit(x, y)
    points, path = _descent(x, y)
    steps = steps_to_minimum(x, y)
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
        steps=steps,
    )


def _parts(neuron: _Neuron, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers dealt into at most 20 parts of at least 8 rows in which both columns and the target vary."""
    rows = np.random.default_rng(seed).permutation(len(neuron.y))
    dealt = np.array_split(rows, max(1, min(MOST_PARTS, len(rows) // FEWEST_ROWS_A_PART)))
    return [part for part in dealt if (np.ptp(neuron.raw[part], axis=0) > 0).all() and np.ptp(neuron.y[part]) > 0]


def _ratio(neuron: _Neuron, rows: NDArray[np.int64]) -> Bounds:
    """Steps with raw over steps with inputs normalized on these rows themselves."""
    raw, y = neuron.raw[rows], neuron.y[rows] - neuron.y[rows].mean()
    slow, fast = steps_to_minimum(raw, y), steps_to_minimum((raw - raw.mean(0)) / raw.std(0), y)
    ratio = slow / fast if fast and math.isfinite(fast) else math.nan
    return (0.0, math.inf) if math.isnan(ratio) else (ratio, ratio)


def _tells(neuron: _Neuron, seed: int) -> bool:
    """Whether the neuron beats a constant guess on the validation rows (bootstrap over rows, one-sided 2.5%)."""
    x, y = neuron.validation
    if len(y) == 0:
        return False
    _, _, weights = _fit(neuron.normalized, neuron.y)
    gain = paired_difference(((x @ weights - y) ** 2)[None], (y**2)[None], None, seed)
    return gain.interval[0] > 0


def _measure(study: Study) -> Measured:
    neuron = _choose(study)
    if neuron is None:
        return Measured([Measurement("inputs", FEWER_STEPS, [], "it takes two columns that vary")])
    parts = _parts(neuron, study.settings.seed)
    reason: str | None = None
    if len(parts) < FEWEST_PAIRS:
        reason = f"{len(neuron.y)} training rows are too few for {FEWEST_PAIRS} parts"
    elif not _tells(neuron, study.settings.seed):
        reason = "the neuron does not clearly beat a constant guess on the validation rows"
    pairs = [_ratio(neuron, part) for part in parts]
    details = InputsDetails(
        columns=[study.dataset.features[column] for column in neuron.columns],
        told_apart=neuron.told_apart,
        raw=_surface(neuron.raw, neuron.y),
        normalized=_surface(neuron.normalized, neuron.y),
    )
    return Measured([Measurement("inputs", FEWER_STEPS, pairs, reason)], details)


CLAIM = Claim(
    name="inputs",
    title="Normalized inputs",
    question="Is the loss over two weights rounder when the inputs are normalized, and its minimum nearer in steps?",
    statement="Normalized inputs bring gradient descent to the minimum in fewer steps",
    design=_design,
    measure=_measure,
    details=InputsDetails,
)
