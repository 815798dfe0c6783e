"""The mini-batch of a worked example, and the one of the notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NOTES", "MiniBatch"]


@dataclass(frozen=True)
class MiniBatch:
    """A few rows of two features x1, x2, and the values to predict from them.

    Attributes
    ----------
    names : pair of str
        Names of the features.
    features : sequence of pairs of float
        x1 and x2 of each row.
    target_name : str
        Name of the target.
    target : sequence of float or None
        One number per row; None leaves out the loss and the gradient step.
    assumed : frozenset of (int, str)
        Cells that are assumed rather than known: the row, counted from 1, and the name of the feature or target.
    remarks : sequence of str
        Sentences that say where rows, features and target come from; they are shown below the rows.
    """

    names: tuple[str, str]
    features: Sequence[Sequence[float]]
    target_name: str = "target"
    target: Sequence[float] | None = None
    assumed: frozenset[tuple[int, str]] = frozenset()
    remarks: Sequence[str] = ()


NOTES = MiniBatch(
    names=("cgpa", "iq"),
    features=((8.9, 100.0), (6.2, 89.0), (9.1, 91.0), (7.7, 76.0)),
    target_name="placed",
    target=(1.0, 0.0, 0.0, 1.0),
    assumed=frozenset({(3, "iq"), (4, "placed")}),
)
