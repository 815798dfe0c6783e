"""Recognition of normalization layers of any library: by the tensors that they keep, not by their names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["describe_norms", "is_batch_norm", "is_normalization", "norm_counts"]

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORM_NAME = re.compile(r"Norm(Act)?(\dd)?$|RMSNorm|LayerNorm|EvoNorm|FilterResponseNorm")
_ENDS_AS_NORM = re.compile(r"Norm(Act)?(\dd)?$")


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch normalization layer, or keeps a running mean and variance as one does.

    So torch's layers and ours, lazy and synchronized ones, their subclasses, timm's, and the FrozenBatchNorm2d of
    torchvision, detectron2 and transformers.
    """
    if isinstance(module, TorchBatchNorm):
        return True
    if isinstance(module, (*_INSTANCE_NORMS, LazyModuleMixin)):
        return False
    mean, var = (_own(module, name) for name in ("running_mean", "running_var"))
    return mean is not None and var is not None and mean.dim() == 1 and mean.shape == var.shape


def is_normalization(module: nn.Module) -> bool:
    """Return whether a module is a normalization layer of any kind and nothing besides, by the name of a base class.

    A layer that normalizes and also multiplies by a matrix, such as a LayerNormLinear, is none.
    """
    return is_batch_norm(module) or any(_ENDS_AS_NORM.search(kind.__name__) for kind in type(module).__mro__)


def norm_counts(model: nn.Module) -> Counter[str]:
    """Return how many normalization layers of each class a model has, those of batch normalization included."""
    modules = [*model.modules()]
    norms = [each for each in modules if is_batch_norm(each) or _NORM_NAME.search(type(each).__name__)]
    inner = [each for each in norms if not any(other in norms for other in each.children())]
    return Counter(type(each).__name__ for each in inner)


def describe_norms(model: nn.Module) -> str:
    """Return which normalization layers a model has, as a verb phrase: "has 53 FrozenBatchNorm2d and 12 LayerNorm"."""
    counts = [f"{count} {name}" for name, count in norm_counts(model).most_common()]
    return f"has {_joined(counts)}" if counts else "has no normalization layer"


def describe_lack(model: nn.Module) -> str:
    """Return that a model has none of the layers that a function needs, which it has instead, and the way out.

    It has, say, layers of other libraries that keep no running statistics, or none that torch's class is a base of.
    """
    name = type(model).__name__
    counts = norm_counts(model)
    is_norm = [*counts] == [name]  # the model is itself the layer
    instead = f"; it {describe_norms(model)}" if counts and not is_norm else ""
    others = {type(each).__name__ for each in model.modules() if _is_of_another_library(each)}
    way_out = f". batchnorm.convert(model) turns {_joined(sorted(others))} into batchnorm's layers" if others else ""
    return f"{name} has none{instead}{way_out}"


def _is_of_another_library(module: nn.Module) -> bool:
    return is_batch_norm(module) and not isinstance(module, TorchBatchNorm)


def _joined(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])}{' and ' if words[:-1] else ''}{words[-1]}"


def _own(module: nn.Module, name: str) -> Tensor | None:
    values = module._buffers.get(name)
    return module._parameters.get(name) if values is None else values
