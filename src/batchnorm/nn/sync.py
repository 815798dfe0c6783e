"""Synchronised batch normalization: a batch spread over processes has one mean and one variance a channel.

Forward: each rank takes the moments of its own part, one all_gather shares them, and every rank merges all of them in
the same order (Chan, Golub & LeVeque 1979), so that all end with the same numbers, to the bit. A part is then
normalised as in eval, with these. Ranks may hold different counts, 1 and 0 among them.

Backward: with dz the gradient of the activation's argument, s = 1 / sqrt(var + eps) and sums over all ranks' values::

    dx = gamma * s * dz - gamma * s * (1/m sum dz + x_hat * 1/m sum dz * x_hat)

The first term, and this rank's own sums, are the backward of eval; one all_reduce adds up the sums; the second term is
once more a normalisation of x, of scale ``-gamma * s / m * sum dz * x_hat`` and shift ``-gamma * s / m * sum dz``, to
which the first is the residual. The gradients of gamma and beta stay the rank's own, since what trains in parallel
(DistributedDataParallel, FSDP) adds up gradients itself.

The collectives are torch's functional ones, which torch.compile keeps in its graph; a rank that is gone or late gives
the others an error within the group's timeout.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import ops
from batchnorm.errors import DistributedError, UnsupportedError
from batchnorm.kernels import native, reference
from batchnorm.kernels.records import BatchMoments, Operands, Rule, Running
from batchnorm.nn.small_batch import label_of
from batchnorm.ops import Normalized
from batchnorm.processes import Group, all_gather_through_store, gather_in_graph, sum_in_graph

if TYPE_CHECKING:
    from batchnorm.nn.layer import Layer

__all__ = ["Shared", "Spread", "normalise", "spread"]


class Spread(NamedTuple):
    """A batch of which this rank has a part: the moments of all of it, and whether each channel has a single value."""

    moments: BatchMoments
    single: bool
    group: Group


class Shared:
    """A process group, as copies of a layer share it; no pickle can take it along."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise UnsupportedError(
            "a process group belongs to the processes that run, so a layer that has one can't be pickled: save its "
            f"state_dict(), or set its process_group to None; got {self.group!r}"
        )


@torch.no_grad()
def spread(layer: Layer, x: Tensor, mask: Tensor | None, group: Group) -> Spread:
    """Exchange the moments of all ranks' parts x (N, C, *), in one collective.

    Raises
    ------
    DistributedError
        At the layer's first batch, on all ranks: they are not at the same layer.
    UnsupportedError
        Under a transform of torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "sync=True exchanges statistics with other processes, which torch.func's transforms can't do"
        )
    compiling = torch.compiler.is_compiling()
    if compiling:
        layer._agreed = True  # nothing to be said in a graph; nor later, outside of it, where other ranks say nothing
    elif not layer._agreed:
        _agree(layer, x, group)
        layer._agreed = True
    own = ops.moments(x, mask)
    values = x.numel() // max(x.shape[1], 1)
    counts = own.mean.new_full((2,), values)
    if mask is not None:
        counts[1] = own.count
    gathered = gather_in_graph(torch.cat((own.mean, own.var, counts)), group)
    mean, var, counts = gathered.tensor_split((x.shape[1], 2 * x.shape[1]), 1)
    # Only a rank that has at most one value waits for the device to tell how many there are: where all have one
    # together, that is each of them. In a graph, which can't wait, such a batch gives beta and moves no statistics.
    single = not compiling and values <= 1 and int(counts[:, 0].sum()) == 1
    return Spread(reference.pooled(BatchMoments(mean, var, counts[:, 1])), single, group)


SAME_LAYERS = "with sync=True all ranks must run the same layers in the same order"
_MET: Counter[str] = Counter()
"""How many layers have had their first batch, by group."""


def _agree(layer: Layer, x: Tensor, group: Group) -> None:
    """See that all ranks are at the same layer; through the store, since a collective would meet another layer's."""
    mine = f"{label_of(layer)}{layer.num_features} channels of {x.dtype}, eps={layer.eps}"
    key = f"batchnorm/{group.name}/{_MET[group.name]}"
    _MET[group.name] += 1
    try:
        said = all_gather_through_store(mine, key, layer.process_group)
    except DistributedError as error:
        raise DistributedError(f"{SAME_LAYERS}; {error}, while this one is at {mine!r}") from error
    if len(set(said)) > 1:
        at = "; ".join(f"rank {rank} of the group is at {text!r}" for rank, text in enumerate(said))
        raise DistributedError(f"{SAME_LAYERS}; {at}")


def normalise(operands: Operands, running: Running, rule: Rule, batch: Spread) -> Normalized:
    """As `ops.normalize` of the whole batch, of which x (N, C, *) is this rank's part."""
    x, weight, bias, residual, mask = operands
    moments, _, group = batch
    correction = rule.correction
    if correction is None and rule.limits is not None:
        assert running.mean is not None
        assert running.var is not None
        correction = torch.stack(
            reference.renorm_correction(moments, running.mean, running.var, rule.eps, *rule.limits)
        )
    if correction is not None:
        weight, bias = ops.corrected(weight, bias, *correction)
    fused = rule.activation if rule.activation in native.FUSED else None
    y = _Normalise.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, residual, mask, moments.mean, moments.var, moments.count, rule.eps, fused, group.name
    )
    ops.running.update_(running, moments)
    if rule.activation != fused:
        y = ops.apply_activation(y, rule.activation, mask)
    return Normalized(y, moments, correction)


class _Normalise(torch.autograd.Function):
    """y = activation(weight * x_hat + bias + residual) with the moments of all ranks' values, of which x has some."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        activation: str | None,
        group: str,
    ) -> Tensor:
        y, _ = torch.ops.batchnorm.forward(x, mean, var, weight, bias, residual, mask, eps, activation)
        sign = y if residual is not None and activation is not None else None  # else x tells it
        ctx.save_for_backward(x, weight, bias, sign, mask, mean, var, count)
        ctx.eps, ctx.activation, ctx.group = eps, activation, group
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, mask, mean, var, count = ctx.saved_tensors
        of_x, of_weight, of_bias, of_residual, *_ = ctx.needs_input_grad
        # In the dtype of the moments, and there even if the layer has none, so that the sums are exact and come out.
        gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        beta = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        wanted = [of_x, True, True, of_residual and y is not None]
        dx, dgamma, dbeta, dresidual = torch.ops.batchnorm.backward(
            dy, x, torch.stack((mean, var)), gamma, beta, y, mask, ctx.eps, ctx.activation, False, wanted
        )
        if of_x:
            means = sum_in_graph(torch.stack((dgamma, dbeta)), ctx.group) / count.clamp(min=1)
            scale, shift = -gamma * torch.rsqrt(var + ctx.eps) * means
            dx, _ = torch.ops.batchnorm.forward(x, mean, var, scale, shift, dx, mask, ctx.eps, None)
        if of_residual and y is None:
            dresidual = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0.0)
        return (
            dx if of_x else None,
            dgamma.to(weight.dtype) if of_weight else None,
            dbeta.to(bias.dtype) if of_bias else None,
            dresidual.to(ctx.residual_dtype) if of_residual else None,
            *(None,) * 7,
        )
