"""State of a layer that belongs to the training step at hand: no copy, pickle or state dict has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm.kernels.plan import Plan
from batchnorm.nn.accumulated import Pool
from batchnorm.nn.renorm import FirstRuns

__all__ = ["Plans", "StepState"]

Plans = dict[torch.Size, list[Plan]]
"""Plans of forwards, by the shape of the input."""


@dataclass(eq=False)
class StepState:
    """State of a layer between the forwards of one step, or of one process.

    Attributes
    ----------
    domain : str or None
        The domain whose running statistics are used.
    updates_paused : bool
        `no_stat_updates` is active.
    pool : Pool or None
        Moments of micro-batches, while `accumulate` is active.
    first_runs : FirstRuns
        Corrections of batch renormalization, for forwards that activation checkpointing may run again.
    plans : Plans
        Replaced rather than cleared, since a forward on another thread may be about to add to it.
    ranks_agreed : bool
        With ``sync``, all ranks have been seen at this layer together.
    warned_of_one_sample : bool
    """

    domain: str | None = None
    updates_paused: bool = False
    pool: Pool | None = None
    first_runs: FirstRuns = field(default_factory=FirstRuns)
    plans: Plans = field(default_factory=dict)
    ranks_agreed: bool = False
    warned_of_one_sample: bool = False

    def change(self, **values: Any) -> None:
        """Set attributes on which plans depend, and drop the plans."""
        for name, value in values.items():
            setattr(self, name, value)
        self.plans = {}

    def fresh(self) -> StepState:
        """Return the state that a copy of the layer begins with; it does not repeat the warning."""
        return StepState(warned_of_one_sample=self.warned_of_one_sample)
