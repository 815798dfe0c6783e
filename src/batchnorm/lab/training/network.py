"""Multilayer perceptrons without batch normalization, with it before, and with it after the nonlinearity.

One module holds several independent networks of one shape (`runs`), side by side in every tensor, so that they train in
the time of a few. No run affects another: each has its own weights and its own channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from batchnorm.lab.training.settings import Placement, check_init
from batchnorm.nn import BatchNorm1d

__all__ = ["ACTIVATIONS", "MLP", "batch_bounds"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


class _Linear(nn.Module):
    """Linear map of each run: (runs, N, inputs) -> (runs, N, outputs)."""

    bias: nn.Parameter | None

    def __init__(self, runs: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(runs, inputs, outputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(runs, 1, outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)


class _Hidden(nn.Module):
    """A linear map, the nonlinearity, and batch normalization before or after it."""

    def __init__(
        self,
        runs: int,
        inputs: int,
        outputs: int,
        *,
        activation: str,
        placement: Placement,
        momentum: float,
        eps: float,
    ) -> None:
        super().__init__()
        # Normalization would subtract a bias right before it; beta replaces that bias.
        self.linear = _Linear(runs, inputs, outputs, bias=placement != "before")
        self.norm = None
        if placement is not None:
            # The runs share a layer: one that diverges must not stop the updates of the others' running statistics.
            self.norm = BatchNorm1d(runs * outputs, eps=eps, momentum=momentum, nonfinite="propagate")
        self.activation = ACTIVATIONS[activation]()
        self.placement = placement

    def _normalize(self, z: Tensor) -> Tensor:
        if self.norm is None:
            return z
        runs, rows, units = z.shape
        z = z.transpose(0, 1).reshape(rows, runs * units)
        return self.norm(z).view(rows, runs, units).transpose(0, 1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        if self.placement == "before":
            z = self._normalize(z)
        h: Tensor = self.activation(z)
        return self._normalize(h) if self.placement == "after" else h


class MLP(nn.Module):
    """Independent networks (`runs`) of hidden layers, with or without batch normalization, and a linear output layer.

    Parameters
    ----------
    inputs, outputs : int
        Number of features, and of values that a network returns.
    hidden : sequence of int
        Units of each hidden layer.
    activation : str
        "identity", "sigmoid", "tanh" or "relu".
    placement : "before", "after" or None
        Position of batch normalization relative to the nonlinearity. With "before" the preceding linear map has no
        bias.
    runs : int
        Number of independent networks.
    momentum, eps : float
        Options of the batch normalization layers, as in torch.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: str = "relu",
        placement: Placement = "before",
        runs: int = 1,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.runs = runs
        self.activation = activation
        sizes = [inputs, *hidden]
        self.hidden = nn.ModuleList(
            _Hidden(runs, size, units, activation=activation, placement=placement, momentum=momentum, eps=eps)
            for size, units in itertools.pairwise(sizes)
        )
        self.output = _Linear(runs, sizes[-1], outputs, bias=True)

    @torch.no_grad()
    def initialize(self, generators: Sequence[torch.Generator], init: str | None = None, scale: float = 1.0) -> None:
        """Draw the weights of run i from generators[i], input layer first; biases stay 0.

        ``init`` is "xavier" (Glorot & Bengio 2010, uniform), "he" (He et al. 2015, uniform) or "gaussian:SD"; None
        means He for relu and Xavier otherwise. ``scale`` multiplies the weights. The draws depend on the shapes alone,
        so that networks with different placements start from the same weights.
        """
        rule = init or ("he" if self.activation == "relu" else "xavier")
        check_init(rule)
        for linear in self.linears():
            for weight, generator in zip(linear.weight, generators, strict=True):
                drawn = torch.empty_like(weight.t(), memory_format=torch.contiguous_format)
                if rule == "xavier":
                    nn.init.xavier_uniform_(drawn, generator=generator)
                elif rule == "he":
                    nn.init.kaiming_uniform_(drawn, nonlinearity="relu", generator=generator)
                else:
                    nn.init.normal_(drawn, std=float(rule.removeprefix("gaussian:")), generator=generator)
                weight.copy_(scale * drawn.t())

    def linears(self) -> list[_Linear]:
        """Return all linear maps, input side first."""
        return [*(block.linear for block in self.hidden), self.output]  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (runs, N, outputs) for inputs (runs, N, inputs), or (N, inputs) that all runs share."""
        x = x.expand(self.runs, *x.shape) if x.dim() == 2 else x
        for block in self.hidden:
            x = block(x)
        return self.output(x)  # type: ignore[no-any-return]

    def run_state(self) -> list[Tensor]:
        """Return every parameter and running statistic as a view of shape (runs, numbers per run)."""
        state = [*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]
        return [tensor.detach().view(self.runs, -1) for tensor in state]


def batch_bounds(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """Cut rows into consecutive mini-batches; a last one of a single row joins the previous one.

    >>> batch_bounds(7, 3)
    [(0, 3), (3, 7)]
    """
    starts = list(range(0, rows, batch_size))
    if len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))
