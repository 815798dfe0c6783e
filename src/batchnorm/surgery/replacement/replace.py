"""Batch normalization replaced by layers that normalize each sample by itself, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.nn.layer import Layer
from batchnorm.surgery.acceleration.rewriting import with_own_forwards
from batchnorm.surgery.examples import Example, eval_outputs, largest_difference, untouched
from batchnorm.surgery.norms.formula import Norm, read_norm
from batchnorm.surgery.opening import COPIES, batch_norms, check_model, is_lazy, opened
from batchnorm.surgery.replacement import substitutes
from batchnorm.surgery.replacement.substitutes import Factory, Recipe, Site
from batchnorm.surgery.report import Left, Replacement, Surgery
from batchnorm.torch_internals import move_hooks, move_hooks_of_the_output

__all__ = ["replace"]

Kind = Literal["group", "layer", "instance", "identity"]

TRAIN = "The model computes something else now, since the running statistics have gone: train it before you use it."


def replace(
    model: nn.Module,
    with_: Kind | Factory,
    inplace: bool = False,
    *,
    example: Example | None = None,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
) -> tuple[nn.Module, Surgery]:
    """Replace batch normalization by layers that normalize each sample by itself, or by layers of your own.

    For batches of one sample, differential privacy and the like. Torch's layers, ours, timm's, SyncBatchNorm and
    FrozenBatchNorm2d are replaced. The new layers take gamma and beta (the same objects with ``inplace=True``), eps,
    mode and hooks; an activation of the layer runs after it, in an ``nn.Sequential`` of the two. Running statistics
    have no place in them, so the model must be trained afterwards.

    Parameters
    ----------
    model : Module
        A model, or a layer.
    with_ : str or callable
        - "group": `nn.GroupNorm` (Wu & He 2018), by default with the largest number of groups up to 32 that divides the
          channels and leaves 4 channels and 16 values per sample in a group. Without an example a group of a
          BatchNorm1d, or of a layer for any number of dimensions, is taken to have its channels alone.
        - "layer": ``nn.GroupNorm(1, C)``, over all channels and positions of a sample; on (N, C) that is
          ``nn.LayerNorm(C)``.
        - "instance": `nn.InstanceNorm1d`, 2d or 3d, over the positions of each channel and sample. A BatchNorm1d needs
          the example, which shows that its input has positions.
        - "identity": `nn.Identity`; gamma and beta are lost. `batchnorm.fold` removes layers without changing the
          outputs.
        - A function that is called once with each batch normalization layer, and returns a new module, or None to leave
          the layer. A normalization layer that it makes with gamma 1 and beta 0 takes the layer's.
    inplace : bool
        Replace the layers in the model given. A layer that is itself given cannot be replaced where it is: use the
        module returned.
    example : Tensor, tuple or mapping, optional
        Input of the model, which shows the shape of each layer's input. The model returned is run on it.
    num_groups, channels_per_group : int, optional
        For "group": the number of groups of each layer, or the channels in each group.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and the report. It lists the layers that were left because a group would hold
        one or two values, the groups do not divide the channels, the layer's formula is not known, and the like.

    Raises
    ------
    InputError
        The model has no batch normalization layer, an option is out of its range, or the example does not fit.
    InputTypeError
        The model is no module, or a function returns something else than a module.
    UnsupportedError
        The model is wrapped, compiled, scripted or quantized, or fails on the example with its new layers. The model
        given is as it was.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
    >>> model, report = bn.replace(model, "group")
    >>> print(report)
    layer        before               after
    1       BatchNorm2d   GroupNorm(16, 64)
    <BLANKLINE>
    The model computes something else now, since the running statistics have gone:
    train it before you use it.
    The parameters are copies: make a new optimizer, or call
    batchnorm.surgery.update_optimizer(old_model, new_model, optimizer).
    """
    recipe = _recipe(with_, num_groups, channels_per_group)
    check_model(model, "replace")
    model = with_own_forwards(model, "replace", inplace=inplace)
    difference = None
    if example is not None and inplace:  # a trial on a copy, so that an error leaves the model as it was
        trial = replace(model, with_, example=example, num_groups=num_groups, channels_per_group=channels_per_group)
        difference = trial[1].max_difference
    layers = batch_norms(model, "replace")
    before = None if example is None or inplace else eval_outputs(model, example)
    calls = {} if example is None else _calls(model, layers, example)
    model = opened(model, "replace", inplace=inplace)
    decisions = {
        path: _decide(path, layer, calls.get(path, []), recipe) for path, layer in batch_norms(model, "replace").items()
    }
    model = _placed(model, [each for each in decisions.values() if isinstance(each, _Decision)])
    if example is not None and before is not None:
        difference = largest_difference(before, _outputs_after(model, example))
    replaced = tuple(each.report for each in decisions.values() if isinstance(each, _Decision))
    left = tuple(each for each in decisions.values() if isinstance(each, Left))
    notes = [note for note, holds in ((TRAIN, replaced), (COPIES, not inplace)) if holds]
    return model, Surgery(replaced, left, difference, tuple(notes))


class _Call(NamedTuple):
    """A call of a layer on the example: the shape of its input, and whether there are further arguments."""

    shape: torch.Size
    plain: bool


class _Decision(NamedTuple):
    """A layer, the new one, the activation that runs after it, and the report of both."""

    layer: nn.Module
    new: nn.Module
    activation: nn.Module | None
    report: Replacement


def _recipe(with_: Kind | Factory, num_groups: int | None, channels_per_group: int | None) -> Recipe:
    """Return the recipe that the arguments ask for."""
    if with_ == "group":
        return substitutes.group(num_groups, channels_per_group)
    for name, value in {"num_groups": num_groups, "channels_per_group": channels_per_group}.items():
        if value is not None:
            raise InputError(f"{name} is an option of with_='group'; got with_={with_!r}")
    if isinstance(with_, str):
        if with_ not in get_args(Kind):
            raise InputError(f"with_ must be {', '.join(map(repr, get_args(Kind)))} or a function; got {with_!r}")
        return {"layer": substitutes.layer, "instance": substitutes.instance, "identity": substitutes.identity}[with_]
    if isinstance(with_, type | nn.Module) or not callable(with_):
        raise InputTypeError(
            f"with_ must be {', '.join(map(repr, get_args(Kind)))} or a function from a layer to a new module; got "
            f"{with_!r}. A class needs its arguments, as in lambda layer: torch.nn.GroupNorm(8, layer.num_features)"
        )
    return substitutes.made_by(with_)


def _calls(model: nn.Module, layers: Mapping[str, nn.Module], example: Example) -> dict[str, list[_Call]]:
    """Return the calls of each layer, by path, while the model runs on the example in eval mode."""
    found: dict[str, list[_Call]] = {path: [] for path in layers}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = [value for value in (*arguments, *keywords.values()) if value is not None]
            if given and isinstance(given[0], Tensor):
                found[path].append(_Call(given[0].shape, len(given) == 1))

        return hook

    with untouched(model):
        for path, layer in layers.items():
            layer.register_forward_pre_hook(hook_for(path), with_kwargs=True)
        eval_outputs(model, example)
    return found


def _decide(path: str, layer: nn.Module, calls: list[_Call], recipe: Recipe) -> _Decision | Left:
    """Return the new layer, or the reason why there is none; nothing is changed."""
    kind = type(layer).__name__
    reason = _refusal(layer, calls, any_channels=recipe is substitutes.identity)
    if reason:
        return Left(path, kind, reason)
    norm = read_norm(layer)
    if isinstance(norm, str):
        return Left(path, kind, norm)
    new = recipe(Site(path, norm, tuple(call.shape for call in calls)))
    if isinstance(new, str):
        return Left(path, kind, new)
    after = _described(new) if norm.activation is None else f"{_described(new)}, {type(norm.activation).__name__}"
    return _Decision(layer, new, norm.activation, Replacement(path, kind, after, _lost(norm, new)))


def _refusal(layer: nn.Module, calls: list[_Call], *, any_channels: bool) -> str:
    """Return why a layer cannot be replaced, whatever by; empty if it can."""
    if is_lazy(layer):
        return "it is lazy and has seen no batch, which sets its channels"
    if not {"weight", "bias"} <= {*layer._parameters, *layer._buffers}:
        return "its weight or bias is computed, as by pruning or a parametrization"
    if isinstance(layer, Layer) and layer.channel_dim != 1 and not any_channels:
        return f"it has channel_dim={layer.channel_dim}, and other layers take the channels in dimension 1"
    if not all(call.plain for call in calls):
        return "it is called with residual= or mask=, which other layers do not take"
    return ""


def _lost(norm: Norm, new: nn.Module) -> tuple[str, ...]:
    """Return the parameters that the new layer does not have, and the state that it cannot keep."""
    lost = []
    for name, values in {"weight": norm.weight, "bias": norm.bias}.items():
        kept = getattr(new, name, None)
        if values is not None and not (isinstance(kept, Tensor) and (values.is_meta or torch.equal(kept, values))):
            lost.append(name)
    if norm.frozen:
        lost.append("frozen_statistics=True")
    if isinstance(norm.module, Layer) and norm.module.domain_names:
        lost.append(f"domains={norm.module.domain_names!r}")
    return tuple(lost)


def _described(new: nn.Module) -> str:
    """Return the class of a new layer, with the numbers of a group norm."""
    sizes = f"({new.num_groups}, {new.num_channels})" if type(new) is nn.GroupNorm else ""
    return f"{type(new).__name__}{sizes}"


def _placed(model: nn.Module, decisions: list[_Decision]) -> nn.Module:
    """Put the new layers into the places of the old ones, and return the model: a new one if it is a layer itself."""
    new: dict[nn.Module, nn.Module] = {}
    for layer, made, activation, _ in decisions:
        made.train(layer.training)
        move_hooks(layer, made)
        new[layer] = made
        if activation is not None:
            new[layer] = nn.Sequential(made, activation)
            new[layer].training = layer.training
            move_hooks_of_the_output(made, new[layer])
    for module in [*model.modules()]:
        for name, child in [*module._modules.items()]:  # a layer may have several names
            if child in new:
                module.register_module(name, new[child])
    return new.get(model, model)


def _outputs_after(model: nn.Module, example: Example) -> list[Tensor]:
    try:
        return eval_outputs(model, example)
    except InputError as error:
        raise UnsupportedError(
            f"the model must run with its new layers, and fails on the example: {error.__cause__!r}. Leave the layers "
            "that it looks into: give replace a function that returns None for them"
        ) from error
