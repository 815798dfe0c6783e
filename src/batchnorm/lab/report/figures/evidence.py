"""What the figures are drawn from: the runs of a run.json in the form that they all need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.comparison.measures import best_rate, middle_half
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.training.runs import Measure, Run, Target, evaluation_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm, Settings

__all__ = ["Curve", "Evidence", "Spread", "spread"]

Curve = Literal["train_loss", "validation_loss", "validation_score"]
LEVELS = 40
LEAST_SHARE = 1e-4


@dataclass(frozen=True)
class Spread:
    """Median and at least the middle half of some runs at each evaluation; infinite where most have diverged."""

    median: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def spread(runs: Sequence[Run], curve: Curve) -> Spread:
    """Median of a curve over runs, and the order statistics at or just outside its quartiles.

    A diverged run counts as the worst there is; it is not left out.
    """
    worst = -math.inf if curve == "validation_score" else math.inf
    values = np.array([getattr(run, curve) for run in runs], dtype=float)
    return Spread(*middle_half(np.where(np.isnan(values), worst, values)))


class Evidence:
    """The runs and the result of a comparison, finished or not.

    Attributes
    ----------
    settings, data, result, target
        As run.json holds them; result and target are None before the search is finished.
    evaluations : list of int
        Steps at which every run was evaluated.
    search, confirm : dict of arm to list of Run
        The finished runs.
    arms : list of str
        Those with runs to draw.
    rates : dict of arm to float
        Learning rate chosen; before the search is finished, the one with the best score so far.
    confirmed : bool
        Whether every arm has runs that confirm its learning rate; else those of the search are drawn.
    seconds : dict of arm to float, or None
        Seconds of a gradient step, once measured.
    """

    def __init__(self, run: RunFile) -> None:
        content = run.content
        self.settings = Settings.from_json(content["settings"])
        self.data: dict[str, Any] = content["data"]
        self.result: dict[str, Any] | None = content["result"]
        self.run_result = run.result
        self.target = Target(**self.result["target"]) if self.result else None
        self.evaluations = evaluation_steps(self.settings.steps)
        self.search: dict[Arm, list[Run]] = {arm: run.runs("search", arm) for arm in ARMS}
        self.confirm: dict[Arm, list[Run]] = {arm: run.runs("confirm", arm) for arm in ARMS}
        self.arms = [arm for arm in ARMS if self.search[arm]]
        self.rates: dict[Arm, float] = {
            arm: self.result["arms"][arm]["learning_rate"] if self.result else best_rate(self.search[arm], "score")[0]
            for arm in self.arms
        }
        self.confirmed = all(self.confirm.values())
        timed = self.result and self.result["arms"]["none"]["seconds_per_step"] is not None
        self.seconds: dict[Arm, float] | None = (
            {arm: self.result["arms"][arm]["seconds_per_step"] for arm in ARMS} if self.result and timed else None
        )

    @property
    def score_name(self) -> str:
        """What the score is called."""
        return "R2" if self.data["task"] == "regression" else "accuracy"

    @property
    def loss_name(self) -> str:
        """What the loss is called, with its unit."""
        return "squared error, in variances" if self.data["task"] == "regression" else "cross-entropy, in nats"

    @property
    def drawn(self) -> str:
        """What the curves over training are drawn from."""
        if self.confirmed:
            count = max(len(runs) for runs in self.confirm.values())
            return f"the {count} seeds that confirm each arm's learning rate" if count > 1 else "one seed"
        return "the search seeds at each arm's best learning rate so far"

    @cached_property
    def trained(self) -> dict[Arm, list[Run]]:
        """The runs of each arm that its curves over training are drawn from."""
        if self.confirmed:
            return self.confirm
        return {arm: [r for r in self.search[arm] if r.learning_rate == self.rates[arm]] for arm in self.arms}

    @cached_property
    def arrivals(self) -> dict[Arm, list[int | None]]:
        """Steps that each run of an arm's confirmation took to the target, None above those trained."""
        assert self.target is not None
        return {
            arm: [steps_to(run, self.target, self.evaluations) for run in runs] for arm, runs in self.confirm.items()
        }

    def aim(self, measure: Measure) -> float | None:
        """The value of the target where it is one of this measure and can be reached."""
        if self.target is None or self.target.measure != measure or not math.isfinite(self.target.value):
            return None
        return self.target.value

    def levels(self, measure: Measure) -> list[float]:
        """Scores or losses from where the arms begin to the best of their medians, the target among them.

        They lie close where little is left to gain: equal factors apart in the loss, or in what a score lacks of 1.
        """
        curve: Curve = "validation_score" if measure == "score" else "validation_loss"
        curves = [spread(runs, curve).median for runs in self.trained.values()]
        lacks = [1 - values if measure == "score" else values for values in curves]
        finite = np.concatenate([lack[np.isfinite(lack)] for lack in lacks])
        if not len(finite) or finite.max() <= 0:
            return []
        first = min(max(float(lack[0]) for lack in lacks), float(finite.max()), 1.0 if measure == "score" else math.inf)
        last = max(float(finite.min()), first * LEAST_SHARE)
        values = np.geomspace(first, last, LEVELS)
        if measure == "score":
            values = 1 - values
            if self.data["task"] == "classification":
                rows = self.data["rows"]["validation"]
                values = np.floor(values * rows + 1e-9) / rows
        aim = self.aim(measure)
        return sorted({*values.tolist(), *([] if aim is None else [aim])}, reverse=measure == "loss")

    def steps_to_levels(self, measure: Measure) -> dict[Arm, list[list[int | None]]]:
        """Steps that each run took to each of the levels, by the rule that the target is held to."""
        targets = [Target(measure, level, "") for level in self.levels(measure)]
        return {
            arm: [[steps_to(run, target, self.evaluations) for run in runs] for target in targets]
            for arm, runs in self.trained.items()
        }
