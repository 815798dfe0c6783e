"""Synchronized batch normalization: a batch in parts on several processes has one mean and one variance per channel.

Forward: each rank computes the moments of its part, one all_gather shares them, and every rank merges all of them in
the same order (Chan, Golub & LeVeque 1979), so that all ranks get the same bits. A part is then normalized as in eval,
with these moments. Ranks may hold different counts of values, 1 and 0 among them.

Backward: with dz the gradient of the activation's argument, s = 1 / sqrt(var + eps) and sums over all ranks' values::

    dx = gamma * s * dz - gamma * s * (1/m sum dz + x_hat * 1/m sum dz * x_hat)

The first term and the local sums are the backward of eval; one all_reduce adds up the sums. The second term is another
normalization of x, with scale ``-gamma * s / m * sum dz * x_hat``, shift ``-gamma * s / m * sum dz`` and the first term
as its residual. The gradients of gamma and beta stay local, since DistributedDataParallel and FSDP add up gradients.

The collectives are torch's functional ones, which torch.compile keeps in its graph. If a rank has ended or is late, the
others get an error within the timeout of the group.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import ops, torch_internals
from batchnorm.errors import DistributedError, UnsupportedError
from batchnorm.kernels import native, reference
from batchnorm.kernels.call import FUSED
from batchnorm.kernels.records import BatchMoments, Operands, Rule, Running
from batchnorm.ops import Normalized, operators
from batchnorm.processes import Group, all_gather_through_store, gather_in_graph, sum_in_graph

__all__ = [
    "GlobalMoments",
    "SharedGroup",
    "check_same_layer",
    "global_moments",
    "normalize",
    "refuse_dtensor",
    "refuse_transforms",
]

SAME_LAYERS = "with sync=True all ranks must run the same layers in the same order"
_FIRST_BATCHES: Counter[str] = Counter()
"""Number of layers that have had their first batch, by group."""


class GlobalMoments(NamedTuple):
    """The moments of a batch that several processes hold parts of.

    Attributes
    ----------
    moments : BatchMoments
    single_value : bool
        All parts together have one value per channel.
    group : Group
    """

    moments: BatchMoments
    single_value: bool
    group: Group


class SharedGroup:
    """A process group that copies of a layer share, and that cannot be pickled."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise UnsupportedError(
            "a layer with a process group cannot be pickled, since the group belongs to running processes: save its "
            f"state_dict(), or set its process_group to None; got {self.group!r}"
        )


def refuse_transforms() -> None:
    """Raise `UnsupportedError` under a transform of torch.func."""
    if torch_internals.is_transformed():
        raise UnsupportedError(
            "sync=True exchanges statistics with other processes, which torch.func's transforms cannot do"
        )


def refuse_dtensor(x: Tensor) -> None:
    """Raise `UnsupportedError` for a DTensor, whose values are those of all processes of its mesh."""
    if ops.is_sharded(x):
        raise UnsupportedError(
            "a DTensor has the statistics of its whole mesh without sync=True, which takes parts of a batch; got "
            f"sync=True and a DTensor of shape {tuple(x.shape)}"
        )


def check_same_layer(label: str, group: Group, process_group: Any) -> None:
    """Raise `DistributedError` on all ranks unless all have the same label, which describes a layer.

    The labels go through the store, since a collective could meet that of another layer.
    """
    key = f"batchnorm/{group.name}/{_FIRST_BATCHES[group.name]}"
    _FIRST_BATCHES[group.name] += 1
    try:
        labels = all_gather_through_store(label, key, process_group)
    except DistributedError as error:
        raise DistributedError(f"{SAME_LAYERS}; {error}, while this one is at {label!r}") from error
    if len(set(labels)) > 1:
        at = "; ".join(f"rank {rank} of the group is at {theirs!r}" for rank, theirs in enumerate(labels))
        raise DistributedError(f"{SAME_LAYERS}; {at}")


def global_moments(x: Tensor, mask: Tensor | None, group: Group) -> GlobalMoments:
    """Return the moments of all ranks' parts x (N, C, *), by one collective."""
    local = ops.moments(x, mask)
    values = x.numel() // max(x.shape[1], 1)
    counts = local.mean.new_full((2,), values)
    if mask is not None:
        counts[1] = local.count
    gathered = gather_in_graph(torch.cat((local.mean, local.var, counts)), group)
    mean, var, counts = gathered.tensor_split((x.shape[1], 2 * x.shape[1]), 1)
    # Only a rank that has at most one value waits for the device to know the total; if the total is one, every rank is
    # such a rank. A graph cannot wait: there such a batch gives beta and updates no statistics.
    single_value = not torch.compiler.is_compiling() and values <= 1 and int(counts[:, 0].sum()) == 1
    return GlobalMoments(reference.pooled(BatchMoments(mean, var, counts[:, 1])), single_value, group)


def normalize(operands: Operands, running: Running, rule: Rule, batch: GlobalMoments) -> Normalized:
    """Do as `ops.normalize` for the whole batch, of which x (N, C, *) is this rank's part."""
    moments, _, group = batch
    correction = rule.correction
    if correction is None and rule.limits is not None:
        assert running.mean is not None
        assert running.var is not None
        correction = torch.stack(
            reference.renorm_correction(moments, running.mean, running.var, rule.eps, *rule.limits)
        )
    if correction is not None:
        weight, bias = ops.corrected(operands.weight, operands.bias, *correction)
        operands = operands._replace(weight=weight, bias=bias)
    fused = rule.activation if rule.activation in FUSED else None
    y = _NORMALIZE_PART(operands, moments, rule._replace(activation=fused), group=group.name)
    ops.running.update_(running, moments)
    if rule.activation != fused:
        y = ops.apply_activation(y, rule.activation, operands.mask)
    return Normalized(y, moments, correction)


_NORMALIZE_PART = operators.Operator(
    "normalize_part",
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor mean, Tensor var, Tensor count, "
    "float eps, str? activation, str group",
    "Tensor",
)
"""``y = activation(weight * x_hat + bias + residual)`` with the moments of all ranks' values."""


@_NORMALIZE_PART.implementation
def _normalize_part(given: dict[str, Any]) -> Tensor:
    operands, rule = operators.take(Operands, given), operators.take(Rule, given, training=False)
    return operators.forward(operands, Running(given["mean"], given["var"]), rule)[0]


@_NORMALIZE_PART.fake
def _fake_normalize_part(given: dict[str, Any]) -> Tensor:
    return torch.empty_like(native.ready(given["x"]))


def _save(ctx: Any, given: dict[str, Any], y: Tensor) -> None:
    x, weight, bias, residual, mask = operators.take(Operands, given)
    sign = ops.sign_of_activation(y, residual, given["activation"])
    ctx.save_for_backward(x, weight, bias, sign, mask, given["mean"], given["var"], given["count"])
    ctx.rule, ctx.group = operators.take(Rule, given, training=False), given["group"]
    ctx.residual_dtype = None if residual is None else residual.dtype


def _gradients(ctx: Any, needs: dict[str, bool], dy: Tensor) -> dict[str, Tensor | None]:
    x, weight, bias, y, mask, mean, var, count = ctx.saved_tensors
    rule = ctx.rule
    # In the dtype of the moments, so that the sums are exact, and present even if the layer has no gamma or beta.
    gamma = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
    beta = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    wanted = [needs["x"], True, True, needs["residual"] and y is not None]
    operands = Operands(x, gamma, beta, None, mask)
    dx, dgamma, dbeta, dresidual = operators.backward(dy, operands, torch.stack((mean, var)), rule, y=y, wanted=wanted)
    assert dgamma is not None
    assert dbeta is not None
    if needs["x"]:
        means = sum_in_graph(torch.stack((dgamma, dbeta)), ctx.group) / count.clamp(min=1)
        scale, shift = -gamma * torch.rsqrt(var + rule.eps) * means
        operands = Operands(x, scale, shift, dx, mask)
        dx, _ = operators.forward(operands, Running(mean, var), rule._replace(activation=None))
    if needs["residual"] and y is None:
        dresidual = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0.0)
    return {
        "x": dx,
        "weight": dgamma.to(weight.dtype) if needs["weight"] else None,
        "bias": dbeta.to(bias.dtype) if needs["bias"] else None,
        "residual": None if dresidual is None else dresidual.to(ctx.residual_dtype),
    }


_NORMALIZE_PART.gradients(_gradients, _save, once=True)
