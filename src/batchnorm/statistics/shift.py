"""Covariate shift, told from a model's stored statistics: how far its layers' inputs are from them, and is it chance.

In units of the stored statistics, ``u = (x - mean) / sqrt(var + eps)``, every channel has ``E[u] = 0`` and
``E[u^2] = var / (var + eps)`` where nothing has shifted. What is tested is whether the means of u and u^2, two numbers
a channel, are these. Values of one sample (pixels, positions) depend on each other, and so do channels; chance is
therefore taken from samples as wholes: the means vary as ``1/n sum_i e_i (f_i - mean f)``, with f_i what sample i adds
and e_i normal random numbers, the same for all channels and layers (the multiplier bootstrap; Chernozhukov, Chetverikov
& Kato 2013). The statistic of a layer is the mean square of its two numbers a channel, in units of what chance gives
it; that of the model is their sum. A layer's p-value is adjusted for the number of layers by comparing it with the
greatest among them (Westfall & Young 1993).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.statistics.changes import named
from batchnorm.statistics.distance import symmetrised_kl, wasserstein
from batchnorm.statistics.forwards import Forward, running_layers, unwrapped
from batchnorm.statistics.units import Units, scaled_statistics, seen_by
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["LayerShift", "Shift", "detect_shift"]

DRAWS = 1000
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LayerShift:
    """How far the inputs of a layer are from its stored statistics.

    Attributes
    ----------
    path : str
        The layer's.
    kl : float
        Symmetrised Kullback-Leibler divergence of the two normal distributions, in nats, the mean over channels.
    wasserstein : float
        Their 2-Wasserstein distance in units of the stored standard deviation, the mean over channels.
    effective_samples : float
        Independent values that would give each channel's mean the same standard error; the median over channels. Up to
        one a sample in (N, C), up to one a position elsewhere.
    p_value : float
        Of no shift in this layer, adjusted for the number of layers.
    """

    path: str
    kl: float
    wasserstein: float
    effective_samples: float
    p_value: float


@dataclass(frozen=True)
class Shift:
    """What `detect_shift` found; prints as a table.

    Attributes
    ----------
    layers : tuple of LayerShift
        In the order in which they run.
    samples : int
        Of the data.
    compared_with : int
        Samples that what it was compared with rests on: the clean data's, or those the stored statistics count as.
    clean : bool
        Whether it was compared with clean data.
    p_value : float
        Of no shift in any layer.
    alpha : float
        The chance of a false alarm that was accepted.
    """

    layers: tuple[LayerShift, ...]
    samples: int
    compared_with: int
    clean: bool
    p_value: float
    alpha: float

    @property
    def shifted(self) -> bool:
        """Whether no shift is less likely than ``alpha``."""
        return self.p_value <= self.alpha

    def __str__(self) -> str:
        width = max(len("layer"), *(len(named(layer.path)) for layer in self.layers))
        lines = [f"{'layer':<{width}}  {'KL':>9}  {'Wasserstein':>11}  {'effective':>9}  {'p':>6}"]
        lines += [
            f"{named(layer.path):<{width}}  {layer.kl:>9.3g}  {layer.wasserstein:>11.3g}  "
            f"{layer.effective_samples:>9,.0f}  {layer.p_value:>6.2g}"
            for layer in self.layers
        ]
        against = f"{self.compared_with:,} clean samples" if self.clean else "the stored statistics"
        said = "shifted" if self.shifted else "no shift shown"
        least = "at most " if self.p_value <= 1 / (DRAWS + 1) else ""
        lines.append(f"{said}: {self.samples:,} samples against {against}, p {least}{self.p_value:.2g}")
        return "\n".join(lines)


def detect_shift(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    clean: Iterable[Any] | None = None,
    forward: Forward | None = None,
    alpha: float = 0.05,
    source_samples: int = 256,
    max_samples: int | None = None,
    seed: int = 0,
) -> Shift:
    """Tell whether data has shifted from what a trained model has seen, by its stored statistics alone.

    Every batch normalization layer keeps mean and variance of its inputs in training. The model is run in eval mode on
    the new data; no label is needed. How far the layers' inputs are from the stored statistics is given as distances,
    and whether that is more than chance as p-values, of every layer and of the model.

    The stored statistics are no exact ones: they are those of the last batches, seen while the weights moved, and of
    the data that the weights were fitted to. They count as those of ``source_samples`` samples, so that differences
    which so few could show by themselves are no alarm. After `recalibrate` it may be the number of samples that it saw.
    With ``clean`` data that the model was not trained on, the new data is compared with that, and ``source_samples``
    counts for nothing.

    Parameters
    ----------
    model : Module
        With layers of ours or torch's that keep running statistics. Nothing of it is changed.
    loader : iterable
        Of batches, as for `recalibrate`; 8 samples at least. It is gone through once; memory does not grow with it.
    clean : iterable or None
        Such batches without a shift.
    forward : callable or None
        ``forward(model, batch)`` for batches that are no tensors, tuples, lists or mappings.
    alpha : float
        The chance of a false alarm to accept.
    source_samples : int
        Samples that the stored statistics count as, without ``clean``.
    max_samples : int or None
        End the pass after as many samples.
    seed : int
        Of the random numbers of the bootstrap; 1,000 draws, so that no p-value is below 1/1001.

    Returns
    -------
    Shift
        Distances and p-values; print it.

    Raises
    ------
    InputError
        No layer with running statistics, fewer than 8 samples, inputs that are not finite, an alpha that is no
        probability, a batch without ``forward``.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> layer = bn.BatchNorm1d(3)
    >>> report = bn.recalibrate(layer, rows[:1000].split(100))
    >>> bn.detect_shift(layer, rows[1000:1100].split(50)).shifted
    False
    >>> print(bn.detect_shift(layer, (rows[1000:1100] + 1).split(50)))
    layer               KL  Wasserstein  effective       p
    (the model)      0.459        0.944         99   0.001
    shifted: 100 samples against the stored statistics, p at most 0.001
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1; got {alpha!r}")
    for name, value in (("source_samples", source_samples), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1; got {value!r}")
    model = unwrapped(model)
    layers = running_layers(model)
    found = seen_by(model, layers, loader, forward, max_samples, "the loader")
    reference = None if clean is None else seen_by(model, layers, clean, forward, None, "the clean data")
    paths = [path for path in found.units if reference is None or path in reference.units]
    spread, compared_with = (found, source_samples) if reference is None else (reference, reference.samples)
    units = len(next(iter(spread.units.values())).counts)
    normal = torch.randn(DRAWS, units, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    observed, chance = [], []
    for path in paths:
        away = found.units[path].mean() - (0 if reference is None else reference.units[path].mean())
        expected = spread.units[path].by_chance(normal)
        expected *= spread.samples * (1 / found.samples + 1 / compared_with)
        usual = expected.mean().clamp(min=TINY)
        observed.append(away.square().mean() / usual)
        chance.append(expected / usual)
    of_layers, of_draws = torch.stack(observed), torch.stack(chance)
    greatest = of_draws.max(0).values
    return Shift(
        tuple(
            _layer(path, layers[path], found.units[path], _p_value(one, greatest))
            for path, one in zip(paths, of_layers, strict=True)
        ),
        found.samples,
        compared_with,
        reference is not None,
        _p_value(of_layers.sum(), of_draws.sum(0)),
        alpha,
    )


def _p_value(observed: Tensor, draws: Tensor) -> float:
    return (int((draws >= observed).sum()) + 1) / (len(draws) + 1)


def _layer(path: str, layer: TorchBatchNorm, found: Units, p_value: float) -> LayerShift:
    """The distances, in the units in which the stored mean is 0 and the stored variance, with eps, 1."""
    stored = scaled_statistics(layer)[2]
    u, v = found.mean().tensor_split(2)
    var = (v + stored - u * u).clamp(min=0)
    zero = torch.zeros_like(u)
    kl = symmetrised_kl(u, var + (1 - stored), zero, zero + 1).mean()
    effective = (var / found.error().clamp(min=TINY)).median()
    return LayerShift(path, kl.item(), wasserstein(u, var, zero, stored).mean().item(), effective.item(), p_value)
