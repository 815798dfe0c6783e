"""The result of a comparison: all the numbers that the terminal and the report show.

`evaluate` computes it from the runs, run.json holds it (docs/compare.md names its keys), and reading run.json gives
the same objects back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batchnorm.lab.comparison.measures import Bounds, PairSummary, RateSummary
from batchnorm.lab.comparison.scores import Difference
from batchnorm.lab.training.runs import Target
from batchnorm.lab.training.settings import Arm

__all__ = ["ArmResult", "MedianRatio", "Ratio", "Result", "Stacking", "Variant"]


@dataclass(frozen=True)
class ArmResult:
    """The result of one arm.

    Attributes
    ----------
    learning_rate : float
        The learning rate that the search chose.
    search : list of RateSummary
        One row per learning rate searched.
    rates_that_reach : int
        Number of learning rates at which every search seed reaches the target.
    steps : list of int or None
        Steps to the target of each confirming run; None where the run does not reach it.
    median_steps : float or None
        None where at most half of the confirming runs reach the target.
    diverged : int
        Number of confirming runs that diverged.
    seconds_per_step : float or None
        None until it is measured, after all training.
    test_scores : list of float
        Test score of each confirming run; NaN where it diverged.
    test_score : float
        Mean of the test scores that are known.
    """

    learning_rate: float
    search: list[RateSummary]
    rates_that_reach: int
    steps: list[int | None]
    median_steps: float | None
    diverged: int
    seconds_per_step: float | None
    test_scores: list[float]
    test_score: float


@dataclass(frozen=True)
class MedianRatio:
    """Median ratio and the interval of the true median, each as (lower, upper) bounds."""

    median: Bounds
    interval: Bounds


@dataclass(frozen=True)
class Ratio(PairSummary):
    """Ratio of the steps to the target, without batch norm over with it, seed by seed.

    Attributes
    ----------
    seconds : MedianRatio or None
        The same ratio of seconds, once the time per step is measured.
    test_difference : Difference or None
        Test score with batch norm less that without; None where every pair has a diverged run.
    """

    seconds: MedianRatio | None = None
    test_difference: Difference | None = None


@dataclass(frozen=True)
class Variant:
    """Median steps of each arm in one variant of the set-up; None is above the steps trained."""

    name: str
    steps: dict[Arm, float | None]


@dataclass(frozen=True)
class Stacking:
    """The cost of training runs side by side in stacks.

    Attributes
    ----------
    runs : int
        Number of networks trained.
    together, alone : float
        Seconds of one core that the stacks took, and that the same steps would take one run after another.
    factor : float
        ``alone / together``.
    """

    runs: int
    together: float
    alone: float
    factor: float


@dataclass(frozen=True)
class Result:
    """The result of a comparison, as far as its runs are finished.

    Attributes
    ----------
    score_name : str
        "accuracy" or "R2".
    target : Target
        What a run must reach, and the rule that set it.
    headline : bool
        Whether there are enough validation rows to claim a ratio of steps.
    grid : list of float
        Learning rates searched.
    evaluation_steps : list of int
        Steps at which every run was evaluated.
    arms : dict of arm to ArmResult
    ratios : dict of arm to Ratio
        For "before" and "after"; empty until the confirming runs are finished.
    sensitivity : list of Variant
        Empty until the variants of the set-up are trained.
    stacking : Stacking or None
        None until the time per step is measured.
    verdict, caveat : str or None
        The sentences printed; None until the confirming runs are finished.
    notes : list of str
        Sentences about the data: how their cells were read, and which columns are left out.
    """

    score_name: str
    target: Target
    headline: bool
    grid: list[float]
    evaluation_steps: list[int]
    arms: dict[Arm, ArmResult]
    ratios: dict[Arm, Ratio]
    sensitivity: list[Variant]
    stacking: Stacking | None
    verdict: str | None = None
    caveat: str | None = None
    notes: list[str] = field(default_factory=list)
