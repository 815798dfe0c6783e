"""A comparison whose search is finished. The rest is planned from it, and its claims are measured on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from batchnorm.lab.comparison.measures import best_rate
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.scores import paired_difference, test_errors
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.runs import CONSECUTIVE, Run, Target
from batchnorm.lab.training.settings import ARMS, Arm, Settings

__all__ = ["Study"]


@dataclass(frozen=True)
class Study:
    """A comparison from the end of its search on.

    Attributes
    ----------
    dataset : Dataset
    settings : Settings
    run : RunFile
        The finished runs.
    target : Target
        The target that the search set.
    chosen : dict of arm to float
        The learning rate that the search chose for each arm.
    tried : list of float
        All learning rates of the search, in ascending order.
    """

    dataset: Dataset
    settings: Settings
    run: RunFile
    target: Target
    chosen: dict[Arm, float]
    tried: list[float]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the confirming runs, on which the claims are measured too."""
        first = self.settings.search_seeds
        return list(range(first, first + self.settings.seeds))

    @property
    def result(self) -> Result:
        """The result of the comparison, as far as its runs are finished."""
        assert self.run.result is not None
        return self.run.result

    @property
    def too_few_rows(self) -> str:
        """The reason why no ratio of steps is judged where the result has no headline."""
        return f"on {len(self.dataset.parts['validation'])} validation rows no ratio of steps is claimed"

    @cached_property
    def constant_score(self) -> float:
        """Validation score of the best constant guess: the most frequent class, or the mean, of the training rows."""
        if self.dataset.task == "regression":
            return 0.0
        train, validation = (self.dataset.y[self.dataset.parts[part]] for part in ("train", "validation"))
        return float(np.mean(validation == np.bincount(train).argmax()))

    @cached_property
    def threshold(self) -> float | None:
        """The validation score from which on a run trains: halfway from a constant guess to the best of any arm.

        None where no arm's best is above that of a constant guess.
        """
        best = max(best_rate(self.run.runs("search", arm), "score")[1] for arm in ARMS)
        return (self.constant_score + best) / 2 if best > self.constant_score else None

    @cached_property
    def common_rate(self) -> float:
        """The learning rate of the search at which the worst of the arms does best, by its best median score."""
        searches = {arm: self.result.arms[arm].search for arm in ARMS}
        worst: dict[float, float] = {
            row.learning_rate: min(
                other.best_score for arm in ARMS for other in searches[arm] if other.learning_rate == row.learning_rate
            )
            for row in searches["none"]
        }
        return max(worst, key=lambda rate: worst[rate])

    def last_score(self, run: Run) -> float:
        """Return the mean of a run's last three validation scores; NaN where it diverged."""
        return math.nan if run.diverged_at is not None else float(np.mean(run.validation_score[-CONSECUTIVE:]))

    def trains(self, run: Run) -> bool:
        """Return whether a run ends at the threshold or above."""
        return self.threshold is not None and self.last_score(run) >= self.threshold

    @cached_property
    def learns(self) -> dict[Arm, bool]:
        """Whether each arm's confirming runs beat a constant guess on the test rows (bootstrap, one-sided 2.5%)."""
        y = self.dataset.y
        train, test = (y[self.dataset.parts[part]] for part in ("train", "test"))
        if self.dataset.task == "classification":
            guess, squared_deviation = (test != np.bincount(train).argmax()).astype(float), None
        else:
            guess, squared_deviation = (test - train.mean()) ** 2, (test - test.mean()) ** 2
        learns = {}
        for arm in ARMS:
            runs = [run for run in self.run.runs("confirm", arm) if run.diverged_at is None]
            if not runs:
                learns[arm] = False
                continue
            errors = test_errors(runs, self.dataset)
            guesses = np.broadcast_to(guess, errors.shape)
            gain = paired_difference(errors, guesses, squared_deviation, self.settings.seed)
            learns[arm] = gain.interval[0] > 0
        return learns

    def nothing_learned(self, *arms: Arm) -> str | None:
        """Return the reason why nothing is claimed of some arms, that none beats a constant guess; else None."""
        if any(self.learns[arm] for arm in arms):
            return None
        return "the networks don't clearly beat a constant guess on the test rows, so there is nothing to compare"
