"""How far running statistics were from what was measured, and are now: what recalibration and adaptation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from batchnorm.statistics.distance import symmetrised_kl
from batchnorm.statistics.forwards import kept_variance, running_statistics
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["LayerChange", "changes", "named", "table"]


@dataclass(frozen=True)
class LayerChange:
    """What was done to a layer's running statistics.

    Attributes
    ----------
    path : str
        The layer's.
    count : int
        Values that each channel was measured on.
    before, after : float
        Distance of the running statistics from what was measured: symmetrised Kullback-Leibler divergence of the two
        normal distributions, in nats, the mean over channels.
    """

    path: str
    count: int
    before: float
    after: float


def changes(
    layers: Mapping[str, TorchBatchNorm],
    measured: Mapping[str, Moments],
    before: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[LayerChange, ...]:
    """From the running statistics as they were to those that the layers have now, in the order of the measurement."""

    def change(path: str, moments: Moments) -> LayerChange:
        layer = layers[path]
        kept = kept_variance(layer, moments)

        def distance(mean: Tensor, var: Tensor) -> float:
            return float(symmetrised_kl(mean.double(), var.double() + layer.eps, moments.mean, kept + layer.eps).mean())

        return LayerChange(path, int(moments.count), distance(*before[path]), distance(*running_statistics(layer)))

    return tuple(change(path, moments) for path, moments in measured.items())


def named(path: str) -> str:
    """What to call a layer; the model itself may be one."""
    return path or "(the model)"


def table(layers: Sequence[LayerChange], conclusion: str) -> str:
    """A line a layer, and one that concludes."""
    width = max(len("layer"), *(len(named(layer.path)) for layer in layers))
    lines = [f"{'layer':<{width}}  {'values':>12}  {'drift before':>12}  {'after':>9}"]
    lines += [
        f"{named(layer.path):<{width}}  {layer.count:>12,}  {layer.before:>12.3g}  {layer.after:>9.2g}"
        for layer in layers
    ]
    return "\n".join([*lines, conclusion])
