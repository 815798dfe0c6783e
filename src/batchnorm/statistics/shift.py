"""Test for covariate shift that needs only a model's stored statistics, not the data they come from.

In units of the stored statistics, ``u = (x - mean) / sqrt(var + eps)``, every channel has ``E[u] = 0`` and
``E[u^2] = var / (var + eps)`` if nothing has shifted. The test asks whether the means of u and u^2, two numbers per
channel, have these values. Values of one sample (pixels, positions) depend on each other, and so do channels; the null
distribution therefore comes from whole samples: the means vary as ``1/n sum_i e_i (f_i - mean f)``, where f_i is what
sample i adds and e_i are normal random numbers, the same for all channels and layers (multiplier bootstrap;
Chernozhukov, Chetverikov & Kato 2013). The statistic of a layer is the mean square of its two numbers per channel,
divided by its expected value under the null distribution; the statistic of the model is the sum over layers. The
p-value of a layer is adjusted for the number of layers by comparing its statistic with the largest among them
(Westfall & Young 1993).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.reports import Block, Report, Table
from batchnorm.statistics.batches import BatchReader, Device, Forward, Samples
from batchnorm.statistics.block_sums import BlockSums, InputSums, standardization, sum_inputs
from batchnorm.statistics.changes import layer_name
from batchnorm.statistics.distance import symmetrized_kl, wasserstein
from batchnorm.statistics.layers import loaded, running_layers
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["LayerShift", "Shift", "detect_shift"]

DRAWS = 1000
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class LayerShift:
    """Distances of a layer's inputs from its stored statistics, and the p-value of the test.

    Attributes
    ----------
    path : str
        Module path of the layer.
    kl : float
        Symmetrized Kullback-Leibler divergence of the two normal distributions, KL(p || q) + KL(q || p), in nats; the
        mean over channels.
    wasserstein : float
        2-Wasserstein distance of the two, in units of the stored standard deviation; the mean over channels.
    effective_samples : float
        Number of independent values that would give each channel's mean the same standard error; the median over
        channels. It is at most about one per sample for (N, C), and one per position for other inputs.
    p_value : float
        Probability of such a statistic without a shift in this layer, adjusted for the number of layers.
    """

    path: str
    kl: float
    wasserstein: float
    effective_samples: float
    p_value: float


@dataclass(frozen=True, repr=False)
class Shift(Report):
    """The result of `detect_shift`.

    Attributes
    ----------
    layers : tuple of LayerShift
        In the order in which they run.
    samples : int
        Number of samples tested.
    reference_samples : int
        Number of samples of the reference data, or the number that the stored statistics count as.
    against : {"reference", "statistics"}
        Whether the samples were compared with reference data or with the stored statistics.
    p_value : float
        Probability of such a statistic without a shift in any layer.
    alpha : float
        Accepted probability of a false alarm.
    """

    layers: tuple[LayerShift, ...]
    samples: int
    reference_samples: int
    against: Literal["reference", "statistics"]
    p_value: float
    alpha: float

    @property
    def shifted(self) -> bool:
        """Whether the p-value is at most ``alpha``."""
        return self.p_value <= self.alpha

    @property
    def verdict(self) -> str:
        """The conclusion in words."""
        return "shifted" if self.shifted else "no shift shown"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and ``shifted`` as values that JSON has."""
        return super().to_dict() | {"shifted": self.shifted}

    def _summary(self) -> str:
        return f"{self.verdict}, {self.samples:,} samples, p {self._p_text()}"

    def _p_text(self) -> str:
        return f"{'at most ' if self.p_value <= 1 / (DRAWS + 1) else ''}{self.p_value:.2g}"

    def _blocks(self) -> Iterable[Block]:
        yield Table(
            ["layer", "KL", "Wasserstein", "effective", "p"],
            [
                [layer_name(layer.path) for layer in self.layers],
                [f"{layer.kl:.3g}" for layer in self.layers],
                [f"{layer.wasserstein:.3g}" for layer in self.layers],
                [f"{layer.effective_samples:,.0f}" for layer in self.layers],
                [f"{layer.p_value:.2g}" for layer in self.layers],
            ],
        )
        stored = self.against == "statistics"
        against = "the stored statistics" if stored else f"{self.reference_samples:,} reference samples"
        yield f"{self.verdict}: {self.samples:,} samples against {against}, p {self._p_text()}"

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(layer) for layer in self.layers]


def detect_shift(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: Iterable[Any] | None = None,
    forward: Forward | None = None,
    device: Device = None,
    samples: Samples = None,
    alpha: float = 0.05,
    reference_samples: int = 256,
    max_samples: int | None = None,
    seed: int = 0,
) -> Shift:
    """Test whether data has shifted from the data that a model was trained on, by its stored statistics alone.

    Every batch normalization layer keeps the mean and variance of its inputs in training. The model is run in eval
    mode on the new data; no label is needed. The report gives the distances of the layers' inputs from the stored
    statistics, and p-values that tell whether they exceed chance, for every layer and for the model.

    The stored statistics are not exact: they come from the last training batches, while the weights changed, and from
    the very data that the weights were fitted to. They count as the statistics of ``reference_samples`` samples, so
    that differences which so few samples could show by chance raise no alarm. After `recalibrate`, this may be the
    number of samples that it used. With ``reference`` data that the model was not trained on, the new data is compared
    with that data, and ``reference_samples`` has no effect.

    Parameters
    ----------
    model : Module
        A model with layers of ours or torch's that keep running statistics. It is left unchanged.
    loader : iterable
        Batches, as for `recalibrate`, with at least 8 samples. It is iterated over once, in memory that does not grow
        with the data.
    reference : iterable or None
        Batches without a shift.
    forward : callable or None
        ``forward(model, batch)``, for batches that are not tensors, tuples, lists or mappings.
    device, samples
        As for `recalibrate`. Where a layer is given several rows per sample (positions, nodes), those of a sample are
        taken to be consecutive and as many as those of the others in the batch.
    alpha : float
        Accepted probability of a false alarm.
    reference_samples : int
        Number of samples that the stored statistics count as, without ``reference``.
    max_samples : int or None
        End the pass after this number of samples.
    seed : int
        Seed of the bootstrap. It makes 1,000 draws, so no p-value is below 1/1001.

    Returns
    -------
    Shift
        Distances and p-values; ``shifted`` is the verdict, and printing the report shows a table.

    Raises
    ------
    InputError
        The model has no layer with running statistics, there are fewer than 8 samples, inputs are not finite, alpha is
        not a probability, ``reference_samples`` or ``max_samples`` is below 1, or the samples of a batch cannot be
        counted.
    InputTypeError
        Batches need ``forward`` or ``samples``.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> layer = bn.BatchNorm1d(3)
    >>> report = bn.recalibrate(layer, rows[:1000].split(100))
    >>> bn.detect_shift(layer, rows[1000:1100].split(50)).shifted
    False
    >>> print(bn.detect_shift(layer, (rows[1000:1100] + 1).split(50)))
    layer            KL   Wasserstein   effective       p
    (the model)   0.917         0.944          99   0.001
    shifted: 100 samples against the stored statistics, p at most 0.001
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be between 0 and 1; got {alpha!r}")
    for name, value in (("reference_samples", reference_samples), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1; got {value!r}")
    model = loaded(model)
    layers = running_layers(model)
    reader = BatchReader(model, forward, device, samples)
    found = sum_inputs(reader, layers, loader, name="the loader", max_samples=max_samples)
    known = None if reference is None else sum_inputs(reader, layers, reference, name="the reference")
    count = reference_samples if known is None else known.samples
    test = _bootstrap(found, known, count, seed)
    return Shift(
        layers=tuple(_layer_shift(path, layers[path], found.layers[path], p) for path, p in test.of_layers.items()),
        samples=found.samples,
        reference_samples=count,
        against="statistics" if known is None else "reference",
        p_value=test.of_model,
        alpha=alpha,
    )


class _PValues(NamedTuple):
    of_layers: dict[str, float]
    of_model: float


def _bootstrap(found: InputSums, known: InputSums | None, count: int, seed: int) -> _PValues:
    """Compare the sums with the known ones, or with 0, which stand for ``count`` samples."""
    paths = [path for path in found.layers if known is None or path in known.layers]
    null = found if known is None else known
    blocks = len(next(iter(null.layers.values())).counts)
    normal = torch.randn(DRAWS, blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    observed, draws = [], []
    for path in paths:
        difference = found.layers[path].mean() - (0 if known is None else known.layers[path].mean())
        under_null = null.layers[path].null_draws(normal)
        under_null *= null.samples * (1 / found.samples + 1 / count)
        expected = under_null.mean().clamp(min=TINY)
        observed.append(difference.square().mean() / expected)
        draws.append(under_null / expected)
    of_layers, of_draws = torch.stack(observed), torch.stack(draws)
    largest = of_draws.max(0).values
    return _PValues(
        {path: _p_value(statistic, largest) for path, statistic in zip(paths, of_layers, strict=True)},
        _p_value(of_layers.sum(), of_draws.sum(0)),
    )


def _p_value(observed: Tensor, draws: Tensor) -> float:
    return (int((draws >= observed).sum()) + 1) / (len(draws) + 1)


def _layer_shift(path: str, layer: TorchBatchNorm, found: BlockSums, p_value: float) -> LayerShift:
    """Return the distances, in units in which the stored mean is 0 and the stored variance, with eps, is 1."""
    stored = standardization(layer)[2]
    u, v = found.mean().tensor_split(2)
    var = (v + stored - u * u).clamp(min=0)
    zero = torch.zeros_like(u)
    kl = symmetrized_kl(u, var + (1 - stored), zero, zero + 1).mean()
    effective = (var / found.squared_error().clamp(min=TINY)).median()
    return LayerShift(path, kl.item(), wasserstein(u, var, zero, stored).mean().item(), effective.item(), p_value)
