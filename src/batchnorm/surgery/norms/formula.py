"""The formula of a batch normalization layer of any library: read where the forward is known, and else measured.

A layer with a forward of its own is probed (`probing`): a copy of it must equal batch normalization with the attributes
of the layer, followed by its child modules or a known activation. So no formula is guessed from the name of a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.checks import Activation
from batchnorm.nn.layer import Layer, overrides_forward
from batchnorm.nn.recognition import is_batch_norm
from batchnorm.surgery.norms.children import children_behind
from batchnorm.surgery.norms.probing import Formula, accepted_dims, stays_in_eval
from batchnorm.surgery.norms.trials import probe
from batchnorm.surgery.opening import deep_copy, is_lazy
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["ACTIVATIONS", "Norm", "activation_name", "is_batch_norm", "read_norm"]

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
"""The modules that compute the activations of our layers, with their default arguments."""

MOMENTUM = 0.1
"""Torch's default, for a layer that updates no statistics and so has no momentum."""

_STOCK_FORWARDS = (TorchBatchNorm.forward, nn.SyncBatchNorm.forward)
_BY_DIMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False)
class Norm:
    """What a batch normalization layer computes.

    Attributes
    ----------
    module : Module
    dims : int or None
        1, 2 or 3, as in BatchNorm1d, 2d and 3d; None for any number of dimensions.
    num_features : int
        0 for a lazy layer.
    eps : float
    momentum : float or None
        Weight of the new value in the running statistics; None keeps their cumulative mean.
    weight, bias, running_mean, running_var : Tensor or None
        The tensors themselves. Those of a parametrized or pruned layer are computed.
    activation : Module or None
        Applied last: a child of the layer, an `nn.Sequential` of several (as dropout and an activation), or a new
        module for an activation that the layer's own forward computes.
    frozen : bool
        The running statistics are used in training too, and never updated.
    children : tuple of str
        The names of the layer's children that run one after the other behind the normalization.
    own_activation : Module or None
        A new module for the activation that the layer's own forward computes after them.
    """

    module: nn.Module
    dims: int | None
    num_features: int
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    activation: nn.Module | None = None
    frozen: bool = False
    children: tuple[str, ...] = ()
    own_activation: nn.Module | None = None

    @property
    def uses_running_statistics_in_eval(self) -> bool:
        """Whether there are running statistics, so that eval mode does not use those of the batch."""
        return self.running_mean is not None and self.running_var is not None


def read_norm(module: nn.Module) -> Norm | str:
    """Return what a batch normalization layer computes, or the reason why that is not known: a clause.

    A layer of ours is read with its activation. Its other options change training alone, except for ``channel_dim``.
    """
    if not is_batch_norm(module):
        return f"{type(module).__name__} is no batch normalization layer"
    if "forward" in vars(module):
        return "its forward was replaced by an assignment"
    if isinstance(module, Layer):
        return _ours(module)
    if type(module).__call__ is not nn.Module.__call__:
        return f"{type(module).__name__} is called in a way of its own, or within an open context of batchnorm"
    if isinstance(module, TorchBatchNorm) and type(module).forward in (
        TorchBatchNorm.forward,
        nn.SyncBatchNorm.forward,
    ):
        dims = accepted_dims(module)
        return dims if isinstance(dims, str) else _norm(module, Formula(dims, module.eps, stays_in_eval(module)))
    if is_lazy(module):
        return f"{type(module).__name__} is lazy and has a forward of its own"
    formula = probe(module)
    return formula if isinstance(formula, str) else _norm(module, formula)


def activation_name(module: nn.Module) -> Activation | None:
    """Return the name of the activation of our layers that a module computes; None if it computes another function.

    A module of another class than torch's is compared on values in float64, in eval and in train mode.
    """
    name = next((name for name, kind in ACTIVATIONS.items() if type(module) is kind), None)
    if name is not None and name not in ("leaky_relu", "gelu"):  # these two have arguments
        return name
    if any(True for _ in (*module.parameters(), *module.buffers())):
        return None
    return next((name for name, kind in ACTIVATIONS.items() if _computes(module, kind())), None)


@torch.no_grad()
def _computes(module: nn.Module, activation: nn.Module) -> bool:
    x = torch.cat((torch.linspace(-9, 9, 46), torch.tensor([-1e4, 1e4]))).double().view(2, 4, 3, 2)
    expected, twin = activation(x), deep_copy(module)
    try:
        found = [twin.train(mode).forward(x.clone()) for mode in (False, True)]
        return all(isinstance(y, Tensor) and torch.allclose(y, expected, rtol=1e-12, atol=1e-12) for y in found)
    except Exception:  # noqa: BLE001 (whatever its forward raises)
        return False


def _ours(layer: Layer) -> Norm | str:
    children = children_behind(layer)
    if overrides_forward(layer) and not children:
        return f"{type(layer).__name__} has a forward of its own"
    dims = next((i for i, kind in enumerate(_BY_DIMS, 1) if isinstance(layer, kind)), None)
    activation = None if layer.activation is None else ACTIVATIONS[layer.activation]().train(layer.training)
    formula = Formula(dims, layer.epsilon(), layer.frozen_statistics, children, activation)
    return _norm(layer, formula)


def _norm(module: nn.Module, formula: Formula) -> Norm:
    mean, var, weight, bias = (
        getattr(module, name, None) for name in ("running_mean", "running_var", "weight", "bias")
    )
    sized = [values for values in (mean, weight, bias) if values is not None and not is_lazy(module)]
    return Norm(
        module,
        formula.dims,
        sized[0].shape[0] if sized else getattr(module, "num_features", 0),
        formula.eps,
        getattr(module, "momentum", MOMENTUM),
        weight,
        bias,
        mean,
        var,
        _behind(module, formula),
        formula.frozen,
        formula.children,
        formula.activation,
    )


def _behind(module: nn.Module, formula: Formula) -> nn.Module | None:
    """Return one module for all that runs behind the normalization; None if that changes nothing."""
    children = [module.get_submodule(name) for name in formula.children]
    parts = [*children, *([formula.activation] if formula.activation is not None else [])]
    if isinstance(module, Layer):  # it computes its own activation first
        parts = [*parts[len(children) :], *children]
    parts = [part for part in parts if type(part) is not nn.Identity]
    if len(parts) > 1:
        return nn.Sequential(*parts).train(module.training)
    return parts[0] if parts else None
