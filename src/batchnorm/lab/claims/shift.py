"""Claim: batch normalization reduces internal covariate shift, and smooths the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.measurement import NORMALIZED_ARMS, Effect, Measurement
from batchnorm.lab.comparison.measures import Bounds, QuartileBand, quartile_band
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.recorders import STEP_SIZES, probe_steps
from batchnorm.lab.training.records import recorded
from batchnorm.lab.training.runs import Run, Target, evaluation_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm
from batchnorm.lab.training.stacks import Stack, cut

__all__ = ["CLAIM", "Correlations", "Distributions", "Outputs", "RankCorrelation", "ShiftDetails"]

PHASE = "shift"
MARGIN = 1.1
MIN_RUNS_FOR_CORRELATION = 5
LESS_DRIFT = Effect("less drift", "less drift", "more drift", "ratio", MARGIN)
SMOOTHER_LOSS = Effect("a smoother loss", "less change of the gradient", "more change of the gradient", "ratio", MARGIN)


@dataclass(frozen=True)
class RankCorrelation:
    """Rank correlation of an amount with the steps needed, over a number of runs; None where it is not defined."""

    rho: float | None
    runs: int


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of the drift and of the change of the gradient with the steps needed."""

    drift: RankCorrelation
    gradient: RankCorrelation


@dataclass(frozen=True)
class Distributions:
    """Distributions of the inputs of each hidden nonlinearity, in the first run of each arm.

    Attributes
    ----------
    layers : list of str
    quantiles : dict of arm to list, shape (layers, probes, quantiles)
        Quantiles equally spaced from 0 to 1.
    """

    layers: list[str]
    quantiles: dict[Arm, list[list[list[float]]]]


@dataclass(frozen=True)
class Outputs:
    """Outputs of two units of a middle layer, in the first run of each arm.

    Attributes
    ----------
    layer : str
    rows : dict of arm to list, shape (probes, rows, 2)
        Fewer than 2 columns where the layer has fewer units.
    """

    layer: str
    rows: dict[Arm, list[list[list[float]]]]


@dataclass(frozen=True)
class ShiftDetails(Details):
    """Details of the drift of the layers' inputs, and of the smoothness of the loss.

    Attributes
    ----------
    probes : list of int
        Steps at which the networks are measured.
    learning_rate : float
        Learning rate of every run.
    layers : list of str
        The layers whose inputs drift.
    drift : dict of arm to list of QuartileBand
        Drift per layer and probe.
    gradient : dict of arm to QuartileBand
        Change of the gradient per probe.
    arrivals : dict of arm to list of int or None
        Steps of each run to the threshold from which on a run trains.
    correlation : Correlations
    distributions : Distributions
    outputs : Outputs
    """

    probes: list[int]
    learning_rate: float
    layers: list[str]
    drift: dict[Arm, list[QuartileBand]]
    gradient: dict[Arm, QuartileBand]
    arrivals: dict[Arm, list[int | None]]
    correlation: Correlations
    distributions: Distributions
    outputs: Outputs


def _stacks(study: Study) -> list[Stack]:
    settings = replace(study.settings, steps=study.settings.variant_steps)
    pairs = [(study.common_rate, seed) for seed in study.seeds]
    return [stack for arm in ARMS for stack in cut(PHASE, PHASE, arm, pairs, settings, records=("shift",))]


def _design(study: Study) -> str:
    settings = study.settings
    probes = len(probe_steps(settings.variant_steps))
    return (
        f"Every arm is trained with {settings.seeds} seeds for {settings.variant_steps} steps at one learning rate, "
        f"{study.common_rate:g}: the rate of the search at which the worst arm does best. At {probes} of the steps the "
        "networks are measured before and after the step, always on the same training rows, and with the statistics of "
        "these rows, as in training. Drift is the symmetrized Kullback-Leibler divergence between the distributions of "
        "each input of a layer before and after the step, both taken as normal: the median over the inputs, and for "
        "the verdict the median over layers and steps. The less the gradient changes along itself, the smoother the "
        "loss: measured is the length of its change after one learning rate over its own length (after Santurkar et "
        "al. 2018). Both are compared as ratios, without batch norm over with it, seed by seed. They do not hold where "
        "a gain of 10% is excluded. The rank correlation of each with the steps to the score halfway from a constant "
        "guess to the best score of any arm is taken over the runs of all arms. With batch norm after the "
        "nonlinearity, the mean and the variance of a layer's inputs are beta and gamma squared, whatever the weights."
    )


def _arrival(study: Study, run: Run) -> int | None:
    """Return the steps of a run to the threshold from which on a run trains."""
    if study.threshold is None:
        return None
    return steps_to(run, Target("score", study.threshold, ""), evaluation_steps(study.settings.variant_steps))


def _drifts(run: Run) -> NDArray[np.float64]:
    """Return the drift of a run (probes, layers); infinite where the run had diverged."""
    return _finite(recorded(run.record.shift).drift)


def _changes(run: Run) -> NDArray[np.float64]:
    """Return the relative change of the gradient of a run after one learning rate (probes,)."""
    return _finite(recorded(run.record.shift).gradient_change)[:, STEP_SIZES.index(1.0)]


def _finite(values: list[list[float]]) -> NDArray[np.float64]:
    """Return an array with infinity in place of NaN."""
    numbers = np.array(values, dtype=float)
    return np.where(np.isnan(numbers), math.inf, numbers)


def _ratio(none: float, arm: float) -> Bounds:
    """Return the ratio without over with batch norm; unknown where both diverged or neither changes."""
    if none == arm and (none == 0 or none == math.inf):
        return 0.0, math.inf
    ratio = math.inf if arm == 0 else none / arm
    return ratio, ratio


def _correlation(amounts: list[float], arrivals: list[int | None]) -> RankCorrelation:
    """Return the rank correlation of an amount with the steps needed, where runs that never arrive rank last."""
    steps = [math.inf if step is None else float(step) for step in arrivals]
    varied = len(set(steps)) > 1 and len(set(amounts)) > 1
    known = len(steps) >= MIN_RUNS_FOR_CORRELATION and varied
    ranks = [np.unique(values, return_inverse=True)[1] for values in (amounts, steps)]
    return RankCorrelation(float(spearmanr(*ranks).statistic) if known else None, len(steps))


def _measure(study: Study) -> Measured:
    runs: dict[Arm, list[Run]] = {arm: study.run.runs(PHASE, arm) for arm in ARMS}
    drifts = {arm: np.array([_drifts(run) for run in of_arm]) for arm, of_arm in runs.items()}
    changes = {arm: np.array([_changes(run) for run in of_arm]) for arm, of_arm in runs.items()}
    drift = {arm: [float(np.median(values)) for values in of_arm] for arm, of_arm in drifts.items()}
    change = {arm: [float(np.median(values)) for values in of_arm] for arm, of_arm in changes.items()}
    arrivals = {arm: [_arrival(study, run) for run in of_arm] for arm, of_arm in runs.items()}
    measurements = []
    for amounts, effect in ((drift, LESS_DRIFT), (change, SMOOTHER_LOSS)):
        for arm in NORMALIZED_ARMS:
            pairs = [_ratio(none, some) for none, some in zip(amounts["none"], amounts[arm], strict=True)]
            measurements.append(Measurement(arm, effect, pairs, study.nothing_learned("none", arm)))
    hidden = len(study.settings.hidden)
    together = [step for arm in ARMS for step in arrivals[arm]]
    details = ShiftDetails(
        probes=probe_steps(study.settings.variant_steps),
        learning_rate=study.common_rate,
        layers=[*(f"hidden layer {number}" for number in range(2, hidden + 1)), "output layer"],
        drift={arm: [quartile_band(values[:, :, i]) for i in range(hidden)] for arm, values in drifts.items()},
        gradient={arm: quartile_band(values) for arm, values in changes.items()},
        arrivals=arrivals,
        correlation=Correlations(
            drift=_correlation([value for arm in ARMS for value in drift[arm]], together),
            gradient=_correlation([value for arm in ARMS for value in change[arm]], together),
        ),
        distributions=_distributions(runs, hidden),
        outputs=Outputs(
            layer=f"hidden layer {(hidden - 1) // 2 + 1}",
            rows={arm: recorded(recorded(of_arm[0].record.shift).outputs) for arm, of_arm in runs.items()},
        ),
    )
    return Measured(measurements, details)


def _distributions(runs: dict[Arm, list[Run]], hidden: int) -> Distributions:
    """Return the distributions that the first run of each arm recorded, by layer and then by probe."""
    probes = {arm: recorded(recorded(of_arm[0].record.shift).distributions) for arm, of_arm in runs.items()}
    return Distributions(
        layers=[f"hidden layer {number}" for number in range(1, hidden + 1)],
        quantiles={arm: [[probe[i] for probe in of_arm] for i in range(hidden)] for arm, of_arm in probes.items()},
    )


CLAIM = Claim(
    name="shift",
    title="Internal covariate shift, and the smoothness of the loss",
    question="Do the inputs of the layers move less while the layers before them learn, and is the loss smoother?",
    statement="Batch norm reduces internal covariate shift and smooths the loss",
    design=_design,
    measure=_measure,
    stacks=_stacks,
    details=ShiftDetails,
)
