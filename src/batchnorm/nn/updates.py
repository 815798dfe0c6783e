"""Control of when running statistics are updated: never, or once for several batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import UninitializedBuffer

from batchnorm.errors import InputError
from batchnorm.nn import accumulated
from batchnorm.nn.accumulated import Pool
from batchnorm.nn.buffers import context_of
from batchnorm.nn.contexts import Setting
from batchnorm.nn.layer import Layer, layers_for, layers_of, stock_layers_of
from batchnorm.nn.opening import settings

__all__ = ["accumulate", "no_stat_updates"]

_COMMITTING = threading.Lock()


@contextmanager
def no_stat_updates(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics and counts of all batch normalization layers unchanged.

    Nothing else changes: in training mode the statistics of the batch are used. Updates are paused in this thread and
    asyncio task only, and not in copies; torch's lazy layers, only once they have seen a batch.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.BatchNorm1d(2)
    >>> with bn.no_stat_updates(layer):
    ...     y = layer(torch.randn(8, 2) + 3)
    >>> layer.running_mean
    tensor([0., 0.])
    """
    stock = [
        layer for layer in stock_layers_of(model).values() if not isinstance(layer.running_mean, UninitializedBuffer)
    ]
    layers = [*layers_of(model).values(), *stock]
    with settings(dict.fromkeys(layers, Setting(updates_paused=True))):
        yield


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Pool the statistics of the micro-batches within, and update the running ones once, by the moments of them all.

    This is for gradient accumulation: k micro-batches count as one batch in the running statistics, which are updated
    once, by the pooled mean and variance of each layer's inputs. Outputs are still normalized per micro-batch, so they
    differ from those of the whole batch, in training as well. Only the whole batch gives those (with activation
    checkpointing if memory is short), since the statistics of each layer need all samples at once.

    If an exception is raised within, the pooled moments are dropped. Batches of other threads and asyncio tasks are not
    pooled, and update the running statistics as usual.

    Raises
    ------
    InputError
        The model has no layer of ours that keeps running statistics, has one of torch's that does, or is within such a
        context already.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer, batch = bn.BatchNorm1d(1), torch.arange(8.0).unsqueeze(1)
    >>> with bn.accumulate(layer):
    ...     outputs = [layer(part) for part in batch.split(2)]
    >>> layer.running_mean, layer.num_batches_tracked
    (tensor([0.3500]), tensor(1))
    """
    found = layers_for(model, "accumulate", "are updated by each micro-batch", statistics=True)
    layers = list(found.values())
    if any(context_of(layer).pool is not None for layer in layers):
        raise InputError("accumulate cannot be nested; it is already active on this model")
    pools: dict[Layer, Pool] = {layer: {} for layer in layers}
    with settings({layer: Setting(pool=pool) for layer, pool in pools.items()}):
        yield
    with _COMMITTING:
        for layer, pool in pools.items():
            for domain, parts in pool.items() if not layer.frozen_statistics else ():
                accumulated.commit(parts, layer.running(domain, update=True))
