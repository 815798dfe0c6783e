"""The arithmetic of folding: a scale and a shift per channel become part of the weight and bias of a layer.

All is computed in float64 on the CPU, so that the values are rounded once, to the dtype of the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.surgery.norms.formula import Norm

__all__ = ["Affine", "Fold", "Foldable", "Weights", "affine_of", "is_foldable", "misfit", "misfit_of_values"]
__all__ += ["pads_otherwise", "probes", "set_weights", "then", "weights_of", "why_not", "with_input"]

Foldable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
STOCK = Foldable.__args__


class Affine(NamedTuple):
    """What batch normalization with running statistics computes: ``y = scale * x + shift`` for each channel."""

    scale: Tensor
    shift: Tensor


class Weights(NamedTuple):
    """The weight and bias of a layer, in float64 on the CPU."""

    weight: Tensor
    bias: Tensor


Fold = Callable[[Foldable, Weights, Affine], Weights]
"""`then` or `with_input`."""


def is_foldable(module: nn.Module | None) -> TypeGuard[Foldable]:
    """Return whether a module is one of the layers that batch normalization can be folded into."""
    return isinstance(module, STOCK)


def affine_of(norm: Norm) -> Affine:
    """Return the scale and shift of batch normalization with its running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = exact(norm.running_mean), exact(norm.running_var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -mean * scale
    return Affine(scale, shift if norm.bias is None else exact(norm.bias) + shift)


def weights_of(layer: Foldable) -> Weights:
    """Return the weight of a layer and its bias, which is 0 where it has none."""
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    bias = torch.zeros(out, dtype=torch.float64) if layer.bias is None else exact(layer.bias)
    return Weights(exact(layer.weight), bias)


def then(layer: Foldable, weights: Weights, affine: Affine) -> Weights:
    """Return the weights with which a layer computes ``scale * layer(x) + shift``."""
    weight, (scale, shift) = weights.weight, affine
    if isinstance(layer, TRANSPOSED):
        by_group = scale.view(layer.groups, 1, -1, *[1] * len(layer.kernel_size))  # (G, in/G, out/G, *kernel)
        scaled = (_by_group(weight, layer.groups) * by_group).flatten(0, 1)
    else:
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return Weights(scaled, weights.bias * scale + shift)


def with_input(layer: Foldable, weights: Weights, affine: Affine) -> Weights:
    """Return the weights with which a layer computes ``layer(scale * x + shift)``.

    It is right for a layer of which `pads_otherwise` has nothing to say.
    """
    weight, (scale, shift) = weights.weight, affine
    if isinstance(layer, TRANSPOSED):
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        shifted = weight * shift.view(-1, *[1] * (weight.dim() - 1))
        added = _by_group(shifted, layer.groups).flatten(3).sum((1, 3)).flatten()
        return Weights(scaled, weights.bias + added)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    by_group = _by_group(weight, groups)  # (G, out/G, in/G, *kernel)
    view = (groups, 1, -1, *[1] * (weight.dim() - 2))
    scaled = (by_group * scale.view(view)).flatten(0, 1)
    added = (by_group * shift.view(view)).flatten(2).sum(2).flatten()
    return Weights(scaled, weights.bias + added)


def pads_otherwise(layer: Foldable, shift: Tensor) -> str:
    """Return why an input that is shifted is no shift of the output: a clause; empty if it is one.

    Zeros around the input are not shifted with it. A transposed convolution has other parts of its kernel at each
    output. Both are no matter where the shift is 0.
    """
    if isinstance(layer, nn.Linear) or not bool(shift.any()):
        return ""
    if isinstance(layer, TRANSPOSED):
        single = max(layer.kernel_size) == max(layer.stride) == 1 and not any((*layer.padding, *layer.output_padding))
        return "" if single else "a transposed convolution, which has other parts of its kernel at the border"
    pads = (
        any((size - 1) * step for size, step in zip(layer.kernel_size, layer.dilation, strict=True))
        if layer.padding == "same"
        else layer.padding != "valid" and any(layer.padding)
    )
    return "a convolution that pads its input with zeros" if pads and layer.padding_mode == "zeros" else ""


def why_not(layer: Foldable) -> str:
    """Return why nothing can be folded into a layer, whatever its neighbors are: a clause; empty if something can."""
    kind = type(layer).__name__
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return f"{kind} has seen no batch yet, which sets its channels"
    if is_parametrized(layer):
        return f"the weight or bias of {kind} is parametrized"
    parameters = vars(layer)["_parameters"]
    if "weight" not in parameters or "bias" not in parameters:
        return f"the weight or bias of {kind} is computed before each forward, by pruning, weight_norm or the like"
    for name, values in parameters.items():
        if name not in ("weight", "bias"):
            return f"{kind} has a further parameter, {name}"
        if values is not None and values.is_meta:
            return f"the {name} of {kind} is on the meta device, where it has no values"
        if values is not None and (type(values) is not nn.Parameter or type(values.data) is not Tensor):
            return f"the {name} of {kind} is a {type(values.data if type(values) is nn.Parameter else values).__name__}"
        if values is not None and not values.is_floating_point():
            return f"the {name} of {kind} has values of {values.dtype}"
    return f"the forward of {kind} was replaced by an assignment" if "forward" in vars(layer) else ""


def misfit(layer: Foldable, affine: Affine, fold: Fold) -> str:
    """Return why a layer with a forward of its own does not follow the arithmetic of its class; empty if it does.

    A copy with folded weights is run on small random inputs.
    """
    if type(layer) in STOCK:
        return ""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            agrees = all(_agrees(layer, affine, fold, x) for x in probes(layer))
        except Exception as error:  # noqa: BLE001 (whatever the forward raises)
            return f"{type(layer).__name__} cannot be run by itself ({type(error).__name__}: {error})".replace(
                "\n", " "
            )
    return "" if agrees else f"the forward of {type(layer).__name__} is its own, and no scale and shift go through it"


def probes(layer: Foldable) -> Iterator[Tensor]:
    """Iterate over random inputs of a layer: a little larger than its kernel, and far larger."""
    for samples, extra in ((2, 0), (3, 1), (2, 2), (1, 13), (40, 3)):
        if isinstance(layer, nn.Linear):
            yield torch.randn(samples, layer.in_features, dtype=torch.float64)
        else:
            sizes = [
                1 + (size - 1) * step + extra for size, step in zip(layer.kernel_size, layer.dilation, strict=True)
            ]
            yield torch.randn(min(samples, 2), layer.in_channels, *sizes, dtype=torch.float64)


def misfit_of_values(layer: Foldable, weights: Weights) -> str:
    """Return why the dtype of a layer cannot hold folded values; empty if it can."""
    dtype = layer.weight.dtype
    finite = all(bool(values.to(dtype).isfinite().all()) for values in weights)
    return "" if finite else f"the folded weight or bias is not finite in {dtype}"


@torch.no_grad()
@torch.inference_mode(False)
def set_weights(layer: Foldable, weights: Weights, *, trains: bool) -> None:
    """Give a layer other values in the same parameters; a new bias requires a gradient if it ``trains``."""
    _set(layer, "weight", torch.empty_like(layer.weight).copy_(weights.weight), trains=layer.weight.requires_grad)
    _set(layer, "bias", layer.weight.new_empty(len(weights.bias)).copy_(weights.bias), trains=trains)


def _set(layer: Foldable, name: str, values: Tensor, *, trains: bool) -> None:
    parameter: nn.Parameter | None = getattr(layer, name)
    if parameter is None or parameter.is_inference():  # an inference tensor cannot be given other memory
        setattr(layer, name, nn.Parameter(values, requires_grad=trains))
    else:
        parameter.data = values


def _by_group(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, -1, *weight.shape[1:])


def exact(values: Tensor) -> Tensor:
    """Return values in float64 on the CPU."""
    return values.detach().to("cpu", torch.float64)


def _agrees(layer: Foldable, affine: Affine, fold: Fold, x: Tensor) -> bool:
    """Return whether a copy with folded random weights computes what is expected of an input."""
    twin = copy.deepcopy(layer).cpu().double().eval()
    for values in twin.parameters(recurse=False):
        values.normal_()
    shift = torch.randn_like(affine.shift) if affine.shift.any() else affine.shift
    drawn = Affine(torch.randn_like(affine.scale), shift)
    dim = -1 if isinstance(twin, nn.Linear) else 1
    expected = _applied(drawn, twin(x), dim) if fold is then else twin(_applied(drawn, x, dim))
    set_weights(twin, fold(twin, weights_of(twin), drawn), trains=False)
    found = twin(x)
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def _applied(affine: Affine, x: Tensor, dim: int) -> Tensor:
    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
    return x * affine.scale.view(shape) + affine.shift.view(shape)
