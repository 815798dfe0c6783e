"""The functions of one value that are recognized behind a normalization: activations, and constants."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Constants", "fitted_activations"]

ACTIVATIONS: tuple[nn.Module | None, ...] = (
    None,
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.SiLU(),
    nn.GELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.ReLU6(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.GELU("tanh"),
    nn.ELU(),
    nn.SELU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Hardtanh(),
)
"""The activations that are found in the forward of a layer, the most frequent first."""


class Constants(nn.Module):
    """Multiplies by a constant and adds another, as subclasses of batch normalization do."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """Return ``scale * x + shift``."""
        return self.scale * x + self.shift

    def extra_repr(self) -> str:
        """Return both constants."""
        return f"scale={self.scale:g}, shift={self.shift:g}"


def fitted_activations(z: Tensor, y: Tensor) -> list[nn.Module]:
    """Return the functions with parameters that lead from the extreme values of z (float64) to those of y.

    These are `Constants` and a leaky ReLU. The caller compares the other values.
    """
    (z0, z1), (y0, y1) = ([float(v.flatten()[at]) for at in (z.argmin(), z.argmax())] for v in (z, y))
    if not z0 < 0 < z1:
        return []
    scale, slope = (float(f"{ratio:.12g}") for ratio in ((y1 - y0) / (z1 - z0), y0 / z0))
    # The rounding of y0 is relative to values of some thousands, so the smallest value of z tells the shift.
    at = z.abs().argmin()
    shift = float(f"{float(y.flatten()[at] - scale * z.flatten()[at]):.10f}")
    return [Constants(scale, shift), nn.LeakyReLU(slope)]
