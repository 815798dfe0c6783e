"""Batch normalization layers that take the place of torch's own."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_DOCUMENTATION = """Batch normalization over {input}; takes the place of ``torch.nn.{stock}``.

    ``y = activation(gamma * z_hat + beta + residual)`` with ``z_hat = (z - mean) / sqrt(var + eps)``, mean and
    biased variance of each channel over the batch when training, running statistics in eval. Ioffe & Szegedy
    (2015). A subclass of torch's class, so that `isinstance`, checkpoints (strict, both ways) and recipes for
    weight decay go on working; with default options its numbers are torch's, its statistics better conditioned.

    Parameters
    ----------
    num_features : int
        C, the size of dimension 1.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None keeps their cumulative mean.
    affine : bool
        Learn gamma (from 1) and beta (from 0).
    track_running_stats : bool
        Keep running statistics for eval; without them eval uses the batch's own.
    device, dtype
        Of parameters and running statistics.
    bias : bool
        False learns gamma alone.
    activation : str or None
        "relu", "leaky_relu" (slope 0.01), "silu", "gelu", "tanh" or "sigmoid", applied last.
    small_batch : str
        What becomes of a training batch with a single value a channel: "raise" an error, as torch, or normalise it
        with the statistics that are "running", and move none.
    nonfinite : str
        What a training batch does to the running statistics in which any channel's mean or variance is infinite or
        NaN: "skip" leaves them all, and the count of batches, as they were and adds one to ``skipped_batches``;
        "propagate" poisons them, as torch. y is the same.
    virtual_batch_size : int or None
        Samples of a virtual batch: in training each has its own statistics (ghost batch norm, Hoffer et al. 2017);
        the running ones move once, by those of the whole batch. A last one of a single value joins the one before.
    renorm : Renorm, RenormSchedule or None
        Batch renormalization (Ioffe 2017).
    sync : bool
        Statistics of a training batch over all processes of ``process_group``, where torch.distributed is initialised
        and they are several: one collective forward, one backward. Each may hold another number of samples, or none.
    process_group : torch.distributed.ProcessGroup or None
        For ``sync``; None is the default group. Copies of the layer share it; with one it can't be pickled.
    channel_dim : int
        The dimension of the channels: -1 for (N, L, C).
    running_var : str
        The variance that is kept: "unbiased", as in torch, or "biased", as in Keras and Flax.

    Raises
    ------
    InputError
        A `ValueError`: an option out of its range; in forward an input of other dimensions or channels, a residual
        or mask of another shape, a single value a channel while training, or, with ``sync``, ranks at other layers.

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
