"""State of a layer that belongs to the training step at hand: no copy, pickle or state dict has it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from batchnorm.kernels.plan import Plan
from batchnorm.nn.contexts import PLAIN, LayerContext, LayerKey
from batchnorm.nn.renorm import FirstRuns

__all__ = ["Plans", "StepState"]

Plans = dict[torch.Size, list[Plan]]
"""Plans of forwards, by the shape of the input."""


@dataclass(eq=False)
class StepState:
    """State of a layer between the forwards of one step, or of one process.

    Attributes
    ----------
    key : LayerKey
        The key by which contexts find the layer.
    first_runs : FirstRuns
        Corrections of batch renormalization, for forwards that activation checkpointing may run again.
    plans : Plans
        Replaced rather than cleared, since a forward on another thread may be about to add to it.
    plans_without_updates : Plans
        The plans for forwards within contexts that pause updates.
    ranks_agreed : bool
        With ``sync``, all ranks have been seen at this layer together.
    warned_of_one_sample, warned_of_frozen : bool
    memory : dict
        A reference to each of the running statistics, by name, and a second tensor in its memory.
    """

    key: LayerKey = field(default_factory=LayerKey)
    first_runs: FirstRuns = field(default_factory=FirstRuns)
    plans: Plans = field(default_factory=dict)
    plans_without_updates: Plans = field(default_factory=dict)
    ranks_agreed: bool = False
    warned_of_one_sample: bool = False
    warned_of_frozen: bool = False
    memory: dict[str, tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=dict)

    def plans_in(self, context: LayerContext) -> Plans | None:
        """Return the plans that are valid within a context; None if each forward must be decided anew."""
        if context is PLAIN:
            return self.plans
        if context.hooks:
            return None
        if context.updates_paused:
            return self.plans_without_updates
        return self.plans if context.pool is None else None  # which domain it is decides nothing in a plan

    def drop_plans(self) -> None:
        """Drop the plans because a setting of the layer has changed."""
        self.plans, self.plans_without_updates = {}, {}

    def __deepcopy__(self, _memo: object) -> StepState:
        """Return `fresh`: parametrized modules copy their attributes without asking for the state."""
        return self.fresh()

    def fresh(self) -> StepState:
        """Return the state that a copy of the layer begins with; it does not repeat the warnings."""
        return StepState(warned_of_one_sample=self.warned_of_one_sample, warned_of_frozen=self.warned_of_frozen)
