"""The buffers of a layer: their names, the counts among them, and their protection from changes by other code.

Every layer has a set of running statistics of its own; `add_domains` gives it one more per domain, whose buffers have
its name as a suffix, as in ``running_mean_real``. Only the skipped batches are counted per layer.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm import torch_internals
from batchnorm.errors import warn
from batchnorm.nn import contexts, stock
from batchnorm.nn.contexts import LayerContext
from batchnorm.nn.filling import STATISTICS, is_filling
from batchnorm.nn.options import Nonfinite
from batchnorm.nn.step_state import StepState
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["COUNTS", "SAMPLES", "SKIPPED", "Buffers", "context_of", "is_narrow", "named"]

SKIPPED, SAMPLES = "skipped_batches", "samples_seen"
COUNTS = (SKIPPED, SAMPLES)
"""Counts that no state dict has: batches left out, and samples, which are counted where there are several processes.

No checkpoint fills them. So on the meta device they are None, and the layer begins them at 0 where it first needs them.
"""


def named(kind: str, domain: str | None) -> str:
    """Return the name of a buffer of a domain; None is the layer's own set."""
    return kind if domain is None else f"{kind}_{domain}"


def is_narrow(values: Tensor) -> bool:
    """Return whether running statistics of this dtype would stop changing, because its steps are too coarse."""
    return values.is_floating_point() and values.dtype.itemsize < 4


class Buffers(TorchBatchNorm):
    """Mixin with the buffers of a layer: a set of running statistics per domain, and one outside of all domains."""

    frozen_statistics: bool = False  # torch's constructor asks before ours has set it
    nonfinite: Nonfinite
    step_state: StepState

    @property
    def active_domain(self) -> str | None:
        """The domain whose running statistics a forward in this thread or task would use."""
        return context_of(self).domain

    @property
    def domain_names(self) -> list[str]:
        """The domains that have running statistics of their own; a subclass may have buffers with similar names."""
        buffers, prefix = self._buffers, f"{STATISTICS[0]}_"
        suffixes = [name.removeprefix(prefix) for name in buffers if name.startswith(prefix)]
        return [domain for domain in suffixes if all(f"{kind}_{domain}" in buffers for kind in STATISTICS)]

    def statistics_names(self) -> list[str]:
        """Return the names of the buffers of running statistics: the layer's own, and those of its domains."""
        return [named(kind, domain) for domain in (None, *self.domain_names) for kind in STATISTICS]

    def count_names(self) -> list[str]:
        """Return the names of the counts that no state dict has."""
        return [SKIPPED, *(named(SAMPLES, domain) for domain in (None, *self.domain_names))]

    def running_statistics(self, domain: str | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the running mean, the running variance and the count of batches of a domain."""
        buffers = self._buffers
        if domain is None:
            return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        return tuple(buffers[f"{kind}_{domain}"] for kind in STATISTICS)  # type: ignore[return-value]

    def buffers_torch_lacks(self) -> list[str]:
        """Return the names of the buffers that torch's layers do not have: counts, and the statistics of domains."""
        names = {*self.count_names(), *self.statistics_names()}.difference(STATISTICS)
        return [name for name in self._buffers if name in names]

    # Changes that come from outside of the layer. They reach one set of running statistics, and none that is frozen.

    def reset_running_stats(self) -> None:
        """Set the running statistics of the active domain, or else the layer's own, to their initial values.

        Frozen ones stay as they are, with a warning.
        """
        if "step_state" not in self.__dict__:  # torch's constructor calls this
            super().reset_running_stats()
        elif self.track_running_stats and not self.leaves("running_mean", "reset_running_stats()"):
            domain = self.active_domain
            for values, initial in zip(self.running_statistics(domain), (0, 1, 0), strict=True):
                if values is not None:
                    values.fill_(initial)
            for count in (self._buffers[named(SAMPLES, domain)], None if domain else self._buffers[SKIPPED]):
                if count is not None:
                    count.zero_()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer as torch's modules do, unless the name is one of frozen running statistics."""
        set_name = self.name_to_set(name)
        if set_name is not None:
            super().register_buffer(set_name, tensor, persistent)
            if "step_state" in self.__dict__ and set_name in self.statistics_names():
                self.remember_values()

    def name_to_set(self, name: str) -> str | None:
        """Return the name of the buffer that is meant by ``layer.name = ...``, of the active domain; None if frozen."""
        if not name.startswith(STATISTICS) or name not in self._buffers or is_filling():
            return name
        if "step_state" not in self.__dict__ or name not in self.statistics_names():
            return name
        name = named(name, self.active_domain) if name in STATISTICS else name
        return None if self.leaves(name, f"setting {name}") else name

    def leaves(self, name: str, change: str) -> bool:
        """Return whether running statistics are frozen, or paused by a context, and warn that the change is ignored."""
        values = self._buffers[name]
        if not is_filling() and context_of(self).updates_paused:
            stock.warn_of_pause(change)
            return True
        if not self.frozen_statistics or is_filling() or values is None or values.is_meta or is_lazy(values):
            return False
        self.warn_of_frozen(change, "running statistics")
        return True

    def warn_of_frozen(self, change: str, part: str) -> None:
        """Warn, once per layer, that a change is ignored."""
        if not self.step_state.warned_of_frozen:
            self.step_state.warned_of_frozen = True
            warn(f"{change} leaves frozen {part} as they are; to change them, call batchnorm.unfreeze first")

    # Precision.

    def remember_values(self) -> None:
        """Keep a second reference to the memory of running statistics, for `restore_precision`."""
        names = self.statistics_names()
        self.step_state.memory = {
            name: (weakref.ref(buffer), buffer.detach())
            for name, buffer in self._buffers.items()
            if name in names and buffer is not None and not is_lazy(buffer) and not is_narrow(buffer)
        }

    @torch.no_grad()
    def restore_precision(self) -> None:
        """Give running statistics that have been cast to fewer than 32 bits those of before.

        ``buffer.data = buffer.half()``, as FSDP1 does at the first forward (``buffer_dtype`` of its MixedPrecision),
        leaves the second reference with the memory from before, so that no digit is lost. A buffer that has been
        replaced is widened, unless the one before still exists: `functional_call` replaces it for one call.
        """
        for name, buffer in self._buffers.items():
            if buffer is None or not is_narrow(buffer):
                continue
            reference, before = self.step_state.memory.get(name, (None, None))
            known = None if reference is None else reference()
            if known is None or before is None:
                self._buffers[name] = buffer.float()
            elif known is buffer:
                same = before.shape == buffer.shape and torch.equal(before.to(buffer), buffer)
                buffer.data = before.to(buffer.device) if same else buffer.float()

    # Counts.

    def counts_skipped(self) -> bool:
        """Return whether batches that are not finite are skipped, and counted."""
        return self.nonfinite == "skip" and self._buffers["running_mean"] is not None

    def register_counts(self) -> None:
        """Register the counts that no state dict has."""
        for name in COUNTS:
            self.register_buffer(name, None, persistent=False)
        self._begin_counts()

    def begin_counts(self) -> None:
        """Begin at 0 each count that is None, and move the others to where the running statistics are.

        There is none on the meta device. Within a mode, a transform or an export nothing is begun: the tensor would be
        one of theirs, and outlive them.
        """
        if torch.compiler.is_compiling():
            if not torch_internals.is_exporting():
                self._begin_counts()
        elif torch_internals.count_dispatch_modes() == 0 and not torch_internals.is_transformed():
            with torch.inference_mode(False):  # training could not update tensors that were made in it
                self._begin_counts()

    def _begin_counts(self) -> None:
        buffers = self._buffers
        if buffers["running_mean"] is None:
            return
        wanted = [named(SAMPLES, domain) for domain in (None, *self.domain_names)]
        if self.counts_skipped():
            wanted.append(SKIPPED)
        for name in wanted:
            new, count = self.new_count(), buffers.get(name)
            if new.is_meta:
                buffers[name] = None
            elif count is None or count.is_meta or type(count) is not type(new):
                buffers[name] = new
            elif count.device != new.device:
                buffers[name] = count.to(new.device)

    def new_count(self) -> Tensor:
        """Return a 0 that is stored as the running statistics are."""
        like = self._buffers["num_batches_tracked"]
        like = self._buffers["running_mean"] if like is None else like
        assert like is not None
        return like.new_zeros((), dtype=torch.int64)

    def drop_counts(self) -> None:
        """Set the counts on the meta device to None: nothing but the layer gives them a value."""
        for name in self.count_names():
            count = self._buffers.get(name)
            if count is not None and count.is_meta:
                self._buffers[name] = None

    def register_domain(self, domain: str) -> None:
        """Give a domain running statistics of its own, which begin as a copy of the layer's."""
        for kind in STATISTICS:
            values = self._buffers[kind]  # the attribute may be another domain's
            assert values is not None
            self.register_buffer(named(kind, domain), values.clone())
        self.register_buffer(named(SAMPLES, domain), None, persistent=False)
        self.begin_counts()

    def count_samples(self, samples: int, domain: str | None) -> None:
        """Count the samples that update a domain's statistics: this process's weight in `pool_running_stats`."""
        seen = self._buffers[named(SAMPLES, domain)]
        if seen is not None and not torch_internals.is_transformed():
            seen.add_(samples)


def context_of(layer: TorchBatchNorm) -> LayerContext:
    """Return the settings of contexts for a layer, ours or torch's, in this thread and task."""
    if isinstance(layer, Buffers):
        return contexts.in_force(layer.step_state.key, torch.compiler.is_compiling())
    return stock.context_of(layer)
