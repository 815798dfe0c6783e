"""How far running statistics were from the measured ones before a change and after it, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from batchnorm.nn.running import active_set, epsilon_of
from batchnorm.reports import Table
from batchnorm.statistics.distance import symmetrized_kl
from batchnorm.statistics.layers import Layers, Statistics, variance_to_keep
from batchnorm.statistics.moments import Moments

__all__ = ["LayerChange", "change_table", "changes", "drift_summary", "layer_name"]


@dataclass(frozen=True)
class LayerChange:
    """The change of a layer's running statistics.

    Attributes
    ----------
    path : str
        Module path of the layer.
    count : int
        Number of values that each channel was measured on.
    before, after : float
        Drift: the symmetrized Kullback-Leibler divergence, KL(p || q) + KL(q || p), in nats, of the normal
        distributions with the running and with the measured statistics; the mean over channels.
    """

    path: str
    count: int
    before: float
    after: float


def changes(
    layers: Layers, measured: Mapping[str, Moments], before: Mapping[str, Statistics]
) -> tuple[LayerChange, ...]:
    """Return the changes from the running statistics before to those that the layers have now, in measured order."""

    def change(path: str, moments: Moments) -> LayerChange:
        layer = layers[path]
        running, kept = active_set(layer), variance_to_keep(layer, moments)
        eps = epsilon_of(layer)

        def drift(mean: Tensor, var: Tensor) -> float:
            return float(symmetrized_kl(mean.double(), var.double() + eps, moments.mean, kept + eps).mean())

        return LayerChange(path, int(moments.count), drift(*before[path]), drift(running.mean, running.var))

    return tuple(change(path, moments) for path, moments in measured.items())


def layer_name(path: str) -> str:
    """Return what reports call a layer: its module path, or "(the model)" where the model itself is the layer."""
    return path or "(the model)"


def change_table(layers: Sequence[LayerChange]) -> Table:
    """Return a table with a row per layer."""
    return Table(
        ["layer", "values", "drift before", "drift after"],
        [
            [layer_name(layer.path) for layer in layers],
            [f"{layer.count:,}" for layer in layers],
            [f"{layer.before:.3g}" for layer in layers],
            [f"{layer.after:.2g}" for layer in layers],
        ],
    )


def drift_summary(layers: Sequence[LayerChange]) -> str:
    """Return the number of layers and the largest drift among them, for a repr."""
    before, after = (max(getattr(layer, when) for layer in layers) for when in ("before", "after"))
    plural = "layer" if len(layers) == 1 else "layers"
    return f"{len(layers)} {plural}, largest drift {before:.2g} -> {after:.2g}"
