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

__all__ = ["TorchBatchNorm", "TorchLazyNorm", "move_hooks", "move_hooks_of_the_output"]

OUTPUT_HOOKS = ["_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks"]
OUTPUT_HOOKS += ["_backward_pre_hooks", "_is_full_backward_hook"]

INPUT_HOOKS = ["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"]


def move_hooks(before: nn.Module, after: nn.Module) -> None:
    """Move the hooks of forward and backward to a module without any; their handles go on working."""
    for name in OUTPUT_HOOKS + INPUT_HOOKS:
        if name in vars(before) and name in vars(after):
            vars(before)[name], vars(after)[name] = vars(after)[name], vars(before)[name]


def move_hooks_of_the_output(inner: nn.Module, outer: nn.Module) -> None:
    """Move the hooks that see outputs to a new module around; their handles go on working, since the dicts move."""
    for name in OUTPUT_HOOKS:
        if name in vars(inner) and name in vars(outer):
            moved, new = vars(inner)[name], vars(outer)[name]
            vars(outer)[name], vars(inner)[name] = moved, new
