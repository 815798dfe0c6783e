"""Torch's layers in the place of ours, for tools that know them by their type or compute their formula."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import UnsupportedError
from batchnorm.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.buffers import context_of
from batchnorm.nn.filling import STATISTICS
from batchnorm.nn.layer import Layer, layers_of, overrides_forward
from batchnorm.nn.reading import lost_in_training
from batchnorm.nn.recognition import is_batch_norm
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.acceleration.rewriting import (
    activated_for_forwards,
    idle_activations,
    is_rewritten,
    restore_activations,
    restore_forwards,
)
from batchnorm.surgery.conversion.changes import Origin, kind_of, with_parametrizations
from batchnorm.surgery.graph import read_dataflow
from batchnorm.surgery.norms.children import children_behind
from batchnorm.surgery.norms.formula import ACTIVATIONS
from batchnorm.surgery.opening import COPIES, check_model, copied, is_lazy, untuned
from batchnorm.surgery.report import Left, Replacement, Surgery
from batchnorm.torch_internals import move_hooks_of_the_output

__all__ = ["to_torch"]

KINDS = {BatchNorm1d: nn.BatchNorm1d, BatchNorm2d: nn.BatchNorm2d, BatchNorm3d: nn.BatchNorm3d}
LAZY = {BatchNorm1d: nn.LazyBatchNorm1d, BatchNorm2d: nn.LazyBatchNorm2d, BatchNorm3d: nn.LazyBatchNorm3d}
SETTINGS = ("num_features", "momentum", "affine", "track_running_stats")
Statistics = dict[str, Tensor | None]

NOT_OURS = "it is no layer of batchnorm's"


def to_torch(model: nn.Module, inplace: bool = False) -> tuple[nn.Module, Surgery]:
    """Turn the layers of ours into torch's, each with its activation as a module after it; undoes `convert`.

    At inference the model returned computes the same. An activation makes an ``nn.Sequential`` of the two, so that the
    names in the state dict have a ``.0`` more; modules that `convert` has left behind a layer keep their names. A layer
    with ``sync=True`` becomes a SyncBatchNorm, for any number of dimensions; for tools that take a BatchNorm2d, call
    ``batchnorm.convert(model, sync=False)`` first. Within `use_domain` or `adapt` the statistics in force are taken.
    Modes, devices, dtypes, hooks, parametrizations and other attributes are kept; a frozen layer becomes one of torch's
    in eval mode, which the next ``train()`` ends. Running statistics in float32 beside narrower gamma and beta take
    their dtype, as torch's layers need.

    A layer that `convert` made of a user's subclass, as timm's BatchNormAct2d, becomes that class again, so that names
    stay, unless its activation or ``sync`` was changed since. What `accelerate` fused is taken apart again. Where code
    that cannot be read calls a layer with ``residual=`` or ``mask=``, torch's raises a `TypeError` when it runs.

    Parameters
    ----------
    model : Module
        A model, or a layer.
    inplace : bool
        Change the layers of the model given, with the same parameters and buffers, so that an optimizer keeps working.
        A layer with an activation that is itself given becomes another module: use the one returned.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report of the layers changed and the options lost.

    Raises
    ------
    InputTypeError
        It is no module.
    UnsupportedError
        Torch has no equal of a layer: its channels are in another dimension than 1, it takes any number of dimensions
        (`BatchNorm` without sync), it has a forward of its own, the model calls it with a residual or a mask, or it is
        adapted to each batch by itself. Or the model is in a wrapper (DistributedDataParallel, FSDP, torch.compile),
        TorchScript, or quantized. Nothing is changed.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), bn.BatchNorm1d(8, activation="relu"))
    >>> model, report = bn.to_torch(model, inplace=True)
    >>> print(report)
    layer        before               after
    1       BatchNorm1d   BatchNorm1d, ReLU
    <BLANKLINE>
    Lost in training:
    nonfinite  1
    """
    check_model(model, "to_torch", takes_tuned=not inplace)
    model = untuned(model, "to_torch", inplace=inplace)
    layers = layers_of(model)
    refused = [f"{layer_name(path)}: {reason}" for path, layer in layers.items() if (reason := _refusal(layer))]
    if refused:
        raise UnsupportedError(f"every layer must have an equal among torch's; got {'; '.join(refused)}")
    _check_calls(model, layers)
    fused = activated_for_forwards(model) | {layer for _, layer in idle_activations(model).values()}
    done = tuple(_replacement(path, layer, activates=layer not in fused) for path, layer in layers.items())
    others = {path: module for path, module in model.named_modules() if is_batch_norm(module) and path not in layers}
    left = tuple(Left(path, kind_of(module), NOT_OURS) for path, module in others.items())
    notes = [] if done else ["The model has no layers of batchnorm's, and stays as it is."]
    statistics = {path: _statistics(layer) for path, layer in layers.items()}
    if not inplace:
        notes += [COPIES] if done and any(True for _ in model.parameters()) else []
        model = copied(model, "to_torch")
        statistics = {path: _copies(values) for path, values in statistics.items()}
    restore_forwards(model)
    restore_activations(model)
    for path, values in statistics.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, Layer)
        made = _made(layer, values)
        if layer is model and isinstance(made, nn.Sequential):
            model = made
        else:
            _become(layer, made)
    return model, Surgery(done, left, notes=tuple(notes))


def _check_calls(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Refuse a model whose own code gives a layer more than its input; forwards that `accelerate` wrote are undone."""
    if not layers:
        return
    flow = read_dataflow(model)
    for path, layer in layers.items():
        for step in flow.calls(layer):
            if len(step.node.args) + len(step.node.kwargs) > 1 and not is_rewritten(model.get_submodule(step.block)):
                raise UnsupportedError(
                    f"torch's layers take the input alone; got a call of {layer_name(path)} with more in "
                    f"{layer_name(step.block)}, as residual= or mask=. Compute that in the model"
                )


def _refusal(layer: Layer) -> str:
    """Return why torch has no equal of a layer; empty if it has one."""
    if layer.channel_dim != 1:
        return f"channel_dim={layer.channel_dim}, where torch's layers take the channels in dimension 1"
    if context_of(layer).hooks:
        return "adapted to each batch by itself; leave that context, or give batchnorm.adapt a loader"
    if is_lazy(layer) and layer.activation is not None:
        return f"{type(layer).__name__} has seen no batch yet, and has an activation; run the model on a batch first"
    if overrides_forward(layer) and not children_behind(layer):
        return f"{type(layer).__name__} has a forward of its own"
    if not (isinstance(layer, tuple(KINDS)) or layer.sync):
        return f"{type(layer).__name__} takes any number of dimensions; build it as BatchNorm1d, 2d or 3d"
    return ""


def _statistics(layer: Layer) -> Statistics:
    """Return the running statistics that a forward would use now, in the dtype of narrower parameters."""
    weight, _ = layer.weight_and_bias()
    if is_lazy(layer):
        return {}  # it has none yet, and its copy has buffers of its own
    values: Statistics = {name: getattr(layer, name) for name in STATISTICS}
    if weight is None or weight.dtype.itemsize >= 4:
        return values
    return {name: v.to(weight.dtype) if v is not None and v.is_floating_point() else v for name, v in values.items()}


def _copies(values: Mapping[str, Tensor | None]) -> Statistics:
    return {name: None if v is None else v.detach().clone() for name, v in values.items()}


def _torchs_class(layer: Layer) -> type[nn.Module]:
    if layer.sync:
        return nn.SyncBatchNorm
    kinds: Mapping[type[Layer], type[nn.Module]] = LAZY if is_lazy(layer) else KINDS
    return next(stock for ours, stock in kinds.items() if isinstance(layer, ours))


def _origin(layer: Layer) -> Origin | None:
    """Return the class that `convert` found, where it computes what the layer does."""
    origin = vars(layer).get("converted_from")
    return origin if isinstance(origin, Origin) and origin.fits(layer) else None


def _made(layer: Layer, statistics: Statistics) -> nn.Module:
    """Return torch's modules for a layer; they share all of its tensors but the statistics, which are those given."""
    origin = _origin(layer)
    stock = _torchs_class(layer) if origin is None else origin.kind
    # Two examples tell what a layer of ours has and torch's does not; scripting adds one more attribute.
    surplus = vars(BatchNorm(1, device="meta")).keys() - vars(nn.BatchNorm1d(1, device="meta")).keys()
    surplus = (surplus | {"script_refusal", "script_updates", "converted_from"}) - (
        {"process_group"} if layer.sync else set()
    )
    made = stock.__new__(with_parametrizations(layer, stock))
    made.__dict__.update({name: value for name, value in vars(layer).items() if name not in surplus})
    made.__dict__.update({name: getattr(layer, name) for name in SETTINGS}, eps=layer.epsilon())
    lacking = layer.buffers_torch_lacks()
    made._buffers = {name: values for name, values in layer._buffers.items() if name not in lacking} | statistics
    made._non_persistent_buffers_set = layer._non_persistent_buffers_set.difference(lacking)
    made.training = layer.trains()
    if origin is not None:
        made._modules = origin.children_of(layer)
        return made
    behind = _behind(layer)
    if not behind:
        return made
    made._modules = {name: child for name, child in layer._modules.items() if name not in behind}
    both = nn.Sequential(OrderedDict({"0": made} | behind))
    for module in (both, *behind.values()):
        module.training = layer.training
    move_hooks_of_the_output(made, both)
    return both


def _behind(layer: Layer) -> dict[str, nn.Module]:
    """Return the modules that run behind torch's layer, by their names: the layer's activation, and its children."""
    activation = {} if layer.activation is None else {"1": ACTIVATIONS[layer.activation]()}
    return activation | {name: layer.get_submodule(name) for name in children_behind(layer)}


def _become(layer: Layer, made: nn.Module) -> None:
    """Turn a layer into another module, so that whatever refers to it goes on."""
    attributes: dict[str, Any] = vars(made)
    vars(layer).clear()
    vars(layer).update(attributes)
    layer.__class__ = type(made)  # type: ignore[assignment]


def _replacement(path: str, layer: Layer, *, activates: bool) -> Replacement:
    origin = _origin(layer)
    behind = _behind(layer).values() if activates and origin is None else ()
    kind = _torchs_class(layer) if origin is None else origin.kind
    after = [kind.__name__, *(type(module).__name__ for module in behind)]
    lost = [option for option in lost_in_training(layer) if not (layer.sync and option == "sync=True")]
    return Replacement(path, type(layer).__name__, ", ".join(after), tuple(lost))
