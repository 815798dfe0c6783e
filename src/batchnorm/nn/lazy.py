"""Layers that infer the number of channels from their first batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.filling import filling
from batchnorm.nn.layer import Layer
from batchnorm.nn.layout import dimension_of_channels
from batchnorm.nn.options import Options, checked_numbers, checked_options
from batchnorm.torch_internals import TorchLazyNorm

__all__ = ["LazyBatchNorm", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"]


class _Lazy(TorchLazyNorm, Layer):
    """A layer without num_features until its first batch, which turns it into a layer of ``cls_to_become``."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        _, eps, momentum = checked_numbers(0, eps, momentum)
        given = checked_options(Options(**options), track_running_stats=track_running_stats)
        # torch's class builds a layer without running statistics, which some options need; so they are adopted below.
        super().__init__(eps, None, affine, track_running_stats, device, dtype)
        self.momentum = momentum  # checked above, where its warning names the caller
        if not bias:
            self.register_parameter("bias", None)
        self.adopt(given, device)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:  # noqa: A002
        """Infer the number of channels from the first batch, or from the state loaded before it."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        dim = dimension_of_channels(input, self.channel_dim)
        with filling():  # statistics that were frozen before have no values yet
            super().initialize_parameters(input.movedim(dim, 1))
        self.remember_values()
        known = next((values for values in (self.weight, self.running_mean) if values is not None), None)
        self.num_features = input.shape[dim] if known is None else known.shape[0]


_DOCUMENTATION = """`{name}` that infers num_features from its first batch, as ``torch.nn.Lazy{stock}`` does.

    All other parameters are those of `{name}`.

    Examples
    --------
    >>> layer = Lazy{name}(activation="relu")
    >>> layer(torch.randn({shape})).shape, layer.num_features
    (torch.Size([{shape}]), 3)
    """


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d, BatchNorm1d):
    __doc__ = _DOCUMENTATION.format(name="BatchNorm1d", stock="BatchNorm1d", shape="8, 3")
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d, BatchNorm2d):
    __doc__ = _DOCUMENTATION.format(name="BatchNorm2d", stock="BatchNorm2d", shape="8, 3, 5, 5")
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d, BatchNorm3d):
    __doc__ = _DOCUMENTATION.format(name="BatchNorm3d", stock="BatchNorm3d", shape="8, 3, 2, 5, 5")
    cls_to_become = BatchNorm3d


class LazyBatchNorm(_Lazy, BatchNorm):
    __doc__ = _DOCUMENTATION.format(name="BatchNorm", stock="BatchNorm1d, 2d or 3d", shape="8, 3")
    cls_to_become = BatchNorm
