"""The terminal that the command line writes to, and one line of progress in it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

__all__ = ["WIDTH", "ProgressLine", "Share", "console"]

WIDTH = 80


def console(*, stderr: bool = False) -> Console:
    """Return a console of at most 80 columns that prints text unchanged."""
    out = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    out.width = min(WIDTH, out.width)
    return out


class Share:
    """The share of some work that is done. It never falls: work that is added later slows it down instead.

    >>> share = Share()
    >>> share.plan(100)
    >>> share.advance(50)
    >>> share.value
    0.5
    >>> share.plan(50)
    >>> share.advance(50)
    >>> share.value
    0.75
    """

    def __init__(self) -> None:
        self.left, self.value = 0.0, 0.0

    def plan(self, amount: float) -> None:
        """Add an amount of work; a negative one is not needed after all."""
        self.left += amount

    def advance(self, amount: float) -> None:
        """Count an amount of work as done."""
        if self.left > 0:
            self.value += (1 - self.value) * min(1.0, amount / self.left)
        self.left -= amount


class ProgressLine:
    """One line on stderr: a bar, the share that is done, times, and the current work.

    Spinner and time go on while the share stands still. Until the first share is known, the bar pulses.

    Parameters
    ----------
    bar_width : int
    elapsed : bool
        Show the time since the start, besides the time left.
    transient : bool
        Remove the line at the end, and show none where stderr is no terminal.
    refresh_per_second : float
    """

    def __init__(
        self, *, bar_width: int = 30, elapsed: bool = True, transient: bool = False, refresh_per_second: float = 10
    ) -> None:
        self.console = console(stderr=True)
        self._share = 0.0
        self._progress = Progress(
            SpinnerColumn("line"),
            BarColumn(bar_width),
            TaskProgressColumn(table_column=Column(no_wrap=True, min_width=4)),
            *([TimeElapsedColumn(), TextColumn("+")] if elapsed else []),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.console,
            transient=transient,
            disable=transient and not self.console.is_terminal,
            refresh_per_second=refresh_per_second,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.show(share=1.0)
        self._progress.stop()

    def show(self, doing: str | None = None, *, share: float | None = None) -> None:
        """Change the name of the work, or its share from 0 to 1; a share below the one shown is ignored."""
        if doing is not None:
            self._progress.update(self._task, description=doing, refresh=True)
        if share is not None and share > self._share:
            self._share = share
            self._progress.update(self._task, total=1.0, completed=share)
