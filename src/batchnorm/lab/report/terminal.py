"""Output of a comparison in a terminal of 80 columns: bars while it trains, then the verdict and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.lab.claims import read_judgment
from batchnorm.lab.claims.claim import JudgedClaim
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.verdict import difference_text, number, ratio_text, steps_text
from batchnorm.lab.console import console
from batchnorm.lab.data.dataset import DataDescription
from batchnorm.lab.training.settings import ARMS

__all__ = ["Bars", "Silence", "describe_data", "show_result"]


class Silence:
    """Progress that is not shown."""

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

    def __enter__(self) -> Bars:
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
    for note in [*data.notes, *notes]:
        out.print(f"- {note}")
    for left in data.left_out:
        out.print(f"- column {left.column} is left out: {left.reason}")


def _table(result: Result, steps: int) -> Table:
    """Return the table of the arms."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("batch\nnorm")
    for heading in (
        "learning\nrate",
        "steps",
        "times fewer\nsteps",
        "rates that\nreach",
        f"test\n{result.score_name}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, values in result.arms.items():
        ratio = result.ratios.get(arm)
        table.add_row(
            arm,
            f"{values.learning_rate:g}",
            steps_text(values.median_steps, steps),
            "-" if not result.headline else "1" if ratio is None else ratio_text(ratio),
            f"{values.rates_that_reach} of {len(values.search)}",
            "diverged" if math.isnan(values.test_score) else f"{values.test_score:.3f}",
        )
    return table


def _differences(result: Result) -> str:
    """Return the test scores with batch norm less that without, with their intervals."""
    parts = [
        f"{arm} {difference_text(ratio.test_difference)}"
        for arm, ratio in result.ratios.items()
        if ratio.test_difference is not None
    ]
    return f"Test {result.score_name} against none: {', '.join(parts)}." if parts else ""


def _seconds(result: Result) -> str:
    """Return the time per step of each arm, and the ratios of seconds that follow from it."""
    steps = ", ".join(
        f"{arm} {1000 * values.seconds_per_step:.2f}"
        for arm, values in result.arms.items()
        if values.seconds_per_step is not None
    )
    times = ", ".join(f"{arm} {ratio_text(ratio.seconds)}" for arm, ratio in result.ratios.items() if ratio.seconds)
    return f"Milliseconds a step: {steps}." + (f" Times fewer seconds: {times}." if result.headline else "")


def _claims(claims: Sequence[JudgedClaim]) -> Table:
    """Return the table of the claims: a row per effect, with its verdict before and after the nonlinearity."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("claim")
    for heading in ("before the\nnonlinearity", "after it"):
        table.add_column(heading, no_wrap=True)
    for claim in claims:
        verdicts: dict[str, dict[str, str]] = {}
        for finding in claim.findings:
            verdicts.setdefault(finding.label, {})[finding.subject] = finding.verdict
        for label, by_subject in verdicts.items():
            before = by_subject.get("before") or by_subject.get("inputs", "")
            table.add_row(f"{claim.name}: {label}", before, by_subject.get("after", ""))
    return table


def show_result(out: Console, run: RunFile) -> None:
    """Print the result of a complete run: the verdict, the table, the cost, the caveat and the claims."""
    result = run.result
    assert result is not None
    out.print()
    out.print(result.verdict)
    out.print()
    out.print(_table(result, run.settings.steps))
    out.print()
    for line in (_differences(result), _seconds(result)):
        if line:
            out.print(line)
    stacking = result.stacking
    if stacking is not None and stacking.factor > 1:
        out.print(f"Trained {stacking.runs} networks in stacks, {number(stacking.factor)} times as fast as one by one.")
    out.print(f"Caveat: {result.caveat}")
    judgment = read_judgment(run)
    if judgment is not None:
        out.print()
        out.print(_claims(judgment.claims))
        out.print()
        out.print(judgment.power.text)
