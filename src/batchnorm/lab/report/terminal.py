"""What a comparison shows in a terminal of 80 columns: bars while it trains, then the verdict and the table."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.lab.comparison.verdict import difference_text, number, ratio_text, steps_text
from batchnorm.lab.console import console
from batchnorm.lab.training.settings import ARMS

__all__ = ["Bars", "Silence", "describe_data", "show_result"]


class Silence:
    """Progress that nobody asked to see."""

    def plan(self, arm: str, steps: int) -> None:
        """Nothing."""

    def advance(self, arm: str, steps: int) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""


class Bars:
    """A bar for each arm with the time left, on stderr."""

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
        """Lengthen the arm's bar."""
        task = self.progress.tasks[self.tasks[arm]]
        self.progress.update(self.tasks[arm], total=(task.total or 0) + steps)

    def advance(self, arm: str, steps: int) -> None:
        """Move the arm's bar on."""
        self.progress.advance(self.tasks[arm], steps)

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self.console.print(sentence)


def describe_data(out: Console, data: dict[str, Any], notes: list[str]) -> None:
    """What the data is, how it is split, and what was done to it."""
    rows = data["rows"]
    out.print(
        f"{data['name']}: {len(data['features'])} features to predict {data['target']}; rows to train on "
        f"{rows['train']}, to choose and count on {rows['validation']}, to test on {rows['test']}."
    )
    for note in [*data["notes"], *notes]:
        out.print(f"- {note}")
    for left in data["left_out"]:
        out.print(f"- column {left['column']} is left out: {left['reason']}")


def _table(result: dict[str, Any], steps: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("batch\nnorm")
    for heading in (
        "learning\nrate",
        "steps",
        "times fewer\nsteps",
        "rates that\nreach",
        f"test\n{result['score_name']}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm, values in result["arms"].items():
        ratio = result["ratios"].get(arm)
        times = "-" if not result["headline"] else "1" if ratio is None else ratio_text(ratio)
        spread = f"{values['test_score']:.3f}" if not math.isnan(values["test_score"]) else "diverged"
        table.add_row(
            arm,
            f"{values['learning_rate']:g}",
            steps_text(values["median_steps"], steps),
            times,
            f"{values['rates_that_reach']} of {len(values['search'])}",
            spread,
        )
    return table


def _differences(result: dict[str, Any]) -> str:
    """Test score with batch norm less that without, with its interval."""
    parts = []
    for arm, ratio in result["ratios"].items():
        difference = ratio["test_difference"]
        if difference is not None:
            parts.append(f"{arm} {difference_text(difference)}")
    return f"Test {result['score_name']} against none: {', '.join(parts)}." if parts else ""


def _seconds(result: dict[str, Any]) -> str:
    """What a step costs in each arm, and so how many times fewer seconds the steps are."""
    steps = ", ".join(f"{arm} {1000 * values['seconds_a_step']:.2f}" for arm, values in result["arms"].items())
    times = ", ".join(f"{arm} {ratio_text(ratio['seconds'])}" for arm, ratio in result["ratios"].items())
    return f"Milliseconds a step: {steps}." + (f" Times fewer seconds: {times}." if result["headline"] else "")


def _claims(claims: list[dict[str, Any]]) -> Table:
    """A row for each thing claimed, with its verdict before and after the nonlinearity."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("claim")
    for heading in ("before the\nnonlinearity", "after it"):
        table.add_column(heading, no_wrap=True)
    for claim in claims:
        verdicts: dict[str, dict[str, str]] = {}
        for finding in claim["findings"]:
            verdicts.setdefault(finding["label"], {})[finding["subject"]] = finding["verdict"]
        for label, by_subject in verdicts.items():
            before = by_subject.get("before") or by_subject.get("inputs", "")
            table.add_row(f"{claim['name']}: {label}", before, by_subject.get("after", ""))
    return table


def show_result(out: Console, result: dict[str, Any], steps: int) -> None:
    """The verdict, the table, what it cost, and the caveat."""
    out.print()
    out.print(result["verdict"])
    out.print()
    out.print(_table(result, steps))
    out.print()
    for line in (_differences(result), _seconds(result)):
        if line:
            out.print(line)
    stacking = result["stacking"]
    if stacking["factor"] > 1:
        out.print(
            f"Trained {stacking['runs']} networks in stacks, {number(stacking['factor'])} times as fast as one by one."
        )
    out.print(f"Caveat: {result['caveat']}")
    if "claims" in result:
        out.print()
        out.print(_claims(result["claims"]))
        out.print()
        out.print(result["power"]["text"])
