"""The two sides of a case: a layer of ours, and torch's own followed by what people write after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.bench.registry import OPERATIONS, Case
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["OURS", "Inputs", "copy", "inputs", "ours", "stock", "timed_call"]

EPS = 1e-5
OURS: dict[int, type[nn.Module]] = {
    2: BatchNorm1d,
    3: BatchNorm1d,
    4: BatchNorm2d,
    5: BatchNorm3d,
}
STOCK: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What both sides are given. x, dy and residual are of the case's dtype and layout, the rest is float32 (C,)."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    parameters: dict[str, Tensor]


def inputs(case: Case) -> Inputs:
    """Random, the same values for every layout of a shape."""
    generator = torch.Generator().manual_seed(0)

    def array(scale: float, shift: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator).mul_(scale).add_(shift)
        return values.to(case.torch_dtype).contiguous(memory_format=case.memory_format)

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
    layer.load_state_dict(given.parameters, strict=False)  # the counter of batches stays 0
    return layer.train(case.mode != "eval")


def ours(case: Case, given: Inputs) -> tuple[nn.Module, Forward]:
    """Our layer, and its call."""
    layer = _layer(OURS[len(case.shape)], case, given, activation=OPERATIONS[case.operation].activation)
    layer._warned_of_one_sample = True  # type: ignore[assignment]  # some cases are one sample on purpose
    x, residual = given.x, given.residual
    return layer, lambda: layer(x) if residual is None else layer(x, residual)


def stock(case: Case, given: Inputs, *, compiled: bool = False) -> tuple[nn.Module, Forward]:
    """Torch's layer, then an addition and relu out of place."""
    layer = _layer(STOCK[len(case.shape)], case, given)
    relu = OPERATIONS[case.operation].activation == "relu"

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y

    call = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward
    return layer, lambda: call(given.x, given.residual)


def timed_call(case: Case, given: Inputs, side: tuple[nn.Module, Forward]) -> Callable[[], object]:
    """What is timed of a side: its forward, in train with `torch.autograd.grad` after it."""
    layer, forward = side
    if case.mode != "train":
        return forward
    wanted = [given.x, *layer.parameters(), *([] if given.residual is None else [given.residual])]
    for tensor in wanted:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(forward(), wanted, given.dy)


def copy(given: Inputs) -> Callable[[], object]:
    """Read x, write as many bytes, into memory at hand."""
    x = given.x.detach()
    at_hand = x.clone()
    return lambda: at_hand.copy_(x)
