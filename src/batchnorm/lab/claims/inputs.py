"""Claim: normalized inputs make the loss rounder, so that gradient descent reaches its minimum in fewer steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_selection import f_classif, f_regression

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.descent import (
    REMAINING_LOSS,
    Array,
    LossSurface,
    least_squares,
    loss_surface,
    steps_to_minimum,
)
from batchnorm.lab.claims.measurement import MIN_PAIRS, Effect, Measurement
from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.comparison.scores import paired_difference
from batchnorm.lab.comparison.study import Study

__all__ = ["CLAIM", "InputsDetails", "LossSurface"]

MIN_ROWS_PER_PART = 8
MAX_PARTS = 20
FEWER_STEPS = Effect(
    "fewer steps of a neuron", "fewer steps to the minimum", "more steps to the minimum", "ratio", margin=1.1
)


@dataclass(frozen=True)
class InputsDetails(Details):
    """Details of the linear neuron: its two columns, its target, and its loss with raw and with normalized inputs."""

    columns: list[str]
    told_apart: str
    raw: LossSurface
    normalized: LossSurface


@dataclass(frozen=True)
class _Neuron:
    """A linear neuron: two columns of the data, the training rows it learns, and validation rows (x, y)."""

    columns: tuple[int, int]
    told_apart: str
    raw: Array
    normalized: Array
    y: Array
    validation: tuple[Array, Array]


def _design(_: Study) -> str:
    return (
        "A linear neuron w1*x1 + w2*x2 learns the standardized target from the two columns with the largest F "
        "statistics, with a squared error; of several classes it separates the two that these columns separate best. "
        "Gradient descent starts at w = 0, once on raw and once on normalized inputs, with the largest rate that is "
        f"safe everywhere, one over the largest curvature. It arrives when {1 - REMAINING_LOSS:.0%} of the excess loss "
        f"is gone. For the verdict the training rows are dealt into up to {MAX_PARTS} parts, and the steps with raw "
        "inputs are divided by those with normalized inputs, part by part. The claim does not hold where a gain of 10% "
        "is excluded."
    )


def _f_statistics(x: Array, y: NDArray[Any], task: str) -> Array:
    """Return the F statistic of each column; 0 where a column is constant."""
    varies = np.ptp(x, axis=0) > 0
    scores = np.zeros(x.shape[1])
    if varies.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            scores[varies] = (f_classif if task == "classification" else f_regression)(x[:, varies], y)[0]
    return np.nan_to_num(scores, posinf=np.finfo(float).max)


def _best_two(scores: Array) -> tuple[int, int]:
    first, second = sorted(np.argsort(-scores, kind="stable")[:2].tolist())
    return int(first), int(second)


def _best_classes(x: Array, y: NDArray[Any]) -> tuple[list[int], tuple[int, int]]:
    """Return the two classes that two columns separate best, and these columns."""
    best, classes, columns = -math.inf, [0, 1], (0, 1)
    for pair in itertools.combinations(np.unique(y).tolist(), 2):
        rows = np.isin(y, pair)
        scores = _f_statistics(x[rows], y[rows], "classification")
        total = float(np.sort(scores)[-2:].sum())
        if total > best:
            best, classes, columns = total, list(pair), _best_two(scores)
    return classes, columns


def _choose_neuron(study: Study) -> _Neuron | None:
    """Return the neuron of the best two columns; None where fewer than two columns vary."""
    dataset = study.dataset
    train, validation = dataset.parts["train"], dataset.parts["validation"]
    told_apart = dataset.target
    if np.count_nonzero(np.ptp(dataset.x[train], axis=0) > 0) < 2:
        return None
    if dataset.task == "classification":
        classes, columns = _best_classes(dataset.x[train], dataset.y[train])
        train, validation = (rows[np.isin(dataset.y[rows], classes)] for rows in (train, validation))
        if len(dataset.classes) > 2:
            told_apart += f": {dataset.classes[classes[0]]} from {dataset.classes[classes[1]]}"
    else:
        columns = _best_two(_f_statistics(dataset.x[train], dataset.y[train], dataset.task))
    x, y = dataset.x[train][:, columns], dataset.y[train].astype(float)
    center, scale = x.mean(0), x.std(0)
    mean, deviation = y.mean(), y.std()
    validation_x = (dataset.x[validation][:, columns] - center) / scale
    validation_y = (dataset.y[validation].astype(float) - mean) / deviation
    return _Neuron(columns, told_apart, x, (x - center) / scale, (y - mean) / deviation, (validation_x, validation_y))


def _parts(neuron: _Neuron, seed: int) -> list[NDArray[np.int64]]:
    """Deal the row numbers into at most 20 parts of at least 8 rows; keep those in which columns and target vary."""
    rows = np.random.default_rng(seed).permutation(len(neuron.y))
    dealt = np.array_split(rows, max(1, min(MAX_PARTS, len(rows) // MIN_ROWS_PER_PART)))
    return [part for part in dealt if (np.ptp(neuron.raw[part], axis=0) > 0).all() and np.ptp(neuron.y[part]) > 0]


def _ratio(neuron: _Neuron, rows: NDArray[np.int64]) -> Bounds:
    """Return the steps with raw inputs over the steps with inputs that are normalized on these rows."""
    raw, y = neuron.raw[rows], neuron.y[rows] - neuron.y[rows].mean()
    slow, fast = steps_to_minimum(raw, y), steps_to_minimum((raw - raw.mean(0)) / raw.std(0), y)
    ratio = slow / fast if fast and math.isfinite(fast) else math.nan
    return (0.0, math.inf) if math.isnan(ratio) else (ratio, ratio)


def _learns(neuron: _Neuron, seed: int) -> bool:
    """Return whether the neuron beats a constant guess on the validation rows (bootstrap, one-sided 2.5%)."""
    x, y = neuron.validation
    if len(y) == 0:
        return False
    weights = least_squares(neuron.normalized, neuron.y)
    gain = paired_difference(((x @ weights - y) ** 2)[None], (y**2)[None], None, seed)
    return gain.interval[0] > 0


def _measure(study: Study) -> Measured:
    neuron = _choose_neuron(study)
    if neuron is None:
        return Measured([Measurement("inputs", FEWER_STEPS, [], "fewer than two columns vary")])
    parts = _parts(neuron, study.settings.seed)
    reason: str | None = None
    if len(parts) < MIN_PAIRS:
        reason = f"{len(neuron.y)} training rows are too few for {MIN_PAIRS} parts"
    elif not _learns(neuron, study.settings.seed):
        reason = "the neuron does not clearly beat a constant guess on the validation rows"
    details = InputsDetails(
        columns=[study.dataset.features[column] for column in neuron.columns],
        told_apart=neuron.told_apart,
        raw=loss_surface(neuron.raw, neuron.y),
        normalized=loss_surface(neuron.normalized, neuron.y),
    )
    pairs = [_ratio(neuron, part) for part in parts]
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
