"""Running statistics of a layer and of its domains: the names of their buffers, and one way to read all layers.

Every layer has a set of its own; `add_domains` gives it one more per domain. The buffers of a domain have its name as a
suffix, as in ``running_mean_real``. Only the skipped batches are counted per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm import torch_internals
from batchnorm.errors import warn
from batchnorm.kernels.records import Running
from batchnorm.nn import contexts, stock
from batchnorm.nn.contexts import LayerContext
from batchnorm.nn.layout import dimension_of_channels
from batchnorm.nn.options import Nonfinite
from batchnorm.nn.step_state import StepState
from batchnorm.torch_internals import TorchBatchNorm

__all__ = [
    "COUNTS",
    "STATISTICS",
    "RunningBuffers",
    "RunningSet",
    "active_set",
    "channels_second",
    "context_of",
    "epsilon_of",
    "filling",
    "is_filling",
    "is_frozen",
    "keeps_unbiased_variance",
    "running_layers",
    "running_sets",
]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers in the state dict, named as torch's."""

SKIPPED, SAMPLES = "skipped_batches", "samples_seen"
COUNTS = (SKIPPED, SAMPLES)
"""Counts that no state dict has: batches left out, and samples, which are counted where there are several processes.

No checkpoint fills them. So on the meta device they are None, and the layer begins them at 0 where it first needs them.
"""

_FILLING = ContextVar("filling", default=False)


@contextmanager
def filling() -> Iterator[None]:
    """Let buffers be set by their names: frozen ones too, and the layer's own even where a domain is active."""
    token = _FILLING.set(True)
    try:
        yield
    finally:
        _FILLING.reset(token)


def is_filling() -> bool:
    """Return whether `filling` is active in this thread."""
    return _FILLING.get()


def _named(kind: str, domain: str | None) -> str:
    return kind if domain is None else f"{kind}_{domain}"


class RunningBuffers(TorchBatchNorm):
    """The running statistics of a layer of ours: one set per domain, and one that is used outside of all domains."""

    channel_dim: int
    frozen_statistics: bool = False  # torch's constructor asks before ours has set it
    nonfinite: Nonfinite
    step_state: StepState
    unbiased: bool

    @property
    def active_domain(self) -> str | None:
        """The domain whose running statistics a forward in this thread or task would use."""
        return contexts.in_force(self.step_state.key, torch.compiler.is_compiling()).domain

    def epsilon(self) -> float:
        """Return eps. Asked for as an attribute, it stops tools that would compute torch's formula with it."""
        if "eps" in self.__dict__:
            return self.__dict__["eps"]  # type: ignore[no-any-return]
        return self.eps  # a subclass computes it

    @property
    def domain_names(self) -> list[str]:
        """The domains that have running statistics of their own."""
        prefix = f"{STATISTICS[0]}_"
        return [name.removeprefix(prefix) for name in self._buffers if name.startswith(prefix)]

    def running_statistics(self, domain: str | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the running mean, the running variance and the count of batches of a domain."""
        buffers = self._buffers
        if domain is None:
            return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return tuple(buffers[f"{kind}_{domain}"] for kind in STATISTICS)  # type: ignore[return-value]

    def running(self, domain: str | None, *, update: bool) -> Running:
        """Return a domain's running statistics as a record, with how a batch updates them."""
        return self.running_in(LayerContext(domain), update=update)

    def statistics_in(self, context: LayerContext) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the running mean, the running variance and the count of batches that a context uses."""
        mean, var, batches = self.running_statistics(context.domain)
        if context.adapted is not None:
            mean, var = context.adapted
        return mean, var, batches

    def running_in(self, context: LayerContext, *, update: bool) -> Running:
        """Return the running statistics that a context uses as a record, with how a batch updates them."""
        mean, var, batches = self.statistics_in(context)
        skipped = self._buffers[SKIPPED]
        if skipped is None and update and self.counts_skipped():
            skipped = self._new_count()  # the batch must be skipped even where the count cannot be kept
        return Running(mean, var, batches, self.momentum, skipped, self.unbiased, update)

    def counts_skipped(self) -> bool:
        """Return whether batches that are not finite are skipped, and counted."""
        return self.nonfinite == "skip" and self._buffers["running_mean"] is not None

    def register_counts(self) -> None:
        """Register the counts that no state dict has."""
        for name in COUNTS:
            self.register_buffer(name, None, persistent=False)
        self._begin_counts()

    def begin_counts(self) -> None:
        """Begin at 0 each count that is None, unless the running statistics are on the meta device.

        Within a mode, a transform or an export nothing is begun: the tensor would be one of theirs, and outlive them.
        """
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                self._begin_counts()
        elif torch_internals.count_dispatch_modes() == 0 and not torch_internals.is_transformed():
            with torch.inference_mode(False):  # training could not update tensors that were made in it
                self._begin_counts()

    def _begin_counts(self) -> None:
        buffers = self._buffers
        if buffers["running_mean"] is None:
            return
        wanted = [_named(SAMPLES, domain) for domain in (None, *self.domain_names)]
        if self.counts_skipped():
            wanted.append(SKIPPED)
        for name in wanted:
            if buffers.get(name) is None:
                count = self._new_count()
                if not count.is_meta:
                    buffers[name] = count

    def _new_count(self) -> Tensor:
        """Return a 0 that is stored as the running statistics are."""
        like = self._buffers["num_batches_tracked"]
        like = self._buffers["running_mean"] if like is None else like
        assert like is not None
        return like.new_zeros((), dtype=torch.int64)

    def drop_counts(self) -> None:
        """Set the counts on the meta device to None: nothing but the layer gives them a value."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta and name.startswith(COUNTS):
                self._buffers[name] = None

    def register_domain(self, domain: str) -> None:
        """Give a domain running statistics of its own, which begin as a copy of the layer's."""
        for kind in STATISTICS:
            values = self._buffers[kind]  # the attribute may be another domain's
            assert values is not None
            self.register_buffer(_named(kind, domain), values.clone())
        self.register_buffer(_named(SAMPLES, domain), None, persistent=False)
        self.begin_counts()

    def buffers_torch_lacks(self) -> list[str]:
        """Return the names of the buffers that torch's layers do not have: counts, and the statistics of domains."""
        return [name for name in self._buffers if name.startswith((*COUNTS, *(f"{kind}_" for kind in STATISTICS)))]

    def count_samples(self, samples: int) -> None:
        """Count the samples that update the running statistics: this process's weight in `pool_running_stats`."""
        seen = self._buffers[_named(SAMPLES, self.active_domain)]
        if seen is not None and not torch_internals.is_transformed():
            seen.add_(samples)

    # Changes that come from outside of the layer. They reach one set of running statistics, and none that is frozen.

    def reset_running_stats(self) -> None:
        """Set the running statistics of the active domain, or else the layer's own, to their initial values.

        Frozen ones stay as they are, with a warning.
        """
        if "step_state" not in self.__dict__:  # torch's constructor calls this
            super().reset_running_stats()
        elif self.track_running_stats and not self.keeps_frozen("running_mean", "reset_running_stats()"):
            domain = self.active_domain
            for values, initial in zip(self.running_statistics(domain), (0, 1, 0), strict=True):
                if values is not None:
                    values.fill_(initial)
            for count in (self._buffers[_named(SAMPLES, domain)], None if domain else self._buffers[SKIPPED]):
                if count is not None:
                    count.zero_()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer as torch's modules do, unless the name is one of frozen running statistics."""
        set_name = self.name_to_set(name)
        if set_name is not None:
            super().register_buffer(set_name, tensor, persistent)

    def name_to_set(self, name: str) -> str | None:
        """Return the name of the buffer that is meant by ``layer.name = ...``, of the active domain; None if frozen."""
        if not name.startswith(STATISTICS) or name not in self._buffers or is_filling():
            return name
        if "step_state" not in self.__dict__:
            return name
        name = _named(name, self.active_domain) if name in STATISTICS else name
        return None if self.keeps_frozen(name, f"setting {name}") else name

    def keeps_frozen(self, name: str, change: str) -> bool:
        """Return whether running statistics have values that are frozen, and warn once that the change is ignored."""
        values = self._buffers[name]
        if not self.frozen_statistics or is_filling() or values is None or values.is_meta or is_lazy(values):
            return False
        self.warn_of_frozen(change, "running statistics")
        return True

    def warn_of_frozen(self, change: str, part: str) -> None:
        """Warn, once per layer, that a change is ignored."""
        if not self.step_state.warned_of_frozen:
            self.step_state.warned_of_frozen = True
            warn(f"{change} leaves frozen {part} as they are; to change them, call batchnorm.unfreeze first")


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
        return self._stored("running_mean") if self.adapted is None else self.adapted[0]

    @property
    def var(self) -> Tensor:
        """The running variance (C,)."""
        return self._stored("running_var") if self.adapted is None else self.adapted[1]

    @property
    def batches(self) -> Tensor | None:
        """The count of batches."""
        return self.layer._buffers[_named("num_batches_tracked", self.domain)]

    @property
    def samples(self) -> Tensor | None:
        """The count of samples since the last pooling; None for torch's layers."""
        return self.layer._buffers.get(_named(SAMPLES, self.domain))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the buffers that a state dict has, by their names in the layer."""
        for kind in STATISTICS:
            name = _named(kind, self.domain)
            values = self.layer._buffers[name]
            if values is not None:
                yield name, values

    @torch.no_grad()
    def write(self, mean: Tensor, var: Tensor) -> None:
        """Write the stored running mean and variance in place."""
        self._stored("running_mean").copy_(mean)
        self._stored("running_var").copy_(var)

    def _stored(self, kind: str) -> Tensor:
        values = self.layer._buffers[_named(kind, self.domain)]
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


def context_of(layer: TorchBatchNorm) -> LayerContext:
    """Return the settings of contexts for a layer, ours or torch's, in this thread and task."""
    if isinstance(layer, RunningBuffers):
        return contexts.in_force(layer.step_state.key, torch.compiler.is_compiling())
    return stock.context_of(layer)


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
