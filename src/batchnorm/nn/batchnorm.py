"""Batch normalization layers that take the place of torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.functional import check, check_activation, check_count
from batchnorm.ops import Running

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _Layer(TorchBatchNorm):
    """What our layers add to torch's class of the same name, in front of which they stand."""

    activation: str | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)  # not passed on, since older torch has no such argument
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name for it)
        """Return ``activation(gamma * z_hat + beta + residual)``, of input's shape (N, C, *) and dtype."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if input.shape[1] != self.num_features:
            raise InputError(
                f"input must have num_features={self.num_features} channels in dimension 1; "
                f"got {input.shape[1]}, in shape {tuple(input.shape)}"
            )
        check(input, residual, None)
        buffers = self._buffers  # without the search that an attribute of a module takes
        mean, var, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        training = self.training or (mean is None and var is None)
        if training:
            check_count(input)
        if not self.training:
            running = Running(mean, var, None, self.momentum)
        elif self.track_running_stats:
            running = Running(mean, var, batches, self.momentum)
        else:
            running = Running(None, None, None, self.momentum)
        return ops.batch_norm(
            input, self.weight, self.bias, residual, None, running, self.eps, self.activation, training
        )

    def extra_repr(self) -> str:
        """Torch's settings, then those of ours that differ from its behaviour."""
        ours = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{super().extra_repr()}{ours}"  # type: ignore[no-untyped-call]


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

    Raises
    ------
    InputError
        A `ValueError`: an unknown activation; in forward an input of other dimensions or channels, a residual
        of another shape, or a single value a channel while training.

    Examples
    --------
    >>> layer = {name}(3, activation="relu")
    >>> layer(torch.randn({shape})).shape
    torch.Size([{shape}])
    """


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm1d", stock="BatchNorm1d", input="(N, C) or (N, C, L) input", shape="8, 3"
    )


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm2d", stock="BatchNorm2d", input="(N, C, H, W) input", shape="8, 3, 5, 5"
    )


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm3d", stock="BatchNorm3d", input="(N, C, D, H, W) input", shape="8, 3, 2, 5, 5"
    )


class BatchNorm(_Layer):
    __doc__ = _DOCUMENTATION.format(
        name="BatchNorm", stock="BatchNorm1d, 2d or 3d", input="(N, C, *) input of 2 or more dimensions", shape="8, 3"
    )

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name for it)
        if input.dim() < 2:
            raise InputError(f"input must have at least 2 dimensions, (N, C, *); got shape {tuple(input.shape)}")
