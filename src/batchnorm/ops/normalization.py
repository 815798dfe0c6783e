"""Batch normalization of a batch given as records: at once, or by a plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.kernels import native, reference
from batchnorm.kernels.call import FUSED
from batchnorm.kernels.native import Statistics
from batchnorm.kernels.plan import Plan, can_plan
from batchnorm.kernels.records import BatchMoments, Operands, Rule, Running
from batchnorm.ops import chunks, operators, sharding
from batchnorm.ops.autograd import backward_directly, differentiable
from batchnorm.ops.dispatch import is_direct, is_native, is_unwatched, records_gradients
from batchnorm.ops.running import update_
from batchnorm.ops.subclasses import without_subclass

__all__ = ["Normalized", "apply_activation", "batch_norm", "make_plan", "moments", "normalize", "run_plan"]


class Normalized(NamedTuple):
    """A normalized batch.

    Attributes
    ----------
    y : Tensor
    moments : BatchMoments or None
        Of the whole batch.
    correction : Tensor or None, shape (2, C) or (2, chunks, C)
        The r and d of its batch renormalization.
    """

    y: Tensor
    moments: BatchMoments | None
    correction: Tensor | None


def batch_norm(operands: Operands, running: Running, rule: Rule) -> Tensor:
    """Normalize a batch; in training use its own statistics and update the running ones by them."""
    return normalize(operands, running, rule, moments=False).y


def normalize(operands: Operands, running: Running, rule: Rule, *, moments: bool = True) -> Normalized:
    """Normalize a batch and return its moments too; without ``moments`` these may be None, which saves pooling them."""
    activation = rule.activation
    if activation not in FUSED:
        rule = rule._replace(activation=None)
    direct = is_direct(operands, running, rule)
    if not direct:
        sharding.admit(*operands)
        operands = Operands._make(map(without_subclass, operands))
        running = Running._make(map(without_subclass, running))
        direct = is_direct(operands, running, rule)
    if not direct:
        y, batch, correction = _by_operators(operands, running, rule)
    else:
        if not native.is_ready(operands.x):
            operands = operands._replace(x=native.ready(operands.x))
        y, packed, correction = native.forward(operands, running, rule)
        if records_gradients() and _requires_grad(operands):
            used = rule if correction is rule.correction else rule._replace(correction=correction)
            y = differentiable(y, operands, backward_directly, packed, used)
        batch = chunks.pool(packed, operands.x, operands.mask, rule) if moments else None
    if rule.activation != activation:
        y = apply_activation(y, activation, operands.mask)
    return Normalized(y, batch, correction)


def apply_activation(y: Tensor, activation: str | None, mask: Tensor | None) -> Tensor:
    """Apply an activation that no kernel fuses: torch's vectorized functions are faster than libm's in a fused loop."""
    if activation is None:
        return y
    y = reference.ACTIVATIONS[activation].function(y)
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0.0)


def _requires_grad(operands: Operands) -> bool:
    x, weight, bias, residual, _ = operands
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _by_operators(operands: Operands, running: Running, rule: Rule) -> Normalized:
    """Use the operators, or the reference under a transform and for torch.export; r and d are computed outside of both.

    A program of torch's own operators can be loaded without this library.
    """
    x, mask = operands.x, operands.mask
    by_reference = torch_internals.may_be_transformed() or (torch_internals.is_exporting() and _has_fixed_chunks(rule))
    batches: list[BatchMoments] = []
    if by_reference:
        batches = chunks.moments_of_chunks(x, mask, rule) if rule.training else [_stored_moments(x, running)]
    if rule.limits is not None and rule.correction is None:
        packed = chunks.pack(batches) if by_reference else operators.moments(x.detach(), mask, rule)
        each = BatchMoments(packed[0], packed[1], 0)
        r_and_d = reference.renorm_correction(each, *_copies(running), rule.eps, *rule.limits)
        rule = rule._replace(correction=torch.stack(r_and_d))
    if by_reference:
        y = chunks.forward(operands, batches, rule)
        batch = batches[0] if len(batches) == 1 else reference.pooled(reference.stacked(batches))
    else:
        y, packed = operators.forward(operands, running, rule)
        batch = chunks.pool(packed, x, mask, rule)
    if rule.training:
        update_(running, batch)
    return Normalized(y, batch, rule.correction)


def _has_fixed_chunks(rule: Rule) -> bool:
    """Return whether the number of virtual batches is a plain number, so that an exported program can list them."""
    if torch.compiler.is_dynamo_compiling():  # there an open number looks like a plain one
        return rule.chunks == 1
    return isinstance(rule.chunks, int)


def _stored_moments(x: Tensor, running: Running) -> BatchMoments:
    dtype = reference.statistics_dtype(x)
    mean, var = _copies(running)
    return BatchMoments(mean.to(dtype), var.to(dtype), 0)


def _copies(running: Running) -> tuple[Tensor, Tensor]:
    """Return copies of mean and variance, since a training step may come between a forward and its backward."""
    assert running.mean is not None
    assert running.var is not None
    return running.mean.clone(), running.var.clone()


def make_plan(operands: Operands, running: Running, rule: Rule) -> Plan | None:
    """Return a plan for calls of `batch_norm` like this one, or None if they go another way."""
    x = operands.x
    possible = (
        can_plan()
        and operands.mask is None
        and is_direct(operands, running, rule)
        and native.is_ready(x)
        and x.numel() > 0
        and native.can_read(x, (operands.residual,), (operands.weight, operands.bias, running.mean, running.var))
    )
    if not possible:
        return None
    native.check_counts(running)
    fused = rule if rule.activation in FUSED else rule._replace(activation=None)
    return Plan(operands, running, fused, backward_directly, activation=rule.activation)


def run_plan(plan: Plan, operands: Operands, statistics: Statistics) -> Tensor | None:
    """Return y as `batch_norm` does, by a plan; return None for tensors unlike those that the plan was made for.

    No compiler or dispatch mode may be active. ``statistics`` are the running (mean, var, batches, skipped).
    """
    made = None if torch_internals.forward_mode_is_active() else plan.forward(operands, statistics)
    if made is None:
        return None
    y, buffer = made
    if plan.differentiable and records_gradients():
        y = differentiable(y, operands, plan.backward, buffer, plan.rule)
    return y if plan.rule.activation == plan.activation else apply_activation(y, plan.activation, None)


def moments(x: Tensor, mask: Tensor | None = None) -> BatchMoments:
    """Return mean and biased variance (C,) of x (N, C, *), and the count of values, without a gradient."""
    sharding.admit(x)
    x, mask = without_subclass(x).detach(), without_subclass(mask)
    if torch_internals.may_be_transformed():
        return reference.moments(x, mask)
    rule = Rule(1.0, None, training=True)
    direct = is_unwatched() and native.are_unwrapped(x, mask) and is_native(x)
    packed = (operators.moments_without_dispatch if direct else operators.moments)(x, mask, rule)
    return BatchMoments(packed[0], packed[1], reference.count_of(x, mask))
