"""The interface through which a comparison trains and judges more than its three arms."""

from __future__ import annotations

from typing import Any, Protocol

from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.stacks import Stack

__all__ = ["Extension"]


class Extension(Protocol):
    """Measurements besides the comparison itself, such as the claims of a study."""

    @property
    def records(self) -> tuple[RecordName, ...]:
        """The recorders that the confirming runs need (see `recorders`)."""

    def stacks(self, study: Study) -> list[Stack]:
        """Return the stacks to train besides those of the comparison, once its search is finished."""

    def judge(self, study: Study) -> Any:
        """Return a dataclass whose fields are added to the result in run.json, once all runs are finished."""
