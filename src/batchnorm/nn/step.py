"""The decisions that each forward of a layer takes once, before it computes, as one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import ops, torch_internals
from batchnorm.errors import UnsupportedError
from batchnorm.kernels.records import Operands, Rule, Running
from batchnorm.nn import accumulated, exporting, sync
from batchnorm.nn.accumulated import Pool
from batchnorm.nn.contexts import LayerContext
from batchnorm.nn.layout import Batch
from batchnorm.nn.small_batch import (
    label_of,
    refuse_samples_apart,
    refuse_single_value,
    refuse_zero_eps,
    warn_of_one_sample,
)
from batchnorm.nn.state import State
from batchnorm.nn.step_state import StepState
from batchnorm.nn.sync import GlobalMoments
from batchnorm.processes import group_of

__all__ = ["Step", "decide", "decide_in_torch", "normalize"]


class Step(NamedTuple):
    """The statistics that one forward uses and updates, and how.

    Attributes
    ----------
    running : Running
        The running statistics that are in force, and whether this batch updates them.
    rule : Rule
        With ``training`` the statistics of the batch are used.
    pool : Pool or None
        Takes the moments of this batch, instead of an update.
    domain : str or None
        The domain of the running statistics.
    global_moments : GlobalMoments or None
        The moments of all processes' parts of the batch.
    keeps_correction : bool
        Keep r and d of batch renormalization, because this forward may be run again.
    counts : bool
        The batch counts in the running statistics, now or when the pool is committed.
    can_plan : bool
        A plan can serve later calls like this one.
    """

    running: Running
    rule: Rule
    pool: Pool | None = None
    domain: str | None = None
    global_moments: GlobalMoments | None = None
    keeps_correction: bool = False
    counts: bool = False
    can_plan: bool = False


def decide(layer: State, batch: Batch, context: LayerContext) -> Step:
    """Decide what a forward on the batch uses and updates within a context.

    Raises
    ------
    InputError
        The batch has a single value per channel, or eps is 0 where its own statistics are used.
    DistributedError
        With ``sync``, at the layer's first batch: the ranks are not at the same layer.
    UnsupportedError
        With ``sync``, under a transform of torch.func; or under vmap on one sample.
    """
    x, state = batch.x, layer.step_state
    compiling = torch.compiler.is_compiling()
    stored = layer._buffers["running_mean"]
    if stored is not None and stored.dtype.itemsize < 4 and not compiling:
        layer.restore_precision()
    mean, var, batches = layer.statistics_in(context)
    trains = layer.trains()
    count = layer._buffers["samples_seen"]
    if stored is not None and (trains if count is None else count.device != stored.device):
        layer.begin_counts()
    uses_batch_statistics = trains or (mean is None and var is None)
    everywhere = _global_moments(layer, batch) if layer.sync and trains else None
    if uses_batch_statistics and (x.numel() == x.shape[1] > 0 if everywhere is None else everywhere.single_value):
        if not (trains and layer.small_batch == "running"):
            refuse_single_value(layer, batch.shape)
        trains = uses_batch_statistics = False
        everywhere = None
    if uses_batch_statistics and layer.epsilon() == 0:
        refuse_zero_eps(layer)
    if trains and batch.samples == 1 and not compiling and torch_internals.vmap_is_active():
        refuse_samples_apart(layer, batch.shape)
    if trains and not compiling and batch.samples == 1 and everywhere is None and not state.warned_of_one_sample:
        state.warned_of_one_sample = True
        warn_of_one_sample(layer, batch.shape)
    # Activation checkpointing runs forward again within the backward; a compiled graph has the forward once.
    recomputing = not compiling and torch_internals.graph_task_id() != -1
    counts = trains and layer.track_running_stats and not recomputing and not context.updates_paused
    pool = context.pool if counts else None
    running = layer.running_in(context, update=counts and pool is None)
    rule = Rule(layer.epsilon(), layer.activation, uses_batch_statistics)
    if not trains:
        return Step(running, rule, can_plan=True)
    if layer.virtual_batch_size is not None:
        rule = _with_virtual_batches(rule, batch, layer.virtual_batch_size)
    keeps_correction = False
    if layer.renorm is not None:
        assert batches is not None
        rule = rule._replace(limits=layer.renorm.limits(batches))
        if recomputing:
            rule = rule._replace(correction=_first_correction(state, batch, everywhere))
        else:
            keeps_correction = _may_run_again()
    # With sync there may be processes later, when a plan would not see them.
    can_plan = layer.renorm is None and pool is None and not layer.sync
    return Step(running, rule, pool, context.domain, everywhere, keeps_correction, counts, can_plan)


def decide_in_torch(layer: State, context: LayerContext) -> Step:
    """Decide the same for a forward that is made of torch's own operators, which check sizes themselves."""
    trains = layer.trains()
    running = layer.running_in(context, update=trains and layer.track_running_stats and not context.updates_paused)
    return Step(running, Rule(layer.epsilon(), layer.activation, trains or running.mean is None))


def normalize(operands: Operands, step: Step, state: StepState) -> Tensor:
    """Return y, and keep for later what the step says."""
    running, rule, pool, domain, everywhere, keeps_correction, *_ = step
    if torch_internals.is_exporting():
        if pool is not None:
            raise UnsupportedError(
                "torch.export cannot record a forward within batchnorm.accumulate; export outside of it"
            )
        if everywhere is None and exporting.is_torchs(operands, running, rule):
            return exporting.in_torch_operators(operands, running, rule, 1)
    if everywhere is not None:
        found = sync.normalize(operands, running, rule, everywhere)
    elif pool is not None or rule.limits is not None:
        found = ops.normalize(operands, running, rule, moments=keeps_correction or pool is not None)
    else:
        return ops.batch_norm(operands, running, rule)
    if found.moments is not None and keeps_correction:
        assert found.correction is not None
        state.first_runs.keep(found.moments, found.correction)
    if found.moments is not None and pool is not None:
        accumulated.add(pool, domain, found.moments, running)
    return found.y


def _global_moments(layer: State, batch: Batch) -> GlobalMoments | None:
    """Return the moments of all processes' parts of the batch; None where all of it is in this process."""
    group = group_of(layer.process_group)
    if group is None:
        return None
    sync.refuse_transforms()
    sync.refuse_dtensor(batch.x)
    state = layer.step_state
    if torch.compiler.is_compiling():
        # A graph exchanges no names; nor does this rank later, outside of it, when the others would not answer.
        state.ranks_agreed = True
    elif not state.ranks_agreed:
        label = f"{label_of(layer)}{batch.x.shape[1]} channels of {batch.x.dtype}, eps={layer.epsilon()}"
        sync.check_same_layer(label, group, layer.process_group)
        state.ranks_agreed = True
    return sync.global_moments(batch.x, batch.mask, group)


def _with_virtual_batches(rule: Rule, batch: Batch, size: int) -> Rule:
    """Return the rule for chunks of so many samples; a last one with one value per channel joins the one before it."""
    x, samples = batch.x, batch.samples
    if samples <= size:
        return rule
    rows, positions = x.shape[0] // samples, x.numel() // (samples * x.shape[1])
    chunks = -(-(samples - 1 if positions == 1 else samples) // size)
    return rule if chunks == 1 else rule._replace(chunks=chunks, chunk=size * rows)


def _first_correction(state: StepState, batch: Batch, everywhere: GlobalMoments | None) -> Tensor | None:
    """Return the r and d that the forward used when it ran first; None where it did not."""
    with torch_internals.without_modes():  # selective checkpoints know only the operators of the first run
        moments = ops.moments(batch.x, batch.mask) if everywhere is None else everywhere.moments
        return state.first_runs.find(moments)


def _may_run_again() -> bool:
    """Return whether this forward may be run again: under activation checkpointing, reentrant or not."""
    return not torch.compiler.is_compiling() and (
        not torch.is_grad_enabled() or torch_internals.has_saved_tensors_hooks()
    )
