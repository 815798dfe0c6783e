"""The optimizer of a model that surgery has copied: its groups and its state, for the parameters of the copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.statistics.layers import unwrapped

__all__ = ["update_optimizer"]

Parameters = dict[str, nn.Parameter]


class _Entry(NamedTuple):
    """A parameter of a group, with its name where the optimizer was given names."""

    parameter: Tensor
    name: str | None


def update_optimizer(
    old_model: nn.Module, new_model: nn.Module, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Replace the parameters of a model in an optimizer by those of the model that surgery made of it, in place.

    A parameter takes the place of that of the same name in its group, and its state (momentum, moments, step), if the
    shape is the same. Where surgery has put a layer into an `nn.Sequential`, so that the name has one part more, that
    counts as the same name. Options of the groups stay as they are, and so do learning rate schedulers.

    - A parameter that the new model does not have goes, with its state.
    - A new parameter joins the group of the last parameter before it, in the order of the new model, that has as many
      dimensions: gamma and beta join the other gammas, betas and biases, which may have no weight decay. Without such
      a parameter, it joins the group of the last one before it. It is left out where it requires no gradient, or where
      the optimizer does not have the last parameter before it, as when only a head is trained.
    - Parameters of the optimizer that are not the old model's stay.

    After surgery with ``inplace=True`` an optimizer goes on as it is. Given the same model twice, each parameter that
    the optimizer does not have counts as new; those that have gone stay, since nothing tells them from those of other
    models, and get no gradients.

    Parameters
    ----------
    old_model : Module
        The model that was given to surgery.
    new_model : Module
        The model that it returned.
    optimizer : Optimizer
        With parameters of old_model, and maybe of others.

    Returns
    -------
    Optimizer
        The optimizer given.

    Raises
    ------
    InputTypeError
        An argument is no module, or no optimizer.
    InputError
        The optimizer has no parameter of old_model, as after a first call; or new_model has no parameter like one that
        it has, as another model.
    UnsupportedError
        It is LBFGS, which has one history of all parameters, and other parameters are to be optimized now.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> old = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    >>> optimizer = torch.optim.AdamW(old.parameters(), lr=1e-3)
    >>> new, report = bn.convert(old)
    >>> optimizer = bn.surgery.update_optimizer(old, new, optimizer)
    >>> optimizer.param_groups[0]["params"][0] is new[0].weight
    True
    """
    old, new = _parameters(old_model, "old_model"), _parameters(new_model, "new_model")
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise InputTypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not _ids(given) & (_ids(old.values()) | _ids(new.values())):
        raise InputError(
            f"optimizer must have parameters of old_model; got {type(optimizer).__name__} with {len(given)} others"
        )
    counterparts = _counterparts(old, new)
    _check_models(given, old, new, counterparts)
    groups = [_renewed(group, old, new, counterparts) for group in optimizer.param_groups]
    _distribute(new, groups, set() if unwrapped(old_model) is unwrapped(new_model) else _ids(counterparts.values()))
    _check_history(optimizer, given, [entry.parameter for group in groups for entry in group])
    for parameter in given:
        _hand_on(optimizer.state, parameter, old, new, counterparts)
    for group, entries in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = [entry.parameter for entry in entries]  # LBFGS refers to the list
        if "param_names" in group:
            group["param_names"] = [entry.name for entry in entries]
    return optimizer


def _check_models(
    given: list[Tensor], old: Parameters, new: Parameters, counterparts: Mapping[int, nn.Parameter]
) -> None:
    """Refuse a new model that goes on with no parameter of the optimizer, as one of another name in a script."""
    like = [each for each in given if id(each) in counterparts and _shape(counterparts[id(each)]) == _shape(each)]
    if new and not like and not _ids(given) & _ids(new.values()):
        raise InputError(
            "new_model must be what surgery made of old_model; got one that has no parameter of a name and shape that "
            f"the optimizer has, of {len(new)}"
        )


def _parameters(model: nn.Module, name: str) -> Parameters:
    """Return the parameters of a model by all of their names."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{name} must be a torch.nn.Module; got {type(model).__name__}")
    return dict(unwrapped(model).named_parameters(remove_duplicate=False))


def _ids(tensors: Iterable[Tensor]) -> set[int]:
    return {id(values) for values in tensors}


def _counterparts(old: Parameters, new: Parameters) -> dict[int, nn.Parameter]:
    """Return the new parameter for each old one that lives on, by the id of the old one."""
    found: dict[int, nn.Parameter] = {}
    for name, parameter in old.items():
        if name in new:
            found.setdefault(id(parameter), new[name])
    taken = _ids(found.values())
    deeper: dict[str, list[nn.Parameter]] = {}
    for name, parameter in new.items():
        if id(parameter) not in taken and name not in old:
            for shorter in _with_one_part_less(name):
                deeper.setdefault(shorter, []).append(parameter)
    for name, parameter in old.items():
        candidates = deeper.get(name, []) + [new[shorter] for shorter in _with_one_part_less(name) if shorter in new]
        candidates = [each for each in candidates if id(each) not in taken and _shape(each) == _shape(parameter)]
        if id(parameter) not in found and len(_ids(candidates)) == 1:
            found[id(parameter)] = candidates[0]
            taken.add(id(candidates[0]))
    return found


def _with_one_part_less(name: str) -> set[str]:
    """Return the names without one of the modules on the way: "a.0.weight" for "a.weight" and "0.weight"."""
    *path, leaf = name.split(".")
    return {".".join([*path[:i], *path[i + 1 :], leaf]) for i in range(len(path))}


def _shape(parameter: Tensor) -> tuple[int, ...] | None:
    return None if is_lazy(parameter) else tuple(parameter.shape)


def _renewed(
    group: Mapping[str, Any], old: Parameters, new: Parameters, counterparts: Mapping[int, nn.Parameter]
) -> list[_Entry]:
    """Return the entries of a group without new parameters; each parameter appears once."""
    names = {id(parameter): name for name, parameter in reversed(new.items())}
    mine, kept, seen = _ids(old.values()), _ids(new.values()), set()
    entries = []
    for parameter, name in zip(group["params"], group.get("param_names", [None] * len(group["params"])), strict=True):
        then = parameter
        if id(parameter) in mine and id(parameter) not in kept:
            then = counterparts.get(id(parameter))
        if then is not None and id(then) not in seen:
            seen.add(id(then))
            entries.append(_Entry(then, name if then is parameter else names[id(then)]))
    return entries


def _distribute(new: Parameters, groups: list[list[_Entry]], known: set[int]) -> None:
    """Add the parameters that the old model did not have to the groups."""
    group_of = {id(entry.parameter): group for group in groups for entry in group}
    known = known | group_of.keys()
    before: nn.Parameter | None = None
    last: dict[int, list[_Entry]] = {}
    for name, parameter in new.items():
        if id(parameter) not in known:
            known.add(id(parameter))
            neighbor = before if before is not None else _first_known(new, group_of)
            if parameter.requires_grad and neighbor is not None and id(neighbor) in group_of:
                group = last.get(parameter.dim(), group_of[id(neighbor)])
                group.append(_Entry(parameter, name))
                group_of[id(parameter)] = group
        if id(parameter) in group_of and not is_lazy(parameter):
            last[parameter.dim()] = group_of[id(parameter)]
        before = parameter


def _first_known(new: Parameters, group_of: Mapping[int, list[_Entry]]) -> nn.Parameter | None:
    """Return the first parameter of the model that is in a group, for new ones that come before all others."""
    return next((parameter for parameter in new.values() if id(parameter) in group_of), None)


def _check_history(optimizer: torch.optim.Optimizer, before: list[Tensor], after: list[Tensor]) -> None:
    shapes = [[_shape(parameter) for parameter in parameters] for parameters in (before, after)]
    if isinstance(optimizer, torch.optim.LBFGS) and shapes[0] != shapes[1]:
        raise UnsupportedError(
            "LBFGS has one history of all parameters, so it goes on only with parameters of the same shapes; got "
            f"{len(before)} before and {len(after)} after. Make a new one"
        )


def _hand_on(
    state: Any, parameter: Tensor, old: Parameters, new: Parameters, counterparts: Mapping[int, nn.Parameter]
) -> None:
    """Give the state of a parameter to its counterpart, on the device and in the dtype of that one."""
    if id(parameter) not in _ids(old.values()) or id(parameter) in _ids(new.values()) or parameter not in state:
        return
    values = state.pop(parameter)
    then = counterparts.get(id(parameter))
    if then is not None and _shape(then) == _shape(parameter) and then not in state:
        state[then] = {name: _like(value, parameter, then) for name, value in values.items()}


def _like(value: Any, parameter: Tensor, then: Tensor) -> Any:
    """Return a value of the state, which is on the parameter's device, if it is, by design (the step may be on CPU)."""
    if not isinstance(value, Tensor) or value.device != parameter.device:
        return value
    dtype = then.dtype if value.dtype == parameter.dtype and value.dim() else value.dtype
    return value.to(then.device, dtype)
