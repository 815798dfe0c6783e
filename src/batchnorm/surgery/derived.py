"""Classes derived for single modules: each is the module's own class with some methods replaced.

The module stays an instance of its own class, and keeps its name and its attributes. Copies and pickles store the own
class and the change, and make the derived class again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import new_class
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.fx import GraphModule

__all__ = ["Change", "derive", "derive_beneath", "has_change", "own_class", "underive"]

Change = Callable[[type[nn.Module]], Mapping[str, Any]]
"""Returns the methods that are replaced, given the class whose methods they replace.

It is stored in pickles and compared with others. So it is a function of a file, or a frozen dataclass with `__call__`.
"""

NAMES = ("__module__", "__qualname__", "__doc__")
_CLASSES: WeakValueDictionary[tuple[type[nn.Module], Change], type[nn.Module]] = WeakValueDictionary()


class Unlisted:
    """First base of the derived classes, which registries of subclasses must not list."""

    def __init_subclass__(cls) -> None:
        """Do nothing, in the place of a method of the user's class."""


def derive(module: nn.Module, change: Change) -> None:
    """Replace the class of a module by one derived from it.

    Modules of one class with equal changes share the derived class. A module whose class is derived already gets one
    with both changes. The forward of a GraphModule is made from its graph, so a change must leave that alone.
    """
    kind = type(module)
    if not isinstance(module, GraphModule):
        object.__setattr__(module, "__class__", _derived(kind, change))  # past a __setattr__ of the user's
        return
    # torch.fx gives each graph module a class of its own, and relies on its place in the order of bases.
    own = functools.reduce(_derived, getattr(kind, "_changes", ()), kind.__bases__[0])
    for name, value in _body(own, change).items():
        setattr(kind, name, value)


def derive_beneath(module: nn.Module, change: Change) -> None:
    """Do as `derive`, with the change beneath earlier ones, whose methods call those of this one."""
    _set_changes(module, (change, *vars(type(module)).get("_changes", ())))


def underive(module: nn.Module, change: Change) -> None:
    """Undo one change of `derive`; where other code has changed the class since, it stays."""
    changes = vars(type(module)).get("_changes", ())
    if change in changes:
        _set_changes(module, tuple(each for each in changes if each != change))


def _set_changes(module: nn.Module, changes: tuple[Change, ...]) -> None:
    if "_changes" in vars(type(module)):
        object.__setattr__(module, "__class__", own_class(module))
    _with_changes(module, changes)


def has_change(module: nn.Module, change: Change) -> bool:
    """Return whether `derive` has made a change to the class of a module."""
    return change in getattr(type(module), "_changes", ())


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as its author wrote it, without the changes of `derive`."""
    return getattr(type(module), "_own_class", type(module))


def rebuilt(changes: tuple[Change, ...], function: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """Return a module of a derived class, whose attributes the caller sets: copy or pickle."""
    return _with_changes(function(*arguments), changes)


def _with_changes(module: nn.Module, changes: tuple[Change, ...]) -> nn.Module:
    for change in changes:
        derive(module, change)
    return module


def _derived(base: type[nn.Module], change: Change) -> type[nn.Module]:
    known = _CLASSES.get((base, change))
    if known is None:
        body = {name: getattr(base, name) for name in NAMES} | _body(base, change)
        bases = (base,) if issubclass(base, Unlisted) else (Unlisted, base)
        known = new_class(base.__name__, bases, exec_body=lambda namespace: namespace.update(body))
        _CLASSES[base, change] = known
    return known


def _body(base: type[nn.Module], change: Change) -> dict[str, Any]:
    """Return the attributes by which a derived class differs from its base."""
    body: dict[str, Any] = {
        "_own_class": getattr(base, "_own_class", base),
        "_changes": (*getattr(base, "_changes", ()), change),
        "__reduce_ex__": _reduce_ex,
    }
    if hasattr(base, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    return body | dict(change(base))


def _reduce_ex(module: Any, protocol: Any) -> Any:
    kind, own = type(module), module._own_class
    function, arguments, *state = own.__reduce_ex__(module, protocol)
    arguments = tuple(own if argument is kind else argument for argument in arguments)
    return rebuilt, (kind._changes, function, *arguments), *state


def _deepcopy(module: Any, memo: Any) -> nn.Module:
    """Copy a module whose own class has a method for it, which may return one of the own class."""
    twin: nn.Module = module._own_class.__deepcopy__(module, memo)
    return twin if hasattr(type(twin), "_changes") else _with_changes(twin, module._changes)
