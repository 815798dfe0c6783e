"""What the reader of a figure can choose: buttons, and a slider that plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["SCALES", "TIME", "X_SCALE", "Y_SCALE", "Control", "Slider"]


@dataclass(frozen=True)
class Control:
    """Buttons of which one is pressed.

    Parameters
    ----------
    name : str
        What series and axes call it; "time", "x" and "y" change axes.
    label : str
        What is chosen, in words.
    options : sequence of (str, str)
        Values and what they are called.
    start : int
        The option that holds at first; -1 is the last.
    """

    form: ClassVar[str] = "buttons"
    name: str
    label: str
    options: Sequence[tuple[str, str]]
    start: int = 0

    @property
    def first(self) -> int:
        """Number of the option that holds at first."""
        return self.start % len(self.options)

    def drawing(self) -> dict[str, Any]:
        """What the browser needs to know of it."""
        return {"name": self.name, "options": [list(option) for option in self.options], "start": self.first}


@dataclass(frozen=True)
class Slider(Control):
    """A slider over options in their order, with a button that plays them; it starts where the play ends."""

    form: ClassVar[str] = "slider"
    start: int = -1


SCALES = (("log", "log"), ("linear", "linear"))
TIME = Control("time", "Against", (("steps", "steps"), ("seconds", "seconds")))
X_SCALE = Control("x", "Horizontal axis", SCALES)
Y_SCALE = Control("y", "Loss axis", SCALES)
