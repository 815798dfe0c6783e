"""Batch normalization layers that replace torch's own."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_DOCUMENTATION = """Batch normalization over {input}; replaces ``torch.nn.{stock}``.

    ``y = activation(gamma * z_hat + beta + residual)`` with ``z_hat = (z - mean) / sqrt(var + eps)``: the mean and
    biased variance of each channel over the batch in training, the running statistics in eval. Ioffe & Szegedy (2015).
    It is a subclass of torch's class, so that `isinstance`, checkpoints (strict, both ways) and recipes for weight
    decay keep working. With default options it gives torch's numbers, with better conditioned statistics.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None keeps their cumulative mean.
    affine : bool
        Learn gamma (initially 1) and beta (initially 0).
    track_running_stats : bool
        Keep running statistics for eval; without them eval uses the statistics of the batch.
    device, dtype
        Of the parameters and running statistics.
    bias : bool
        Learn beta; with False gamma alone is learned.
    activation : str or None
        "relu", "leaky_relu" (slope 0.01), "silu", "gelu", "tanh" or "sigmoid", applied last.
    small_batch : str
        For a training batch with a single value per channel: "raise" an error, as torch does, or normalize it with the
        "running" statistics, without updating them.
    nonfinite : str
        For a training batch in which the mean or variance of a channel is infinite or NaN: "skip" leaves the running
        statistics and the count of batches unchanged and adds one to ``skipped_batches``; "propagate" poisons them, as
        torch does. y is the same.
    virtual_batch_size : int or None
        Samples per virtual batch; in training each has statistics of its own (ghost batch norm, Hoffer et al. 2017).
        The running statistics are updated once, by those of the whole batch. A last virtual batch with one value per
        channel joins the one before it.
    renorm : Renorm, RenormSchedule or None
        Limits of batch renormalization (Ioffe 2017).
    sync : bool
        Compute the statistics of a training batch over all processes of ``process_group``, if torch.distributed is
        initialized and there are several: one collective in forward, one in backward. Each process may hold another
        number of samples, or none.
    process_group : torch.distributed.ProcessGroup or None
        For ``sync``; None is the default group. Copies of the layer share it, and a layer with one cannot be pickled.
    channel_dim : int
        The dimension of the channels: -1 for (N, L, C).
    unbiased : bool
        Keep the unbiased variance in the running statistics, as torch does, or the biased one, as Keras and Flax do.

    Raises
    ------
    InputError
        A `ValueError`: an option is out of its range; in forward the dimensions or channels of the input, or the shape
        of a residual or mask, do not fit; a training batch has a single value per channel.
    InputTypeError
        A `TypeError`: the input, a residual or a mask is not a tensor.
    DistributedError
        A `RuntimeError`: with ``sync``, the ranks are at different layers.
    UnsupportedError
        A `RuntimeError`: with ``sync``, the layer runs under a transform of torch.func, or one with a process group is
        pickled.

    Examples
    --------
    >>> import torch
    >>> layer = {name}(3, activation="relu")
    >>> layer(torch.randn({shape})).shape
    torch.Size([{shape}])
    """


class BatchNorm1d(Layer, nn.BatchNorm1d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm1d", stock="BatchNorm1d", input="(N, C) or (N, C, L) input", shape="8, 3"
    )


class BatchNorm2d(Layer, nn.BatchNorm2d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm2d", stock="BatchNorm2d", input="(N, C, H, W) input", shape="8, 3, 5, 5"
    )


class BatchNorm3d(Layer, nn.BatchNorm3d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm3d", stock="BatchNorm3d", input="(N, C, D, H, W) input", shape="8, 3, 2, 5, 5"
    )


class BatchNorm(Layer):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm", stock="BatchNorm1d, 2d or 3d", input="(N, C, *) input of 2 or more dimensions", shape="8, 3"
    )

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name for it)
        if input.dim() < 2:
            raise InputError(f"input must have at least 2 dimensions, (N, C, *); got shape {tuple(input.shape)}")
