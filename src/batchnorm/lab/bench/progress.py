"""Progress of the benchmark on stderr: the cases done, the current one, and the time left."""

from __future__ import annotations

from batchnorm.lab.console import ProgressLine

__all__ = ["Bar"]


class Bar(ProgressLine):
    """A line that moves on at every call of `say`, and within a case at every call of `tick`."""

    def __init__(self, total: int) -> None:
        # each refresh takes time from what is timed
        super().__init__(bar_width=10, elapsed=False, transient=True, refresh_per_second=4)
        self.total = total
        self.begun = 0

    def say(self, name: str) -> None:
        """Show the name of the case that begins, and count the one before as done."""
        self.begun += 1
        self.show(f"{self.begun} of {self.total} {name}", share=(self.begun - 1) / self.total)

    def tick(self, share: float) -> None:
        """Show that a share of the current case is done."""
        self.show(share=(self.begun - 1 + share) / self.total)
