"""The two sides of a case: our layer, and torch's layer followed by the addition and the ReLU that users write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.bench.registry import OPERATIONS, Case
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "DTYPES",
    "OURS",
    "STOCK",
    "Inputs",
    "Side",
    "copy",
    "inputs",
    "memory_format",
    "ours",
    "stock",
    "timed_call",
]

EPS = 1e-5
OURS: dict[int, type[nn.Module]] = {
    2: BatchNorm1d,
    3: BatchNorm1d,
    4: BatchNorm2d,
    5: BatchNorm3d,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
STOCK: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

Forward = Callable[[], Tensor]
Side = tuple[nn.Module, Forward]
"""A layer, and the function that calls it on the inputs of a case."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of both sides: x, dy and residual have the dtype and layout of the case, the parameters are float32."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    parameters: dict[str, Tensor]


def memory_format(case: Case) -> torch.memory_format:
    """Return torch's memory format for the layout of a case."""
    return torch.contiguous_format if case.layout == "contiguous" else CHANNELS_LAST[len(case.shape)]


def inputs(case: Case) -> Inputs:
    """Return random inputs, which have the same values for every layout of a shape."""
    generator = torch.Generator().manual_seed(0)

    def array(scale: float, shift: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator).mul_(scale).add_(shift)
        return values.to(DTYPES[case.dtype]).contiguous(memory_format=memory_format(case))

    def channels(low: float, high: float) -> Tensor:
        return torch.empty(case.shape[1]).uniform_(low, high, generator=generator)

    parameters = {
        "weight": channels(0.5, 1.5),
        "bias": channels(-0.5, 0.5),
        "running_mean": channels(0.5, 1.5),
        "running_var": channels(2.0, 6.0),
    }
    x, dy = array(2.0, 1.0), array(1.0, 0.0)
    return Inputs(x, dy, array(1.0, 0.0) if OPERATIONS[case.operation].residual else None, parameters)


def _layer(kind: type[nn.Module], case: Case, given: Inputs, **options: str | None) -> nn.Module:
    layer = kind(case.shape[1], eps=EPS, **options)
    layer.load_state_dict(given.parameters, strict=False)  # the parameters have no count of batches
    return layer.train(case.mode != "eval")


def ours(case: Case, given: Inputs) -> Side:
    """Return our side."""
    layer = _layer(OURS[len(case.shape)], case, given, activation=OPERATIONS[case.operation].activation)
    x, residual = given.x, given.residual
    return layer, lambda: layer(x) if residual is None else layer(x, residual)


def stock(case: Case, given: Inputs, *, compiled: bool = False) -> Side:
    """Return torch's side: its layer, then an addition and a ReLU out of place."""
    layer = _layer(STOCK[len(case.shape)], case, given)
    relu = OPERATIONS[case.operation].activation == "relu"

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y

    call = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward
    return layer, lambda: call(given.x, given.residual)


def timed_call(case: Case, given: Inputs, side: Side) -> Callable[[], object]:
    """Return the function that is timed: forward, followed in mode "train" by `torch.autograd.grad`."""
    layer, forward = side
    if case.mode != "train":
        return forward
    wanted = [given.x, *layer.parameters(), *([] if given.residual is None else [given.residual])]
    for tensor in wanted:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(forward(), wanted, given.dy)


def copy(given: Inputs) -> Callable[[], object]:
    """Return a function that copies x into memory that is already allocated."""
    x = given.x.detach()
    target = x.clone()
    return lambda: target.copy_(x)
