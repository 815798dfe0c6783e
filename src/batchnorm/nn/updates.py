"""Control of when running statistics are updated: never, or once for several batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn import accumulated
from batchnorm.nn.layer import layers_of, stock_layers_of

__all__ = ["accumulate", "no_stat_updates"]


@contextmanager
def no_stat_updates(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics and counts of all batch normalization layers unchanged.

    Nothing else changes: in training mode the statistics of the batch are used. In torch's layers the context sets
    ``track_running_stats`` to False. A copy made within it never updates its statistics if the layers are torch's, and
    does if they are ours.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.BatchNorm1d(2)
    >>> with bn.no_stat_updates(layer):
    ...     y = layer(torch.randn(8, 2) + 3)
    >>> layer.running_mean
    tensor([0., 0.])
    """
    ours = [layer for layer in layers_of(model).values() if not layer.step_state.updates_paused]
    stock = [layer for layer in stock_layers_of(model).values() if layer.track_running_stats]
    for layer in ours:
        layer.step_state.change(updates_paused=True)
    for other in stock:
        other.track_running_stats = False  # torch's forward then leaves the buffers out
    try:
        yield
    finally:
        for layer in ours:
            layer.step_state.change(updates_paused=False)
        for other in stock:
            other.track_running_stats = True


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Pool the statistics of the micro-batches within, and update the running ones once, by the moments of them all.

    This is for gradient accumulation: k micro-batches count as one batch in the running statistics, which are updated
    once, by the pooled mean and variance of each layer's inputs. Outputs are still normalized per micro-batch, so they
    differ from those of the whole batch, in training as well. Only the whole batch gives those (with activation
    checkpointing if memory is short), since the statistics of each layer need all samples at once.

    If an exception is raised within, the pooled moments are dropped.

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
    layers = [layer for layer in layers_of(model).values() if layer.track_running_stats]
    if not layers:
        raise InputError(
            f"accumulate needs a batchnorm layer that keeps running statistics; {type(model).__name__} has none"
        )
    stock = [path for path, layer in stock_layers_of(model).items() if layer.track_running_stats]
    if stock:
        raise InputError(
            "accumulate needs batchnorm's layers, since torch's are updated by each micro-batch; got "
            f"{len(stock)} of torch's, the first at {stock[0] or 'the model itself'}"
        )
    if any(layer.step_state.pool is not None for layer in layers):
        raise InputError("accumulate cannot be nested; it is already active on this model")
    for layer in layers:
        layer.step_state.change(pool={})
    try:
        yield
        pools = [(layer, layer.step_state.pool) for layer in layers]
    finally:
        for layer in layers:
            layer.step_state.change(pool=None)
    for layer, pool in pools:
        for domain, parts in (pool or {}).items():
            accumulated.commit(parts, layer.running(domain, update=True))
