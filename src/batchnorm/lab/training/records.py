"""Records that the recorders keep of a run; the claims are measured from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from batchnorm.errors import RunError

__all__ = ["GapRecord", "LossChangeRecord", "NoiseRecord", "RecordName", "Records", "ShiftRecord", "recorded"]

RecordName = Literal["loss_change", "gap", "shift"]
R = TypeVar("R")


@dataclass(frozen=True)
class LossChangeRecord:
    """Change of the mini-batch loss from step to step.

    Attributes
    ----------
    mean : list of float
        Mean absolute change over the steps since the previous evaluation, one value per evaluation; NaN for the first
        evaluation, at step 1, which has no previous step.
    """

    mean: list[float]


@dataclass(frozen=True)
class NoiseRecord:
    """Noise of a mini-batch's statistics, in units of the standard deviation over all rows.

    Attributes
    ----------
    batch_sizes : list of int
    mean, sd : list of float
        Root mean square error of the mean and of the standard deviation, one value per batch size.
    """

    batch_sizes: list[int]
    mean: list[float]
    sd: list[float]


@dataclass(frozen=True)
class GapRecord:
    """Loss and scores on training and test rows, one value per evaluation.

    Attributes
    ----------
    train_loss, train_score, test_score : list of float
    noise : NoiseRecord or None
        Recorded for the first run of a stack alone, as an example of its arm.
    """

    train_loss: list[float]
    train_score: list[float]
    test_score: list[float]
    noise: NoiseRecord | None = None


@dataclass(frozen=True)
class ShiftRecord:
    """Drift of the layers' inputs, and smoothness of the loss, at each probe (see `probe_steps`).

    Attributes
    ----------
    drift : list of list of float, shape (probes, layers)
        Divergence between the distributions of a layer's inputs before and after one step, the median over inputs.
    gradient_change : list of list of float, shape (probes, step sizes)
        Relative change of the gradient after a step along itself, for each of `STEP_SIZES`.
    distributions : list, shape (probes, layers, quantiles), or None
        Quantiles of the inputs of each hidden nonlinearity; recorded for the first run of a stack alone.
    outputs : list, shape (probes, rows, 2), or None
        Outputs of two units of a middle layer; recorded for the first run of a stack alone.
    """

    drift: list[list[float]]
    gradient_change: list[list[float]]
    distributions: list[list[list[float]]] | None = None
    outputs: list[list[list[float]]] | None = None


@dataclass
class Records:
    """Records of one run; None where its stack did not ask for one."""

    loss_change: LossChangeRecord | None = None
    gap: GapRecord | None = None
    shift: ShiftRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the records as run.json holds them, without missing ones."""
        return {
            name: {key: value for key, value in record.items() if value is not None}
            for name, record in asdict(self).items()
            if record is not None
        }


def recorded(record: R | None) -> R:
    """Return a record that the run must have.

    Raises
    ------
    RunError
        It is None: the run was trained without its recorder.

    Examples
    --------
    >>> recorded(Records(loss_change=LossChangeRecord([0.5])).loss_change).mean
    [0.5]
    """
    if record is None:
        raise RunError("a claim needs the records of its runs; a run of this folder has none")
    return record
