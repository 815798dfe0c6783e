"""The controls of a figure: buttons, and a slider that plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

__all__ = ["SCALES", "TIME", "X_SCALE", "Y_SCALE", "Control", "Slider"]


@dataclass(frozen=True)
class Control:
    """Buttons of which one is chosen.

    Parameters
    ----------
    name : str
        The name by which series and axes refer to it; "time", "x" and "y" change axes.
    label : str
        The label of the buttons.
    options : sequence of (str, str)
        Values and their labels.
    start : int
        The option that is chosen at first; -1 is the last.
    """

    form: ClassVar[str] = "buttons"
    name: str
    label: str
    options: Sequence[tuple[str, str]]
    start: int = 0

    @property
    def first(self) -> int:
        """Index of the option that is chosen at first."""
        return self.start % len(self.options)

    def drawing(self) -> dict[str, object]:
        """Return what the browser needs to know about the control."""
        return {"name": self.name, "options": [list(option) for option in self.options], "start": self.first}


@dataclass(frozen=True)
class Slider(Control):
    """A slider over ordered options, with a button that plays them; it starts at the last option."""

    form: ClassVar[str] = "slider"
    start: int = -1


SCALES = (("log", "log"), ("linear", "linear"))
TIME = Control("time", "Against", (("steps", "steps"), ("seconds", "seconds")))
X_SCALE = Control("x", "Horizontal axis", SCALES)
Y_SCALE = Control("y", "Loss axis", SCALES)
