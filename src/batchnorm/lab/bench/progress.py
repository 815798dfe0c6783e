"""A progress bar on stderr: cases done, time left, and the current case."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batchnorm.lab.console import console

__all__ = ["Bar"]


class Bar:
    """A progress bar that advances at every call of `say`."""

    def __init__(self, total: int) -> None:
        self.progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=console(stderr=True),
            transient=True,
        )
        self.task = self.progress.add_task("", total=total)
        self.started = False

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, name: str) -> None:
        """Show the name of the case that begins, and count the one before as done."""
        self.progress.update(self.task, description=name, advance=int(self.started))
        self.started = True
