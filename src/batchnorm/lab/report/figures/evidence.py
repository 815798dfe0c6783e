"""The evidence for the figures: the runs of a run.json in the form that all figures need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np

from batchnorm.lab.comparison.measures import QuartileBand, best_rate, quartile_band
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.training.runs import Measure, Run, Target, evaluation_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["Curve", "Evidence", "quartiles"]

Curve = Literal["train_loss", "validation_loss", "validation_score"]
LEVELS = 40
LEAST_SHARE = 1e-4


def quartiles(runs: Sequence[Run], curve: Curve) -> QuartileBand:
    """Return the median of a curve over runs, and the order statistics at or just outside its quartiles.

    A diverged run counts as the worst; it is not left out.
    """
    worst = -math.inf if curve == "validation_score" else math.inf
    values = np.array([getattr(run, curve) for run in runs], dtype=float)
    return quartile_band(np.where(np.isnan(values), worst, values))


class Evidence:
    """The runs and the result of a comparison, finished or not.

    Attributes
    ----------
    settings : Settings
    data : DataDescription
    result : Result or None
        None before the search is finished.
    target : Target or None
        The target of the result.
    evaluations : list of int
        Steps at which every run was evaluated.
    search, confirm : dict of arm to list of Run
        The finished runs.
    arms : list of str
        The arms with runs to draw.
    rates : dict of arm to float
        The chosen learning rate; before the search is finished, the one with the best score so far.
    confirmed : bool
        Whether every arm has runs that confirm its learning rate; otherwise those of the search are drawn.
    seconds : dict of arm to float, or None
        Seconds per gradient step, once measured.
    """

    def __init__(self, run: RunFile) -> None:
        self.settings, self.data, self.result = run.settings, run.data, run.result
        self.target = self.result.target if self.result else None
        self.evaluations = evaluation_steps(self.settings.steps)
        self.search: dict[Arm, list[Run]] = {arm: run.runs("search", arm) for arm in ARMS}
        self.confirm: dict[Arm, list[Run]] = {arm: run.runs("confirm", arm) for arm in ARMS}
        self.arms = [arm for arm in ARMS if self.search[arm]]
        self.rates: dict[Arm, float] = {
            arm: self.result.arms[arm].learning_rate if self.result else best_rate(self.search[arm], "score")[0]
            for arm in self.arms
        }
        self.confirmed = all(self.confirm.values())
        timed = {arm: self.result.arms[arm].seconds_per_step for arm in ARMS} if self.result else {}
        known = {arm: seconds for arm, seconds in timed.items() if seconds is not None}
        self.seconds: dict[Arm, float] | None = known or None

    @property
    def score_name(self) -> str:
        """The name of the score."""
        return "R2" if self.data.task == "regression" else "accuracy"

    @property
    def loss_name(self) -> str:
        """The name of the loss, with its unit."""
        return "squared error, in variances" if self.data.task == "regression" else "cross-entropy, in nats"

    @property
    def drawn(self) -> str:
        """The runs that the curves over training are drawn from, in words."""
        if self.confirmed:
            count = max(len(runs) for runs in self.confirm.values())
            return f"the {count} seeds that confirm each arm's learning rate" if count > 1 else "one seed"
        return "the search seeds at each arm's best learning rate so far"

    @cached_property
    def trained(self) -> dict[Arm, list[Run]]:
        """The runs that the curves over training are drawn from, by arm."""
        if self.confirmed:
            return self.confirm
        return {arm: [r for r in self.search[arm] if r.learning_rate == self.rates[arm]] for arm in self.arms}

    @cached_property
    def arrivals(self) -> dict[Arm, list[int | None]]:
        """The steps to the target of each confirming run; None above the steps trained."""
        assert self.target is not None
        return {
            arm: [steps_to(run, self.target, self.evaluations) for run in runs] for arm, runs in self.confirm.items()
        }

    def aim(self, measure: Measure) -> float | None:
        """Return the value of the target if it is of this measure and finite."""
        if self.target is None or self.target.measure != measure or not math.isfinite(self.target.value):
            return None
        return self.target.value

    def levels(self, measure: Measure) -> list[float]:
        """Return scores or losses from the start of training to the best median, the target among them.

        They are equal factors apart in the loss, or in 1 less the score, and so close together near the best.
        """
        curve: Curve = "validation_score" if measure == "score" else "validation_loss"
        curves = [np.array(quartiles(runs, curve).median) for runs in self.trained.values()]
        lacks = [1 - values if measure == "score" else values for values in curves]
        finite = np.concatenate([lack[np.isfinite(lack)] for lack in lacks])
        if not len(finite) or finite.max() <= 0:
            return []
        first = min(max(float(lack[0]) for lack in lacks), float(finite.max()), 1.0 if measure == "score" else math.inf)
        last = max(float(finite.min()), first * LEAST_SHARE)
        values = np.geomspace(first, last, LEVELS)
        if measure == "score":
            values = 1 - values
            if self.data.task == "classification":
                rows = self.data.rows["validation"]
                values = np.floor(values * rows + 1e-9) / rows
        aim = self.aim(measure)
        return sorted({*values.tolist(), *([] if aim is None else [aim])}, reverse=measure == "loss")

    def steps_to_levels(self, measure: Measure) -> dict[Arm, list[list[int | None]]]:
        """Return the steps of each run to each of the levels, by the rule of the target."""
        targets = [Target(measure, level, "") for level in self.levels(measure)]
        return {
            arm: [[steps_to(run, target, self.evaluations) for run in runs] for target in targets]
            for arm, runs in self.trained.items()
        }
