"""Progress of a comparison in a terminal: a description of the data, and a bar while it trains."""

from __future__ import annotations

from typing import Self

from rich.console import Console

from batchnorm.lab.console import ProgressLine, Share
from batchnorm.lab.data.dataset import DataDescription

__all__ = ["Bars", "Silence", "describe_data"]

LAST_SHARE = 0.99


class Silence:
    """Progress that is not shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, phase: str) -> None:
        """Do nothing."""

    def plan(self, arm: str, steps: int) -> None:
        """Do nothing."""

    def advance(self, arm: str, steps: int) -> None:
        """Do nothing."""

    def say(self, sentence: str) -> None:
        """Do nothing."""


class Bars(ProgressLine):
    """The share of the training that is done, with the time left, on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.share = Share()

    def begin(self, phase: str) -> None:
        """Show the name of the phase."""
        self.show(phase)

    def plan(self, arm: str, steps: int) -> None:
        """Expect some more steps, or fewer."""
        self.share.plan(steps)

    def advance(self, arm: str, steps: int) -> None:
        """Count some steps as taken; the last hundredth is left for the work after the training."""
        self.share.advance(steps)
        self.show(share=min(self.share.value, LAST_SHARE))

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.console.print(sentence)


def describe_data(out: Console, data: DataDescription) -> None:
    """Print what the data are, how they are split, and what was done to them."""
    rows = data.rows
    out.print(
        f"{data.name}: {len(data.features)} features to predict {data.target}; rows to train on "
        f"{rows['train']}, to choose and count on {rows['validation']}, to test on {rows['test']}."
    )
    for note in data.sentences:
        out.print(f"- {note}", markup=False)
