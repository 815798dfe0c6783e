"""Measurement of the inputs of a model's layers over a loader, in one pass or layer by layer, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.extras import needs
from batchnorm.nn.contexts import Adapted, Setting
from batchnorm.nn.opening import change_setting, open_context
from batchnorm.nn.running import RunningBuffers, RunningSet, active_set
from batchnorm.processes import process_group_of
from batchnorm.statistics.batches import BatchReader
from batchnorm.statistics.forwards import restored, uncompiled, with_input_hook
from batchnorm.statistics.interrupts import allow_interrupts, defer_interrupts
from batchnorm.statistics.layers import Layers, Statistics
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.passes import EnoughUses, LoaderPass, PassResult, gather_results, in_order
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Measuring", "NewStatistics", "PassOptions", "Replacement", "check_passes", "replacing"]

NewStatistics = Callable[[str, TorchBatchNorm, Moments, int], Statistics]
"""A function of the module path of a layer, the layer, the moments of its inputs and the number of samples.

It returns the running statistics that the layer gets.
"""


HIDING = Setting(updates_paused=True, hides_adaptations=True)


class Replacement:
    """Running statistics that replace the stored ones of layers, in this thread and task, until `keep` or `drop`.

    At first they are the stored ones, also within an earlier adaptation.

    Attributes
    ----------
    stored : dict of (Tensor, Tensor)
        Copies of the stored mean and variance of each layer, by module path.
    context : OpenContext
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._sets = {path: RunningSet(layer, active_set(layer).domain) for path, layer in layers.items()}
        self.stored = {path: (each.mean.clone(), each.var.clone()) for path, each in self._sets.items()}
        self._new: dict[str, Statistics] = {}
        self._written = False
        self.context = open_context(dict.fromkeys(layers.values(), HIDING))

    def use(self, path: str, mean: Tensor, var: Tensor) -> None:
        """Replace the statistics of a layer, in the dtype of the stored ones."""
        stored_mean, stored_var = self.stored[path]
        mean, var = mean.detach().to(stored_mean), var.detach().to(stored_var)
        self._new[path] = mean, var
        adapted = Adapted(mean, var, self._sets[path].domain)
        change_setting(self.context, self._layers[path], HIDING._replace(adapted=adapted))

    def keep(self) -> None:
        """Write the new statistics into the stored ones, but for layers frozen since, and end the replacement."""
        self._written = True
        for path, new in self._new.items():
            layer = self._layers[path]
            if isinstance(layer, RunningBuffers) and layer.frozen_statistics:
                layer.warn_of_frozen("keep()", "running statistics")
            else:
                self._sets[path].write(*new)
        self.context.leave()

    def drop(self) -> None:
        """End the replacement with the stored statistics as they were."""
        self.context.leave()
        if self._written:
            for path, stored in self.stored.items():
                self._sets[path].write(*stored)


@contextmanager
def replacing(model: nn.Module, layers: Layers) -> Iterator[Replacement]:
    """Run the model in eval mode with a replacement of the layers' statistics, which is dropped after an error.

    Modes and random generators are restored in any case. Ctrl-C is deferred except within `allow_interrupts`.
    """
    replacement = None
    try:
        with defer_interrupts(), torch.no_grad(), uncompiled(), restored(model):
            replacement = Replacement(layers)
            model.eval()
            yield replacement
    except BaseException:
        with defer_interrupts():
            if replacement is not None:
                replacement.drop()
        raise


def check_passes(loader: Iterable[Any], passes: int, alternative: str = "") -> None:
    """Raise `InputError` if the loader cannot be iterated over so often; ``alternative`` ends the sentence."""
    if passes > 1 and isinstance(loader, Iterator):
        raise InputError(
            f"the layers are measured one after the other, in {passes} passes over the loader; got "
            f"{type(loader).__name__}, which can be consumed only once. Pass a DataLoader or a list{alternative}"
        )


@dataclass(frozen=True)
class PassOptions:
    """How a loader is read.

    Attributes
    ----------
    max_samples : int or None
        End a pass after this number of samples.
    tolerance : float or None
        End a pass when the relative standard errors are below it.
    progress : str or None
        Label of the progress bar; None shows none.
    alternative : str
        Way out for a loader that can be consumed only once, for the error.
    group : ProcessGroup or None
        The processes that each read a share of the data.
    """

    max_samples: int | None = None
    tolerance: float | None = None
    progress: str | None = None
    alternative: str = ""
    group: dist.ProcessGroup | None = None


class Measuring:
    """Measures layers over a loader and gives them new running statistics.

    Attributes
    ----------
    samples : int
        Number of samples of the first pass, on this process.
    passes : int
        Number of passes over the loader.
    converged : bool
        Whether the tolerance has ended every pass so far.
    """

    def __init__(
        self,
        reader: BatchReader,
        loader: Iterable[Any],
        new_statistics: NewStatistics,
        options: PassOptions,
        replacement: Replacement,
    ) -> None:
        self.reader, self.loader, self.new_statistics, self.options = reader, loader, new_statistics, options
        self.replacement = replacement
        self.group = process_group_of(options.group)
        self.samples, self.passes, self.converged = 0, 0, True

    def at_once(self, layers: Layers) -> dict[str, Moments]:
        """Measure all layers in one pass, in which they normalize each batch with its own statistics.

        Returns the moments by module path, in the order of use.
        """
        found = self._run(LoaderPass(layers, self.options.tolerance, batch_statistics=True))
        for path in found.moments:
            self._write(path, layers[path], found)
        return found.moments

    def layerwise(self, layers: Layers) -> dict[str, Moments]:
        """Measure one layer per pass, in the network in which the layers before it have their new statistics.

        The first pass finds the order of the layers and how often each is used. If every batch begins with the same
        layer, this pass measures it too, because no other layer's statistics can change its input.

        Returns the moments by module path, in the order of use.
        """
        tolerance = self.options.tolerance
        first = self._run(LoaderPass(layers, tolerance, first_only=True))
        order = in_order(first.orders)
        found = {}
        if first.uses[order[0]] == 1 and all(each[0] == order[0] for each in first.orders if each):
            found[order[0]] = first.moments[order[0]]
            self._write(order[0], layers[order[0]], first)
        check_passes(self.loader, 1 + len(order) - len(found), self.options.alternative)
        for path in order[len(found) :]:
            uses = first.uses[path]
            # The input of a second use depends on the first, which is normalized with the batch, as in training.
            measured = self._run(LoaderPass({path: layers[path]}, tolerance, max_uses=uses, batch_statistics=uses > 1))
            found[path] = measured.moments[path]
            self._write(path, layers[path], measured)
        return found

    def _write(self, path: str, layer: TorchBatchNorm, found: PassResult) -> None:
        """Give the layer its new running statistics, and raise `InputError` unless these are finite."""
        self.replacement.use(path, *self.new_statistics(path, layer, found.moments[path], found.samples))
        running = active_set(layer)
        for name, values in (("mean", running.mean), ("variance", running.var)):
            channels = values.isfinite().logical_not().nonzero().flatten().cpu().tolist()
            if channels:
                raise InputError(
                    f"the inputs of {path or 'the layer'} must have a finite {name}; got {values[channels[0]].item()} "
                    f"in {len(channels)} of {len(values)} channels"
                )

    def _run(self, over: LoaderPass) -> PassResult:
        """Run one pass, and return its result over all processes; if it fails on one, it fails on all."""
        converged, failure, options = False, None, self.options
        self.passes += 1

        def record(path: str, x: Tensor, mask: Tensor | None) -> Statistics | None:
            if self.passes == 1:  # the only pass that is certain to record the first layer
                self.reader.check_rows(x.shape[0])
            return over.record(path, x, mask)

        with with_input_hook(over.layers, record), self._batches() as batches:
            try:
                with allow_interrupts():
                    for batch in batches:
                        samples = self.reader.count(batch)
                        with suppress(EnoughUses):
                            self.reader.run(batch)
                        over.end_batch(samples)
                        converged = over.has_converged()
                        if converged or (options.max_samples is not None and over.samples >= options.max_samples):
                            break
            except Exception as error:  # noqa: BLE001 (the other processes are told first; then it is raised)
                failure = error
        self.samples = over.samples if self.passes == 1 else self.samples
        self.converged = self.converged and converged
        return gather_results(over.result(), over.layers, self.group, failure)

    @contextmanager
    def _batches(self) -> Iterator[Iterable[Any]]:
        """Yield the loader, which shows a progress bar on stderr if that is wanted."""
        if self.options.progress is None:
            yield self.loader
            return
        with needs("progress=True"):
            from rich.console import Console
            from rich.progress import Progress
        with Progress(console=Console(stderr=True), transient=True) as bar:
            yield bar.track(self.loader, description=f"{self.options.progress}, pass {self.passes}")
