"""The groups of a model's parameters for an optimizer: weight decay on the weights, and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import Parameter, is_lazy

from batchnorm.checks import is_real
from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.nn.patterns import as_patterns, matching
from batchnorm.nn.recognition import is_normalization
from batchnorm.statistics.layers import unwrapped

__all__ = ["param_groups"]


class _Owned(NamedTuple):
    """A parameter, its name, and the tensor that it is or makes: ``tensor`` of ``module``."""

    name: str
    parameter: Parameter
    module: nn.Module
    tensor: str


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: str | Iterable[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    frozen: bool = True,
    named: bool = False,
) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups for an optimizer: gamma, beta and biases without weight decay.

    A group whose weight decay is 0 has the parameters of normalization layers of any kind, the biases (parameters
    whose names have the word bias, tables of relative positions among them), all other parameters of fewer than 2
    dimensions, such as scales of residual branches, and those that the model's method ``no_weight_decay()`` names, as
    timm's models have it. For convolutional networks these are the groups of ``timm.optim.param_groups_weight_decay``.

    Every parameter is in one group, under its first name, even where modules share it. A parameter that a
    parametrization uses is treated as the tensor that it makes.

    Parameters
    ----------
    model : Module
        The wrappers of torch.compile and DistributedDataParallel are looked through.
    weight_decay : float
        That of the other parameters.
    no_decay : str or iterable of str
        Glob patterns for the names of further parameters without weight decay, as "*.position_embedding".
    options : mapping, optional
        Further options for the parameters whose names match a pattern, as ``{"backbone.*": {"lr": 1e-4}}``. Each
        pattern makes groups of its own; the first that matches counts. A ``weight_decay`` there takes the place of the
        function's.
    frozen : bool
        Keep the parameters without ``requires_grad``: an optimizer passes over them, and they train once they are
        unfrozen. False leaves them out.
    named : bool
        Add the names of the parameters to each group, as ``"param_names"``, which torch's optimizers put into their
        state dicts.

    Returns
    -------
    list of dict
        For any optimizer of torch: ``{"params": [...], "weight_decay": ...}`` and the further options.

    Raises
    ------
    InputError
        A layer is lazy and has seen no batch, a pattern matches no parameter, the weight decay is negative, or there
        is no parameter.
    UnsupportedError
        FSDP1 has flattened the parameters.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), bn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    >>> groups = bn.param_groups(model, weight_decay=1e-4, named=True)
    >>> [(group["weight_decay"], group["param_names"]) for group in groups]
    [(0.0001, ['0.weight', '2.weight']), (0.0, ['0.bias', '1.weight', '1.bias', '2.bias'])]
    >>> optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    """
    if not is_real(weight_decay) or not 0 <= weight_decay < math.inf:
        raise InputError(f"weight_decay must be a finite number from 0; got {weight_decay!r}")
    model = _opened(model)
    owned = [one for one in _owned(model) if frozen or one.parameter.requires_grad]
    if not owned:
        needed = "" if frozen else " that requires gradients"
        raise InputError(f"the model must have a parameter{needed}; {type(model).__name__} has none")
    names = [one.name for one in owned]
    exempt = {*_named_by_model(model), *matching(as_patterns(no_decay, "no_decay"), names, "no_decay", "parameter")}
    by_pattern = _options(options)
    pattern_of = {
        name: pattern for pattern in reversed(by_pattern) for name in matching([pattern], names, "options", "parameter")
    }
    groups: dict[tuple[str | None, bool], list[_Owned]] = {
        (pattern, decays): [] for pattern in (None, *by_pattern) for decays in (True, False)
    }
    for one in owned:
        groups[pattern_of.get(one.name), one.name not in exempt and _decays(one)].append(one)
    return [
        _group(members, weight_decay if decays else None, by_pattern.get(pattern, {}) if pattern else {}, named)
        for (pattern, decays), members in groups.items()
        if members
    ]


def _opened(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    model = unwrapped(model)
    for path, module in model.named_modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise UnsupportedError(
                "param_groups goes by the shapes of parameters, which FullyShardedDataParallel flattens; got one at "
                f"{path or 'the model itself'}. Use torch.distributed.fsdp.fully_shard, which keeps the shapes"
            )
    return model


def _owned(model: nn.Module) -> Iterator[_Owned]:
    """Iterate over the parameters, each once, with the tensors that they are or make."""
    seen: set[Parameter] = set()
    makes: dict[nn.Module, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        parametrized = getattr(module, "parametrizations", None)
        if isinstance(parametrized, nn.ModuleDict):
            makes.update({each: (module, name) for name, each in parametrized.items()})
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                full_name = f"{path}{path and '.'}{name}"
                if is_lazy(parameter):
                    raise InputError(
                        f"every parameter must have a shape; got {full_name} of a lazy layer that has seen no batch. "
                        "Run the model on a batch first"
                    )
                yield _Owned(full_name, parameter, *makes.get(module, (module, name)))


def _decays(one: _Owned) -> bool:
    """Return whether weight decay is for a parameter: it is no gamma, beta or bias, and has 2 dimensions or more."""
    words = one.tensor.lower().split("_")
    return one.parameter.dim() >= 2 and not is_normalization(one.module) and not {"bias", "biases"} & {*words}


def _named_by_model(model: nn.Module) -> set[str]:
    """Return the names that a model exempts from weight decay by the convention of timm and others."""
    method = getattr(model, "no_weight_decay", None)
    return {*method()} if callable(method) else set()


def _options(options: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(each, Mapping) for each in options.values()):
        raise InputTypeError(
            f"options must map patterns of names to options of groups, as {{'head.*': {{'lr': 0.01}}}}; got {options!r}"
        )
    for pattern, given in options.items():
        for taken in ("params", "param_names"):
            if taken in given:
                raise InputError(f"options of a group must not have {taken}: the model has them; got {pattern!r}")
    return {pattern: dict(options[pattern]) for pattern in as_patterns(options, "options")}


def _group(members: list[_Owned], weight_decay: float | None, options: dict[str, Any], named: bool) -> dict[str, Any]:
    """Return a group; a weight decay of None is 0, whatever the options say."""
    group: dict[str, Any] = {"params": [one.parameter for one in members]}
    group |= options | ({"weight_decay": 0.0} if weight_decay is None else {})
    group.setdefault("weight_decay", weight_decay)
    return group | ({"param_names": [one.name for one in members]} if named else {})
