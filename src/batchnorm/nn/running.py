"""Running statistics as forwards use them, and one way to read those of all layers, ours and torch's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.kernels.records import Running
from batchnorm.nn.buffers import SAMPLES, SKIPPED, Buffers, context_of, named
from batchnorm.nn.contexts import LayerContext
from batchnorm.nn.filling import STATISTICS
from batchnorm.nn.layout import dimension_of_channels
from batchnorm.torch_internals import TorchBatchNorm

__all__ = [
    "RunningBuffers",
    "RunningSet",
    "active_set",
    "channels_second",
    "epsilon_of",
    "is_frozen",
    "keeps_unbiased_variance",
    "running_layers",
    "running_sets",
]


class RunningBuffers(Buffers):
    """The running statistics of a layer of ours, as a forward uses and updates them."""

    _eps: float
    channel_dim: int
    unbiased: bool

    def epsilon(self) -> float:
        """Return eps. Asked for as an attribute, it stops tools that would compute torch's formula with it."""
        return self._eps if "_eps" in self.__dict__ else self.eps  # a subclass may compute it

    def running(self, domain: str | None, *, update: bool) -> Running:
        """Return a domain's running statistics as a record, with how a batch updates them."""
        return self.running_in(LayerContext(domain), update=update)

    def statistics_in(self, context: LayerContext) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the running mean, the running variance and the count of batches that a context uses."""
        mean, var, batches = self.running_statistics(context.domain)
        if context.adapted is not None:
            mean, var = on_device_of(mean, context.adapted)
        return mean, var, batches

    def running_in(self, context: LayerContext, *, update: bool) -> Running:
        """Return the running statistics that a context uses as a record, with how a batch updates them."""
        mean, var, batches = self.statistics_in(context)
        skipped = self._buffers[SKIPPED]
        if skipped is None and update and self.counts_skipped():
            skipped = self.new_count()  # the batch must be skipped even where the count cannot be kept
        return Running(mean, var, batches, self.momentum, skipped, self.unbiased, update)


def on_device_of(stored: Tensor | None, adapted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return adapted statistics on the device of the stored ones, for a model that has been moved since."""
    mean, var = adapted
    return (
        adapted if stored is None or stored.device == mean.device else (mean.to(stored.device), var.to(stored.device))
    )


@dataclass(frozen=True)
class RunningSet:
    """One set of running statistics of a layer, ours or torch's. Reading it gives the buffers as they are now.

    Attributes
    ----------
    layer : Module
    domain : str or None
        None is the layer's own set, the only one that torch's layers have.
    adapted : tuple of (Tensor, Tensor) or None
        The mean and variance that are used instead of the stored ones.
    """

    layer: TorchBatchNorm
    domain: str | None = None
    adapted: tuple[Tensor, Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        """The running mean (C,)."""
        stored = self._stored("running_mean")
        return stored if self.adapted is None else on_device_of(stored, self.adapted)[0]

    @property
    def var(self) -> Tensor:
        """The running variance (C,)."""
        stored = self._stored("running_var")
        return stored if self.adapted is None else on_device_of(stored, self.adapted)[1]

    @property
    def batches(self) -> Tensor | None:
        """The count of batches."""
        return self.layer._buffers[named("num_batches_tracked", self.domain)]

    @property
    def samples(self) -> Tensor | None:
        """The count of samples since the last pooling; None for torch's layers."""
        return self.layer._buffers.get(named(SAMPLES, self.domain))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the buffers that a state dict has, by their names in the layer."""
        for kind in STATISTICS:
            name = named(kind, self.domain)
            values = self.layer._buffers[name]
            if values is not None:
                yield name, values

    @torch.no_grad()
    def write(self, mean: Tensor, var: Tensor) -> None:
        """Write the stored running mean and variance in place."""
        self._stored("running_mean").copy_(mean)
        self._stored("running_var").copy_(var)

    def _stored(self, kind: str) -> Tensor:
        values = self.layer._buffers[named(kind, self.domain)]
        assert values is not None
        return values


def running_layers(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """Return the layers with running statistics, ours and torch's, by path."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, TorchBatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }


def running_sets(layer: TorchBatchNorm) -> list[RunningSet]:
    """Return all sets of running statistics of a layer: its own, then those of its domains."""
    domains = layer.domain_names if isinstance(layer, RunningBuffers) else []
    return [RunningSet(layer, domain) for domain in (None, *domains)]


def active_set(layer: TorchBatchNorm) -> RunningSet:
    """Return the running statistics that a forward of the layer would use now, in this thread and task."""
    context = context_of(layer)
    return RunningSet(layer, context.domain, context.adapted)


def is_frozen(layer: TorchBatchNorm, model: nn.Module) -> bool:
    """Return whether training leaves the running statistics alone: by `freeze`, or torch's by eval mode of the layer.

    A layer of torch's that is in eval mode counts as frozen where the model around it is in training mode.
    """
    return layer.frozen_statistics if isinstance(layer, RunningBuffers) else model.training and not layer.training


def epsilon_of(layer: TorchBatchNorm) -> float:
    """Return eps of a layer, ours or torch's."""
    return layer.epsilon() if isinstance(layer, RunningBuffers) else layer.eps


def keeps_unbiased_variance(layer: TorchBatchNorm) -> bool:
    """Return whether the running variance is the unbiased one, as it always is in torch's layers."""
    return layer.unbiased if isinstance(layer, RunningBuffers) else True


def channels_second(layer: TorchBatchNorm, x: Tensor) -> Tensor:
    """Return the input of a layer as (N, C, *)."""
    dim = dimension_of_channels(x, layer.channel_dim) if isinstance(layer, RunningBuffers) else 1
    return x.movedim(dim, 1)
