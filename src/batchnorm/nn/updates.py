"""When running statistics move: not at all, or once for several batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.errors import InputError
from batchnorm.kernels.records import Running
from batchnorm.nn import accumulated
from batchnorm.nn.layer import layers_of, stock_layers_of

__all__ = ["accumulate", "no_stat_updates"]


@contextmanager
def no_stat_updates(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics and counts of every batch normalization layer as they are.

    All else goes on as it does: in training mode the batch's own statistics are used. torch's layers are held too, by
    their ``track_running_stats``; a copy made within goes on without in them, but moves its statistics in ours.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.BatchNorm1d(2)
    >>> with bn.no_stat_updates(layer):
    ...     y = layer(torch.randn(8, 2) + 3)
    >>> layer.running_mean
    tensor([0., 0.])
    """
    ours = [layer for layer in layers_of(model).values() if not layer._held]
    stock = [layer for layer in stock_layers_of(model).values() if layer.track_running_stats]
    for layer in ours:
        layer._held = True
    for other in stock:
        other.track_running_stats = False  # torch's forward then leaves the buffers out
    try:
        yield
    finally:
        for layer in ours:
            layer._held = False
        for other in stock:
            other.track_running_stats = True


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Pool the statistics of the micro-batches within, and move the running ones once, by the moments of them all.

    For gradient accumulation: k micro-batches then count as one batch in the running statistics, which move once, with
    the pooled mean and variance of what each layer saw. Outputs are still normalised micro-batch by micro-batch, so
    they differ from those of the whole batch, in training as well: nothing short of the whole batch (with activation
    checkpointing, where memory is short) gives those, since each layer's statistics need all samples at once.

    An exception within drops what was pooled.

    Raises
    ------
    InputError
        The model has no layer of ours that keeps running statistics, or one of torch's that does, or is within such a
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
            "accumulate needs batchnorm's layers: torch's would move at each micro-batch; got "
            f"{len(stock)} of torch's, the first {stock[0]}"
        )
    if any(layer._pool is not None for layer in layers):
        raise InputError("accumulate is at work on this model already, and can't be nested")
    for layer in layers:
        layer._pool = {}
    try:
        yield
        pools = [(layer, layer._pool) for layer in layers]
    finally:
        for layer in layers:
            layer._pool = None
    for layer, pool in pools:
        for domain, seen in (pool or {}).items():
            skipped = layer._buffers["skipped_batches"]
            accumulated.commit(
                seen, Running(*layer.running_statistics(domain), layer.momentum, skipped, layer.unbiased)
            )
