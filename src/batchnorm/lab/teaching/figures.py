"""The figures of a worked example: every number of batch normalization of one neuron on one mini-batch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ExampleRow",
    "Figures",
    "GradientStep",
    "KeptNumbers",
    "LayerFigures",
    "LossStep",
    "Neuron",
    "OtherBatch",
    "ParameterStep",
    "RunningFigures",
]


@dataclass(frozen=True)
class ExampleRow:
    """One row of the mini-batch.

    Attributes
    ----------
    row : int
        Number of the row, from 1.
    features : list of float
    target : float or None
    assumed : list of str
        Names of the cells that are assumed rather than known.
    """

    row: int
    features: list[float]
    target: float | None
    assumed: list[str]


@dataclass(frozen=True)
class Neuron:
    """The neuron ``z = w1 * x1 + w2 * x2 + b``.

    Attributes
    ----------
    weights : list of float
    bias : float
    chosen_by_us : bool
        Whether weights and bias were left to `worked_example`.
    feature_sd : list of float
        Standard deviation of each feature.
    activation : str
    z : list of float
        One value per row.
    """

    weights: list[float]
    bias: float
    chosen_by_us: bool
    feature_sd: list[float]
    activation: str
    z: list[float]


@dataclass(frozen=True)
class RunningFigures:
    """Running statistics after a number of batches, and the z_hat of each row at inference."""

    batches: int
    mean: float
    var: float
    sd: float
    z_hat: list[float]


@dataclass(frozen=True)
class OtherBatch:
    """A second mini-batch that contains row 1: its rows, its statistics and its z_hat."""

    rows: list[int]
    mean: float
    var: float
    sd: float
    z_hat: list[float]


@dataclass(frozen=True)
class ParameterStep:
    """A parameter before and after one gradient step."""

    value: float
    gradient: float
    new: float


@dataclass(frozen=True)
class LossStep:
    """The loss before and after one gradient step."""

    value: float
    new: float


@dataclass(frozen=True)
class GradientStep:
    """One step of gradient descent on gamma and beta."""

    gamma: ParameterStep
    beta: ParameterStep
    loss: LossStep


@dataclass(frozen=True)
class LayerFigures:
    """All figures of the layer in one placement.

    Attributes
    ----------
    input : list of float
        The normalized values: z with the placement before the nonlinearity, its output after it.
    mean, var, sd : float
        Statistics of the mini-batch; the variance is biased.
    z_hat : list of float
    unbiased_var : float
    gamma, beta : float
    y, output : list of float
    step : GradientStep or None
        None without a target.
    running : list of RunningFigures
    """

    input: list[float]
    mean: float
    var: float
    sd: float
    z_hat: list[float]
    unbiased_var: float
    gamma: float
    beta: float
    y: list[float]
    output: list[float]
    step: GradientStep | None
    running: list[RunningFigures]


@dataclass(frozen=True)
class KeptNumbers:
    """The numbers that a layer keeps per neuron, by torch's names."""

    learned: list[str]
    not_learned: list[str]
    numbers_per_neuron: int


@dataclass(frozen=True, repr=False)
class Figures:
    """The figures of a worked example; docs/explain.md describes each field.

    Attributes
    ----------
    features : list of str
        Names of the two features.
    target : str or None
        Name of the target.
    rows : list of ExampleRow
    remarks : list of str
        Sentences that say where rows, features and target come from.
    neuron : Neuron
    eps, momentum, learning_rate : float
    bound : float
        Largest possible absolute z_hat of the mini-batch, ``sqrt(m - 1)``.
    before, after : LayerFigures
        The layer before and after the nonlinearity.
    other_batch : OtherBatch
    kept : KeptNumbers
    """

    features: list[str]
    target: str | None
    rows: list[ExampleRow]
    remarks: list[str]
    neuron: Neuron
    eps: float
    momentum: float | None
    learning_rate: float
    bound: float
    before: LayerFigures
    after: LayerFigures
    other_batch: OtherBatch
    kept: KeptNumbers
