"""Virtual batches: the chunks of a batch that have statistics of their own, and the reference applied to each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments, Operands, Rule

__all__ = [
    "backward",
    "check_chunks",
    "corrected",
    "forward",
    "moments_of_chunks",
    "moments_shape",
    "pack",
    "pool",
    "unpack",
]


def check_chunks(x: Tensor, rule: Rule) -> None:
    """Raise `InputError` unless the chunks use up the samples of x."""
    if rule.chunks != 1 and not 0 < rule.chunk * (rule.chunks - 1) < x.shape[0]:
        raise InputError(
            f"chunks={rule.chunks} and chunk={rule.chunk} must divide the samples of x, with at least one sample in "
            f"the last chunk; got shape {tuple(x.shape)}"
        )


def _slices(x: Tensor, rule: Rule) -> Sequence[slice | None]:
    """Return the samples of each chunk; None stands for all of x."""
    if rule.chunks == 1:
        return [None]
    ends = [rule.chunk * (i + 1) for i in range(rule.chunks - 1)] + [x.shape[0]]
    return [slice(rule.chunk * i, end) for i, end in enumerate(ends)]


def _part(values: Tensor, samples: slice | None) -> Tensor:
    return values if samples is None else values[samples]


def _part_of_mask(mask: Tensor | None, samples: slice | None) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else _part(mask, samples)


def _part_of_operands(operands: Operands, samples: slice | None) -> Operands:
    residual = None if operands.residual is None else _part(operands.residual, samples)
    return operands._replace(
        x=_part(operands.x, samples), residual=residual, mask=_part_of_mask(operands.mask, samples)
    )


def _correction_of(rule: Rule, chunk: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if rule.correction is None:
        return None, None
    correction = rule.correction.view(2, rule.chunks, -1)
    return correction[0, chunk], correction[1, chunk]


def corrected(
    weight: Tensor | None, bias: Tensor | None, r: Tensor | None, d: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``weight * (r * x_hat + d) + bias`` as a scale and a shift of x_hat."""
    if r is None or d is None:
        return weight, bias
    scale, shift = (r, d) if weight is None else (weight.to(r.dtype) * r, weight.to(d.dtype) * d)
    return scale, shift if bias is None else shift + bias.to(shift.dtype)


def moments_of_chunks(x: Tensor, mask: Tensor | None, rule: Rule) -> list[BatchMoments]:
    """Return the moments of each chunk, computed by the reference."""
    return [reference.moments(_part(x, at), _part_of_mask(mask, at)) for at in _slices(x, rule)]


def moments_shape(x: Tensor, rule: Rule) -> tuple[int, ...]:
    """Return the shape of packed moments: (2, C), or (2, chunks, C) for virtual batches."""
    return (2, x.shape[1]) if rule.chunks == 1 else (2, rule.chunks, x.shape[1])


def pack(batches: Sequence[BatchMoments]) -> Tensor:
    """Return mean and variance of all chunks in one tensor, as the native kernels give them."""
    each = batches[0] if len(batches) == 1 else reference.stacked(batches)
    return torch.stack((each.mean, each.var))


def unpack(moments: Tensor, x: Tensor, mask: Tensor | None, rule: Rule) -> list[BatchMoments]:
    """Return the moments of each chunk, with its count of values, from packed ones."""
    if rule.chunks == 1:
        return [BatchMoments(moments[0], moments[1], reference.count_of(x, mask))]
    return [
        BatchMoments(moments[0, i], moments[1, i], reference.count_of(_part(x, at), _part_of_mask(mask, at)))
        for i, at in enumerate(_slices(x, rule))
    ]


def pool(moments: Tensor, x: Tensor, mask: Tensor | None, rule: Rule) -> BatchMoments:
    """Return the moments of the whole batch from packed ones; a compiled graph keeps the number of samples open."""
    if rule.chunks == 1:
        return BatchMoments(moments[0], moments[1], reference.count_of(x, mask))
    samples = x.shape[0]
    # Made of new_ones and cumsum, which give a DTensor where the moments are one, as arange does not.
    ones = moments.new_ones(samples)
    if mask is None:
        per_sample = ones * x.shape[2:].numel()
    else:
        per_sample = mask.expand(samples, *x.shape[2:]).reshape(samples, -1).sum(1).to(moments.dtype)
    chunk_of_sample = ((ones.cumsum(0) - 1).long() // rule.chunk).clamp(max=rule.chunks - 1)
    chunk = moments.new_ones(rule.chunks).cumsum(0).long() - 1
    counts = torch.where(chunk.unsqueeze(1) == chunk_of_sample, per_sample, 0.0).sum(1)
    return reference.pooled(BatchMoments(moments[0], moments[1], counts))


def forward(operands: Operands, batches: Sequence[BatchMoments], rule: Rule) -> Tensor:
    """Return the output, computed by the reference chunk by chunk with the moments of each."""
    outputs = []
    for i, at in enumerate(_slices(operands.x, rule)):
        scale, shift = corrected(operands.weight, operands.bias, *_correction_of(rule, i))
        part = _part_of_operands(operands, at)._replace(weight=scale, bias=shift)
        outputs.append(reference.forward(part, batches[i], rule))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def backward(
    dy: Tensor, operands: Operands, batches: Sequence[BatchMoments], rule: Rule, *, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias, dresidual), computed by the reference chunk by chunk."""
    parts = []
    for i, at in enumerate(_slices(operands.x, rule)):
        r, d = _correction_of(rule, i)
        scale, shift = corrected(operands.weight, operands.bias, r, d)
        part = _part_of_operands(operands, at)._replace(weight=scale, bias=shift)
        part_of_y = None if y is None else _part(y, at)
        dx, dscale, dshift, dresidual = reference.backward(_part(dy, at), part, batches[i], rule, y=part_of_y)
        dweight = dscale if r is None or d is None else r * dscale + d * dshift
        parts.append((dx, dweight, dshift, dresidual))
    if len(parts) == 1:
        return parts[0]
    dxs, dweights, dbiases, dresiduals = zip(*parts, strict=True)
    return torch.cat(dxs), torch.stack(dweights).sum(0), torch.stack(dbiases).sum(0), torch.cat(dresiduals)
