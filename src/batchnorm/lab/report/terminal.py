"""Progress of a comparison in a terminal: a description of the data, and bars while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from batchnorm.lab.console import console
from batchnorm.lab.data.dataset import DataDescription
from batchnorm.lab.training.settings import ARMS

__all__ = ["Bars", "Silence", "describe_data"]


class Silence:
    """Progress that is not shown."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def plan(self, arm: str, steps: int) -> None:
        """Do nothing."""

    def advance(self, arm: str, steps: int) -> None:
        """Do nothing."""

    def say(self, sentence: str) -> None:
        """Do nothing."""


class Bars:
    """A bar per arm with the time left, on stderr."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:>7}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self.tasks: dict[str, TaskID] = {arm: self.progress.add_task(arm, total=0) for arm in ARMS}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def plan(self, arm: str, steps: int) -> None:
        """Make the arm's bar longer by some steps."""
        task = self.progress.tasks[self.tasks[arm]]
        self.progress.update(self.tasks[arm], total=(task.total or 0) + steps)

    def advance(self, arm: str, steps: int) -> None:
        """Move the arm's bar on by some steps."""
        self.progress.advance(self.tasks[arm], steps)

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self.console.print(sentence)


def describe_data(out: Console, data: DataDescription, notes: Sequence[str]) -> None:
    """Print what the data are, how they are split, and what was done to them."""
    rows = data.rows
    out.print(
        f"{data.name}: {len(data.features)} features to predict {data.target}; rows to train on "
        f"{rows['train']}, to choose and count on {rows['validation']}, to test on {rows['test']}."
    )
    for note in [*data.sentences, *notes]:
        out.print(f"- {note}", markup=False)
