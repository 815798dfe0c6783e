"""Layers in the place of batch normalization that normalize each sample by itself, and the size of their groups.

A group with one value is normalized to 0, and one with two to plus and minus 1, whatever the values are. So the size of
a group is never left to chance: without an example, a BatchNorm1d is taken to get (N, C), and 2d and 3d layers several
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from batchnorm.checks import is_whole
from batchnorm.errors import InputError, InputTypeError
from batchnorm.nn.recognition import is_normalization
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.norms.formula import Norm

__all__ = ["Factory", "Recipe", "Site", "group", "identity", "instance", "layer", "made_by"]

Factory = Callable[[nn.Module], nn.Module | None]
"""Returns the module that takes the place of a layer, or None."""

MOST_GROUPS = 32
"""Groups per layer, the default of Wu & He (2018)."""

FEWEST_CHANNELS, FEWEST_VALUES = 4, 16
"""Channels of a group, and values of a sample in it, that the library chooses at least where the layer has as many."""

SMALLEST = 3
"""Values that a group must have: two are normalized to plus and minus 1."""

INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@dataclass(frozen=True)
class Site:
    """A batch normalization layer to replace, and the inputs that it got on an example.

    Attributes
    ----------
    path : str
    norm : Norm
    shapes : tuple of Size
        The shapes of its inputs; empty without an example, or where the example does not reach the layer.
    """

    path: str
    norm: Norm
    shapes: tuple[torch.Size, ...] = ()

    @property
    def positions(self) -> int | None:
        """The values of a channel per sample, at least; None if they are not known, but several."""
        if self.shapes:
            return min(math.prod(shape[2:]) for shape in self.shapes)
        return None if self.norm.dims in (2, 3) else 1

    @property
    def dims(self) -> int | None:
        """The dimensions of positions in all inputs; None if they are not known."""
        seen = {len(shape) - 2 for shape in self.shapes}
        if seen:
            return seen.pop() if len(seen) == 1 else None
        return None if self.norm.dims == 1 else self.norm.dims


Recipe = Callable[[Site], nn.Module | str]
"""Makes the layer for a site, or returns the reason why there is none: a clause."""


def group(num_groups: int | None = None, channels_per_group: int | None = None) -> Recipe:
    """Return the recipe for `nn.GroupNorm`, with a number or size of groups, or groups chosen for each layer.

    Raises
    ------
    InputError
        Both are given, or one is not a whole number from 1.
    """
    for name, value in {"num_groups": num_groups, "channels_per_group": channels_per_group}.items():
        if value is not None and not (is_whole(value) and value >= 1):
            raise InputError(f"{name} must be None or a whole number from 1; got {value!r}")
    if num_groups is not None and channels_per_group is not None:
        raise InputError(
            "num_groups and channels_per_group exclude each other; got "
            f"num_groups={num_groups} and channels_per_group={channels_per_group}"
        )

    def recipe(site: Site) -> nn.Module | str:
        channels = site.norm.num_features
        if channels_per_group is not None:
            if channels % channels_per_group:
                return f"groups of {channels_per_group} channels do not divide its {channels} channels"
            return _group_norm(site, channels // channels_per_group)
        if num_groups is not None:
            if channels % num_groups:
                return f"{num_groups} groups do not divide its {channels} channels"
            return _group_norm(site, num_groups)
        return _group_norm(site, _chosen_groups(channels, site.positions))

    return recipe


def layer(site: Site) -> nn.Module | str:
    """Make a group norm with a single group, which is layer normalization over channels and positions."""
    return _group_norm(site, 1)


def instance(site: Site) -> nn.Module | str:
    """Make an instance norm, which normalizes each channel of each sample over its positions."""
    if site.dims is None:
        return "its number of dimensions is not known; give an example"
    if site.dims == 0:
        return _too_small(site, "a channel", 1)
    if site.positions is not None and site.positions < SMALLEST:
        return _too_small(site, "a channel", site.positions)
    made = INSTANCE_NORMS[site.dims](site.norm.num_features, eps=site.norm.eps)
    take_affine(made, site.norm)
    return made


def identity(site: Site) -> nn.Module | str:
    """Make a layer that returns its input."""
    return nn.Identity()


def made_by(factory: Factory) -> Recipe:
    """Return the recipe that calls a function with each layer.

    The recipe raises an `InputTypeError` if the function returns anything else than a module or None, and an
    `InputError` if it returns a module that the model or another layer has already.
    """
    returned: list[nn.Module] = []

    def recipe(site: Site) -> nn.Module | str:
        norm = site.norm
        made = factory(norm.module)
        if made is None:
            return "the function returned None for it"
        if not isinstance(made, nn.Module):
            raise InputTypeError(
                f"the function must return a module or None; got {type(made).__name__} for {layer_name(site.path)}"
            )
        if made is norm.module:
            return "the function returned the layer itself"
        if any(made is other for other in returned):
            raise InputError(
                "the function must return a new module for each layer; got the one of an earlier layer for "
                f"{layer_name(site.path)}"
            )
        returned.append(made)
        _move(made, norm)
        if _is_new_norm(made, norm.num_features):
            take_affine(made, norm)
        return made

    return recipe


def _move(made: nn.Module, norm: Norm) -> None:
    """Move a module to the device and dtype of a layer."""
    like = next((values for values in (norm.weight, norm.bias, norm.running_mean) if values is not None), None)
    if like is not None:
        made.to(like.device, like.dtype)


def _is_new_norm(made: nn.Module, channels: int) -> bool:
    """Return whether a module is a normalization layer whose gamma and beta, one per channel, are 1 and 0."""
    weight, bias = getattr(made, "weight", None), getattr(made, "bias", None)
    if not is_normalization(made) or not isinstance(weight, Parameter) or weight.shape != (channels,):
        return False
    return bool((weight == 1).all()) and (bias is None or bool((bias == 0).all()))


def take_affine(made: nn.Module, norm: Norm) -> None:
    """Give a new layer the parameters gamma and beta of a batch normalization layer, or none where it has none."""
    for name, values in {"weight": norm.weight, "bias": norm.bias}.items():
        made.register_parameter(name, _parameter(values))
    if "affine" in vars(made):  # which repr shows
        vars(made)["affine"] = norm.weight is not None


def _parameter(values: Tensor | None) -> Parameter | None:
    """Return the parameter itself, or one without a gradient for the buffer of a frozen layer."""
    if values is None or isinstance(values, Parameter):
        return values
    return Parameter(values, requires_grad=False)


def _chosen_groups(channels: int, positions: int | None) -> int:
    """Return the largest number of groups that leaves enough channels and values in each."""
    for groups in range(min(MOST_GROUPS, channels), 1, -1):
        size = channels // groups
        if (
            channels % groups == 0
            and size >= FEWEST_CHANNELS
            and (positions is None or size * positions >= FEWEST_VALUES)
        ):
            return groups
    return 1


def _group_norm(site: Site, groups: int) -> nn.Module | str:
    channels = site.norm.num_features
    if site.positions is not None and channels // groups * site.positions < SMALLEST:
        return _too_small(site, "a group", channels // groups * site.positions)
    made = nn.GroupNorm(groups, channels, eps=site.norm.eps, affine=False)
    take_affine(made, site.norm)
    return made


def _too_small(site: Site, part: str, values: int) -> str:
    where = f"input {tuple(site.shapes[0])}" if site.shapes else f"(N, {site.norm.num_features})"
    outcome = "all of them become 0" if values == 1 else "nothing but their order is left"
    return f"{part} of {where} has {values} value{'s' * (values != 1)} per sample, and {outcome}"
