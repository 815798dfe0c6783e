"""Torch's layers in the place of ours, for tools that know them by their type or compute their formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.errors import UnsupportedError
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.buffers import context_of
from batchnorm.nn.filling import STATISTICS
from batchnorm.nn.layer import Layer, layers_of, overrides_forward
from batchnorm.nn.reading import lost_in_training
from batchnorm.statistics.changes import layer_name
from batchnorm.statistics.layers import unwrapped
from batchnorm.surgery.report import Replacement, Surgery
from batchnorm.torch_internals import TorchBatchNorm, move_hooks_of_the_output

__all__ = ["to_torch"]

KINDS = {BatchNorm1d: nn.BatchNorm1d, BatchNorm2d: nn.BatchNorm2d, BatchNorm3d: nn.BatchNorm3d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
SETTINGS = ("num_features", "momentum", "affine", "track_running_stats")
Statistics = dict[str, Tensor | None]


def to_torch(model: nn.Module, inplace: bool = False) -> tuple[nn.Module, Surgery]:
    """Replace the layers of ours by torch's, each with its activation as a module after it.

    At inference the model returned computes the same. An activation makes an ``nn.Sequential`` of the two, so that the
    names in the state dict have a ``.0`` more. Within `use_domain` or `adapt` the statistics in force are taken. Modes,
    devices, dtypes, hooks and other attributes are kept; a frozen layer becomes one of torch's in eval mode, which the
    next ``train()`` ends. Running statistics in float32 beside narrower gamma and beta take their dtype, as torch's
    layers need.

    Where a model calls such a layer with ``residual=`` or ``mask=``, torch's raises a `TypeError` when it runs: add
    the residual in the model.

    Parameters
    ----------
    model : Module
        A model, or a layer. The wrappers of torch.compile and DistributedDataParallel are left out.
    inplace : bool
        Replace them in the model given, with the same parameters and buffers, so that an optimizer keeps working. A
        layer that is itself given cannot be replaced where it is: use the module returned.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report of the layers replaced and the options lost.

    Raises
    ------
    UnsupportedError
        Torch has no equal of a layer: its channels are in another dimension than 1, it takes any number of dimensions
        (`BatchNorm`), it has a forward of its own, or parametrized or uninitialized parameters, or it is adapted to
        each batch by itself. Nothing is replaced.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), bn.BatchNorm1d(8, activation="relu"))
    >>> model, report = bn.to_torch(model)
    >>> print(report)
    layer        before               after
    1       BatchNorm1d   BatchNorm1d, ReLU
    <BLANKLINE>
    Lost in training:
    - nonfinite: 1
    """
    model = unwrapped(model)
    layers = layers_of(model)
    refused = [f"{layer_name(path)}: {reason}" for path, layer in layers.items() if (reason := _refusal(layer))]
    if refused:
        raise UnsupportedError(f"every layer must have an equal among torch's; got {'; '.join(refused)}")
    statistics = {path: _statistics(layer) for path, layer in layers.items()}
    done = tuple(_replacement(path, layer) for path, layer in layers.items())
    notes = () if done else ("The model has no layers of batchnorm's, and stays as it is.",)
    if not inplace:
        model = copy.deepcopy(model)
        layers = layers_of(model)
        statistics = {path: _copies(values) for path, values in statistics.items()}
    made = {layer: _made(layer, statistics[path]) for path, layer in layers.items()}
    for module in list(model.modules()):
        for name, child in [*module._modules.items()]:  # a layer may have several names
            if isinstance(child, Layer):
                module.register_module(name, made[child])
    return made[model] if isinstance(model, Layer) else model, Surgery(done, notes=notes)


def _refusal(layer: Layer) -> str:
    """Return why torch has no equal of a layer; empty if it has one."""
    if layer.channel_dim != 1:
        return f"channel_dim={layer.channel_dim}, where torch's layers take the channels in dimension 1"
    if context_of(layer).hooks:
        return "adapted to each batch by itself; leave that context, or give batchnorm.adapt a loader"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return f"{type(layer).__name__} has seen no batch yet, which sets its channels"
    if is_parametrized(layer):
        return "a parametrized weight or bias; call torch.nn.utils.parametrize.remove_parametrizations first"
    if overrides_forward(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if not isinstance(layer, tuple(KINDS)):
        return f"{type(layer).__name__} takes any number of dimensions; build it as BatchNorm1d, 2d or 3d"
    return ""


def _statistics(layer: Layer) -> Statistics:
    """Return the running statistics that a forward would use now, in the dtype of narrower parameters."""
    weight, _ = layer.weight_and_bias()
    values: Statistics = {name: getattr(layer, name) for name in STATISTICS}
    if weight is None or weight.dtype.itemsize >= 4:
        return values
    return {name: v.to(weight.dtype) if v is not None and v.is_floating_point() else v for name, v in values.items()}


def _copies(values: Mapping[str, Tensor | None]) -> Statistics:
    return {name: None if v is None else v.detach().clone() for name, v in values.items()}


def _torchs_class(layer: Layer) -> type[TorchBatchNorm]:
    return next(stock for ours, stock in KINDS.items() if isinstance(layer, ours))


def _made(layer: Layer, statistics: Statistics) -> nn.Module:
    """Return torch's modules for a layer; they share all of its tensors but the statistics, which are those given."""
    stock = _torchs_class(layer)
    # Two examples tell what a layer of ours has and torch's does not; scripting adds one more attribute.
    ours = next(kind for kind in KINDS if isinstance(layer, kind))
    surplus = vars(ours(1, device="meta")).keys() - vars(stock(1, device="meta")).keys()
    surplus |= {"script_refusal"}
    made = stock.__new__(stock)
    made.__dict__.update({name: value for name, value in vars(layer).items() if name not in surplus})
    made.__dict__.update({name: getattr(layer, name) for name in SETTINGS}, eps=layer.epsilon())
    lacking = layer.buffers_torch_lacks()
    made._buffers = {name: values for name, values in layer._buffers.items() if name not in lacking} | statistics
    made._non_persistent_buffers_set = layer._non_persistent_buffers_set.difference(lacking)
    made.training = layer.trains()
    if layer.activation is None:
        return made
    both = nn.Sequential(made, ACTIVATIONS[layer.activation]())
    for module in (both, both[1]):
        module.training = layer.training
    move_hooks_of_the_output(made, both)
    return both


def _replacement(path: str, layer: Layer) -> Replacement:
    after = [_torchs_class(layer).__name__]
    if layer.activation is not None:
        after.append(type(ACTIVATIONS[layer.activation]()).__name__)
    return Replacement(path, type(layer).__name__, ", ".join(after), tuple(lost_in_training(layer)))
