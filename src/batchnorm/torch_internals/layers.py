"""Classes of torch.nn without a public name: the bases of its batch normalization layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
    from torch.nn.modules.batchnorm import _LazyNormBase as TorchLazyNorm
else:  # They are found through the public classes.
    TorchBatchNorm = next(base for base in nn.BatchNorm1d.__mro__ if issubclass(nn.SyncBatchNorm, base))
    TorchLazyNorm = nn.LazyBatchNorm1d.__bases__[0]

__all__ = ["TorchBatchNorm", "TorchLazyNorm"]
