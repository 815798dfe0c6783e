"""What becomes of one layer in `convert`: decided before the first change, and then done to the layer itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm import nn as layers
from batchnorm.checks import Activation
from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer
from batchnorm.nn.options import Options, checked_options
from batchnorm.surgery.norms.children import children_behind, run_children
from batchnorm.surgery.norms.formula import Norm, activation_name, read_norm
from batchnorm.surgery.norms.own_code import lost_member
from batchnorm.surgery.opening import deep_copy, is_lazy
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["NUMBERS", "OPTIONS", "Conversion", "Origin", "decide", "kind_of", "with_parametrizations"]

OPTIONS = tuple(field.name for field in fields(Options))
NUMBERS = ("eps", "momentum")

ALREADY = "it is a layer of batchnorm's already"

KINDS: dict[int | None, type[Layer]] = {
    1: layers.BatchNorm1d,
    2: layers.BatchNorm2d,
    3: layers.BatchNorm3d,
    None: layers.BatchNorm,
}
LAZY: dict[int | None, type[Layer]] = {
    1: layers.LazyBatchNorm1d,
    2: layers.LazyBatchNorm2d,
    3: layers.LazyBatchNorm3d,
    None: layers.LazyBatchNorm,
}
RESERVED = {*OPTIONS, "frozen_statistics", "frozen_affine", "step_state", "skipped_batches", "samples_seen"}
"""Names of attributes and buffers that layers of ours have, and others do not."""


@dataclass(frozen=True)
class Conversion:
    """What becomes of a layer.

    Attributes
    ----------
    kind : type of Layer
    options : Options
    num_features : int
    eps : float
    momentum : float or None
    frozen : bool
    behind : tuple of str
        The children that run behind the normalization.
    dropped : tuple of str
        The children whose activation the layer computes itself, and those that do nothing.
    activation : Module or None
        A new child, which runs last.
    counts : bool
        The count of batches is in the state dict.
    is_ours : bool
        The layer is one of ours already, which gets options.
    """

    kind: type[Layer]
    options: Options
    num_features: int
    eps: float
    momentum: float | None
    frozen: bool = False
    behind: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    activation: nn.Module | None = None
    counts: bool = True
    is_ours: bool = False

    def described(self, layer: nn.Module) -> str:
        """Return the classes that run one after the other, and the activation that the layer computes itself."""
        kind = f"bn.{self.kind.__name__}"
        if self.options.activation is not None:
            kind += f" with {self.options.activation}"
        behind = [layer._modules[name] for name in self.behind] + [self.activation]
        return ", ".join([kind, *(type(each).__name__ for each in behind if each is not None)])

    def apply(self, layer: nn.Module) -> None:
        """Convert a layer: change its class, and add the attributes of ours."""
        if self.is_ours:
            assert isinstance(layer, Layer)
            layer.set_options(self.options)
            layer.eps, layer.momentum = self.eps, self.momentum
            return
        kind = type(layer).__bases__[0] if is_parametrized(layer) else type(layer)
        children = {name: child if name in self.dropped else None for name, child in layer._modules.items()}
        has_parameters = not (self.frozen and _turn_buffers_into_parameters(layer))
        for name in self.dropped:
            del layer._modules[name]
        for name in ("weight", "bias"):
            if not hasattr(layer, name):
                layer.register_parameter(name, None)
        if "num_batches_tracked" not in layer._buffers:
            mean = layer._buffers["running_mean"]
            count = None if mean is None else torch.zeros((), dtype=torch.int64, device=mean.device)
            layer.register_buffer("num_batches_tracked", count, persistent=self.counts)
        settings = {
            "num_features": self.num_features,
            "affine": any(layer._parameters.get(name) is not None for name in ("weight", "bias")),
            "track_running_stats": layer._buffers["running_mean"] is not None,
        }
        vars(layer).update({name: vars(layer).get(name, value) for name, value in settings.items()})
        vars(layer)["momentum"] = self.momentum
        device = next((values.device for values in layer._buffers.values() if values is not None), None)
        layer.__class__ = with_parametrizations(layer, self.kind)
        assert isinstance(layer, Layer)
        layer.eps = self.eps
        layer.adopt(self.options, device)
        if self.frozen:
            layer.freeze(statistics=True, affine=not has_parameters)
        behind = self.behind
        if self.activation is not None:
            name = next(name for name in ("act", "act_", "act__") if not hasattr(layer, name))
            layer.register_module(name, copy.deepcopy(self.activation).train(layer.training))
            behind += (name,)
        run_children(layer, behind)
        if issubclass(kind, TorchBatchNorm) and not kind.__module__.startswith("torch.nn.modules.") and not self.frozen:
            vars(layer)["converted_from"] = Origin(kind, children, behind, self.options.activation)


@dataclass(frozen=True)
class Origin:
    """The class of a user's layer before `convert`, which `to_torch` gives back; it stands in the layer's attributes.

    Attributes
    ----------
    kind : type of Module
    children : dict of str to (Module or None)
        The children that it had, in their order; None where the layer still has the child.
    names : tuple of str
        The children that run behind the layer of ours.
    activation : str or None
        The option of the layer of ours.
    """

    kind: type[nn.Module]
    children: dict[str, nn.Module | None]
    names: tuple[str, ...]
    activation: Activation | None

    def fits(self, layer: Layer) -> bool:
        """Return whether a layer still does what its class did."""
        alike = (layer.activation, children_behind(layer)) == (self.activation, self.names)
        return alike and layer.sync is issubclass(self.kind, nn.SyncBatchNorm)

    def children_of(self, layer: Layer) -> dict[str, nn.Module | None]:
        """Return the children that its class had, in the mode of the layer."""
        gone = {name: child.train(layer.training) for name, child in self.children.items() if child is not None}
        added = {name: child for name, child in layer._modules.items() if name not in {*self.children, *self.names}}
        return {name: gone.get(name, layer._modules.get(name)) for name in self.children} | added


def with_parametrizations(layer: nn.Module, kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a layer becomes, with the properties by which parametrizations replace its parameters."""
    if not is_parametrized(layer):
        return kind
    parametrized = type(layer)
    own = {name: value for name, value in vars(parametrized).items() if name not in ("__dict__", "__weakref__")}
    return type(parametrized.__name__, (kind,), own)


def decide(layer: nn.Module, given: Mapping[str, Any]) -> Conversion | str:
    """Return what becomes of a layer with the options given, or the reason why it is left alone."""
    if isinstance(layer, Layer):
        return _with_options(layer, given)
    norm = read_norm(layer)
    if isinstance(norm, str):
        return norm
    options = Options()
    if isinstance(layer, nn.SyncBatchNorm):
        options = replace(options, sync=True, process_group=layer.process_group)
    behind = _Behind.of(layer, norm)
    asked = given.get("activation")
    if asked is not None and behind.has_activation and behind.option != asked:
        return f"activation={asked!r} was given, and it has an activation of its own"
    obstacle = _obstacle(layer, behind)
    if obstacle:
        return obstacle
    given = {**given, "activation": asked or behind.option}
    if given.get("sync") is False:
        options = Options()
    lazy = is_lazy(layer)
    tracks = getattr(layer, "track_running_stats", norm.running_mean is not None)
    options_or_reason = _checked(replace(options, **_of(OPTIONS, given)), tracks)
    if isinstance(options_or_reason, str):
        return options_or_reason
    conversion = Conversion(
        kind=(LAZY if lazy else KINDS)[norm.dims],
        options=options_or_reason,
        num_features=norm.num_features,
        eps=given.get("eps", norm.eps),
        momentum=given.get("momentum", norm.momentum),
        frozen=norm.frozen,
        behind=behind.names,
        dropped=behind.dropped,
        activation=behind.activation,
        counts=isinstance(layer, TorchBatchNorm) or _loads_a_count(layer),
    )
    is_torchs = type(layer).__module__.startswith("torch.nn.modules.")
    return ("" if is_torchs else _why_not(conversion, layer)) or conversion


def kind_of(layer: nn.Module) -> str:
    """Return what reports call a layer: its class, with "bn." before those of ours."""
    return f"bn.{type(layer).__name__}" if isinstance(layer, Layer) else type(layer).__name__


def _with_options(layer: Layer, given: Mapping[str, Any]) -> Conversion | str:
    options = _checked(replace(layer.options(), **_of(OPTIONS, given)), layer.track_running_stats)
    if isinstance(options, str):
        return options
    eps, momentum = given.get("eps", layer.epsilon()), given.get("momentum", layer.momentum)
    if (options, eps, momentum) == (layer.options(), layer.epsilon(), layer.momentum):
        return ALREADY
    kind = next(kind for kind in KINDS.values() if isinstance(layer, kind))
    return Conversion(kind, options, layer.num_features, eps, momentum, behind=children_behind(layer), is_ours=True)


def _of(names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _checked(options: Options, tracks: bool) -> Options | str:
    """Return checked options, or the reason why a layer cannot have them."""
    try:
        return checked_options(options, track_running_stats=tracks)
    except InputError as error:
        return str(error)


class _Behind(NamedTuple):
    """What runs behind the normalization.

    Attributes
    ----------
    option : Activation or None
        The activation that the layer of ours computes itself.
    names : tuple of str
        The children that remain.
    dropped : tuple of str
        The children that go: that activation, and those that do nothing.
    activation : Module or None
        The activation of the layer's own forward, if it is none that ours computes.
    """

    option: Activation | None
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    activation: nn.Module | None

    @property
    def has_activation(self) -> bool:
        """Whether there is something behind the normalization."""
        return self != _Behind(None, (), self.dropped, None)

    @classmethod
    def of(cls, layer: nn.Module, norm: Norm) -> _Behind:
        """Return what runs behind the normalization of a layer."""
        children = {name: layer.get_submodule(name) for name in norm.children}
        acting = [name for name, child in children.items() if type(child) is not nn.Identity or _has_hooks(child)]
        parts = [*(children[name] for name in acting), *([norm.own_activation] if norm.own_activation else [])]
        option = activation_name(parts[0]) if len(parts) == 1 and not _has_hooks(parts[0]) else None
        names = () if option else tuple(acting)
        dropped = tuple(name for name in norm.children if name not in names)
        return cls(option, names, dropped, None if option else norm.own_activation)


def _has_hooks(module: nn.Module) -> bool:
    return any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))


def _obstacle(layer: nn.Module, behind: _Behind) -> str:
    """Return why a layer whose formula is known cannot become one of ours; empty if it can."""
    own = vars(layer).keys() | layer._parameters.keys() | layer._buffers.keys()
    taken = sorted(own & (RESERVED - ({"process_group"} if isinstance(layer, nn.SyncBatchNorm) else set())))
    if taken:
        return f"its attribute {taken[0]} has the name of one of a layer of batchnorm's"
    if {"running_mean", "running_var"} - layer._buffers.keys():
        return "its running statistics are no buffers"
    if is_parametrized(layer) and (behind.names or behind.activation):
        return "it is parametrized and has an activation that a layer of batchnorm's does not compute"
    lost = lost_member(layer)
    return f"its class has {lost}, which would be lost" if lost else ""


def _why_not(conversion: Conversion, layer: nn.Module) -> str:
    """Try a conversion on a copy, and return why it cannot be done; empty if it can."""
    try:
        twin = deep_copy(layer)
        conversion.apply(twin)
    except Exception as error:  # noqa: BLE001 (whatever the class of a user's layer raises)
        return f"{type(layer).__name__} cannot become another class ({type(error).__name__}: {error})".replace(
            "\n", " "
        )
    return ""


def _turn_buffers_into_parameters(layer: nn.Module) -> bool:
    """Make parameters of gamma and beta that are buffers, in the same memory, and return whether there were any."""
    names = [name for name in ("weight", "bias") if layer._buffers.get(name) is not None]
    for name in names:
        values = layer._buffers.pop(name)
        layer._non_persistent_buffers_set.discard(name)
        layer.register_parameter(name, nn.Parameter(values))  # type: ignore[arg-type]
    return bool(names)


def _loads_a_count(layer: nn.Module) -> bool:
    """Return whether a state dict of torch's layer, which has a count of batches, loads strictly into a layer."""
    twin = deep_copy(layer)
    state = twin.state_dict()
    state["num_batches_tracked"] = torch.tensor(0)
    try:
        twin.load_state_dict(state)
    except RuntimeError:
        return False
    return True
