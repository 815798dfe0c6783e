"""Forwards made from graphs: the code of one module, generated anew by torch.fx from the steps of its forward.

Such a forward knows what it was made for. It refuses a call with other optional arguments, and refuses to run when an
attribute that the author's forward read, or the kind of a module that it no longer calls, has changed since.
"""

from __future__ import annotations

import inspect
import linecache
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.node import map_aggregate

from batchnorm.errors import UnsupportedError
from batchnorm.nn.layer import Layer
from batchnorm.surgery.derived import derive, own_class
from batchnorm.surgery.graph.blocks import parameters_of
from batchnorm.surgery.opening import opened

__all__ = [
    "AttributeReads",
    "Forward",
    "activated_for_forwards",
    "attributes_read",
    "bypassed",
    "forward_from",
    "idle_activations",
    "is_rewritten",
    "restore_activations",
    "restore_forwards",
    "with_own_forwards",
]

NAMES_OF_FX: dict[str, Any] = {
    "torch": torch,
    "device": torch.device,
    "inf": math.inf,
    "nan": math.nan,
    "NoneType": type(None),
}
"""Names that code of torch.fx uses."""

OF_MODULES = {*vars(nn.Module())}
"""Attributes that every module has."""

DERIVED = {"_own_class", "_changes"}
"""Attributes of the classes that `derive` makes."""

AttributeReads = dict[tuple[str, str], Any]
"""The values of attributes that a forward read, by the path of the module, relative to the block, and the name."""


@dataclass(frozen=True)
class Forward:
    """A change of `derive`: another forward, as source code.

    Attributes
    ----------
    source : str
        The definition of ``forward``.
    names : tuple of (str, object)
        The global names that it uses, besides those of torch.fx.
    activations : tuple of (str, str)
        The layers that apply an activation or take an addition in this forward alone, by their path below the module,
        and the activation, which is empty for none.
    """

    source: str
    names: tuple[tuple[str, Any], ...]
    activations: tuple[tuple[str, str], ...] = ()

    def __call__(self, base: type[nn.Module]) -> Mapping[str, Any]:
        """Return the forward, compiled; its lines stand in tracebacks."""
        file = f"<forward of {base.__name__} {hash((base, self)):x}, written by batchnorm>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        names = {**NAMES_OF_FX, "unlike": unlike, **dict(self.names)}  # with a __name__, torch.compile would look there
        exec(compile(self.source, file, "exec"), names)
        forward = names["forward"]
        forward.__module__, forward.__qualname__ = base.__module__, f"{base.__qualname__}.forward"
        forward.__doc__ = base.forward.__doc__
        return {"forward": forward}


def forward_from(
    module: nn.Module,
    graph: Graph,
    constants: Mapping[str, Any],
    reads: Mapping[tuple[str, str], Any],
    activations: Mapping[str, str],
) -> Forward | str:
    """Return the forward of a module that computes a graph, or the reason why there can be none: a clause.

    Parameters
    ----------
    module : Module
    graph : torch.fx.Graph
        Targets are relative to the module; the placeholders are parameters of its forward.
    constants : mapping
        The other parameters of its forward, and the only values that the new forward takes for them.
    reads : mapping
        Attributes that must stay as they are: `attributes_read` and `bypassed`.
    activations : mapping
        As in `Forward`.
    """
    if any(p.name == "self" for p in parameters_of(module)):
        return "its forward has a parameter named self, which is not the module"
    for node in graph.nodes:
        odd = _numbers_of_other_classes((node.args, node.kwargs))
        if odd:
            return f"its forward computes with a number of class {odd[0]}, which source code cannot hold"
    code = graph.python_code("self")
    lines = code.src.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward("))
    names = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
    header, checks, values = _header(module, constants)
    for (path, name), value in reads.items():
        check = _check_of_attribute(path, name, value, values)
        if check is None:
            return f"its forward reads {_named(path, name)}, a {type(value).__name__}, which may change unnoticed"
        checks.append(check)
    source = "\n".join([header, *(f"    {check}" for check in checks), *lines[start + 1 :]]) + "\n"
    used = {name: value for name, value in (names | values).items() if name in source and name not in NAMES_OF_FX}
    try:
        hash(tuple(used.values()))
    except TypeError:
        return "its forward uses a value that cannot be hashed"
    return Forward(source, tuple(used.items()), tuple(activations.items()))


def _numbers_of_other_classes(arguments: Any) -> list[str]:
    """Return the classes of the values that print as something else than the number or text that they are."""
    found: list[str] = []

    def look(leaf: Any) -> None:
        if isinstance(leaf, int | float | complex | str | np.generic) and not isinstance(leaf, bool):
            found.extend([type(leaf).__name__] if type(leaf) not in (int, float, complex, str) else [])

    map_aggregate(arguments, look)
    return found


def _header(module: nn.Module, constants: Mapping[str, Any]) -> tuple[str, list[str], dict[str, Any]]:
    """Return the first line of a forward, with its checks and the values that they and the defaults use."""
    declared, checks = ["self"], list[str]()
    values: dict[str, Any] = {}
    last: Any = inspect.Parameter.POSITIONAL_ONLY
    for p in parameters_of(module):
        if p.kind is not p.POSITIONAL_ONLY and last is p.POSITIONAL_ONLY and len(declared) > 1:
            declared.append("/")
        if p.kind is p.KEYWORD_ONLY and last not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            declared.append("*")
        last = p.kind
        text = str(p.replace(annotation=p.empty, default=p.empty))
        if p.default is not p.empty:
            text += f"={_literal(p.default, f'default_{p.name}', values)}"
        declared.append(text)
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            checks.append(f'if {p.name}: unlike(self, "the arguments {p.name}", {p.name}, "none")')
        elif p.name in constants:
            given = _literal(constants[p.name], f"given_{p.name}", values)
            checks.append(f'if {_differs(p.name, given)}: unlike(self, "{p.name}", {p.name}, {given})')
    return f"def forward({', '.join(declared)}):", checks, values


def _literal(value: Any, name: str, values: dict[str, Any]) -> str:
    """Return a value as source code, which may be a global name."""
    if _is_simple(value):
        return repr(value)
    values[name] = value
    return name


def _differs(expression: str, literal: str) -> str:
    identical = literal in ("None", "True", "False") or literal.isidentifier()
    return f"{expression} is not {literal}" if identical else f"{expression} != {literal}"


def _check_of_attribute(path: str, name: str, value: Any, values: dict[str, Any]) -> str | None:
    """Return a line of code that refuses another value of an attribute; None if no line can tell."""
    owner = _expression(path)
    expression = f"{owner}.{name}" if name != "__class__" else f"type({owner})"
    number = f"{path}.{name}".replace(".", "_").strip("_")
    if isinstance(value, list) and all(map(_is_simple, value)):
        value, expression = tuple(value), f"tuple({expression})"
    if isinstance(value, tuple) and all(map(_is_simple, value)):
        literal = repr(tuple(value))  # without the name of a class such as torch.Size
        return f"if {expression} != {literal}: unlike(self, {_named(path, name)!r}, {expression}, {literal})"
    constant = type(value) is float or isinstance(value, type | torch.dtype | torch.device | Enum)
    if not (_is_simple(value) or constant or inspect.isroutine(value)):
        return None
    literal = _literal(value, f"the_{number}", values)
    return f"if {_differs(expression, literal)}: unlike(self, {_named(path, name)!r}, {expression}, {literal})"


def _is_simple(value: Any) -> bool:
    """Return whether the repr of a value is its source code, which that of an enum or of NaN is not."""
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _named(path: str, name: str) -> str:
    return f"the class of {path}" if name == "__class__" else f"{path}.{name}".lstrip(".")


def _expression(path: str) -> str:
    """Return the expression of a module below self."""
    expression = "self"
    for name in path.split(".") if path else ():
        expression = f"{expression}.{name}" if name.isidentifier() else f'getattr({expression}, "{name}")'
    return expression


def restore_forwards(model: nn.Module) -> None:
    """Give modules their own forwards back where layers do more than normalize, and the layers that alone to do."""
    for layer in activated_for_forwards(model):
        layer.activation = None  # type: ignore[assignment]
    for module in model.modules():
        if leaves_steps_to_layers(module):
            changes = getattr(type(module), "_changes", ())
            module.__class__ = own_class(module)
            for change in changes:
                if not (isinstance(change, Forward) and change.activations):
                    derive(module, change)


def leaves_steps_to_layers(module: nn.Module) -> bool:
    """Return whether a module has a forward that leaves activations or additions to layers."""
    changes = getattr(type(module), "_changes", ())
    return any(isinstance(change, Forward) and change.activations for change in changes)


def is_rewritten(module: nn.Module) -> bool:
    """Return whether `restore_forwards` takes the forward of a module back."""
    changes = getattr(type(module), "_changes", ())
    return any(isinstance(change, Forward) and change.activations for change in changes)


def with_own_forwards(model: nn.Module, function: str, *, inplace: bool) -> nn.Module:
    """Return a model whose layers are called by its author's forwards: itself, or a copy where some were new."""
    if any(map(is_rewritten, model.modules())):
        model = opened(model, function, inplace=inplace)
        restore_forwards(model)
    return model


def activated_for_forwards(model: nn.Module) -> set[nn.Module]:
    """Return the layers that have an activation because a forward that `restore_forwards` takes back leaves it out."""
    return {
        module.get_submodule(path)
        for module in model.modules()
        for change in getattr(type(module), "_changes", ())
        if isinstance(change, Forward)
        for path, name in change.activations
        if name
    }


def restore_activations(model: nn.Module) -> None:
    """Put the activations of layers back into the modules that identities stand for."""
    idle = idle_activations(model)
    for module in [*model.modules()]:
        for name, child in [*module._modules.items()]:
            if child in idle:
                module.register_module(name, idle[child][0].train(child.training))
    for _, layer in idle.values():
        layer.activation = None  # type: ignore[assignment]


def idle_activations(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, nn.Module]]:
    """Return the identities in the place of activations: the activation, and the layer of the model that applies it."""
    modules = {*model.modules()}
    found = {module: vars(module)["stands_for"] for module in modules if "stands_for" in vars(module)}
    return {
        module: pair for module, pair in found.items() if getattr(pair[1], "activation", None) and pair[1] in modules
    }


def unlike(module: nn.Module, name: str, found: object, expected: object) -> None:
    """Refuse a call that the forward was not made for; symbols of torch.fx are let through.

    Raises
    ------
    UnsupportedError
        Always, but for symbols.
    """
    if not isinstance(found, Proxy):
        raise UnsupportedError(
            f"batchnorm wrote this forward of {type(module).__name__} for {name} = {_shown(expected)}; got "
            f"{_shown(found)}. Operate on the model as it will be used"
        )


def _shown(value: object) -> str:
    return value.__name__ if isinstance(value, type) else repr(value) if _is_simple(value) else type(value).__name__


# Attributes that a forward reads.


@dataclass(frozen=True, eq=False)
class _Recorder:
    """A change of `derive`: notes the names of attributes of modules that are read, but not those of all modules."""

    noted: list[tuple[nn.Module, str]]

    def __call__(self, base: type[nn.Module]) -> Mapping[str, Any]:
        def read(module: nn.Module, name: str) -> Any:
            if name == "training" or (name not in OF_MODULES and _is_value(module, name)):
                self.noted.append((module, name))
            return base.__getattribute__(module, name)

        return {"__getattribute__": read}


class _Mode:
    """The mode of a module, which changes: no forward can be made for one."""


def _is_value(module: nn.Module, name: str) -> bool:
    """Return whether an attribute is set on the module or by its author's class, and is no method or property."""
    own = object.__getattribute__(module, "__dict__")
    if name in own or own.get("_modules", {}).get(name, module) is None:
        return True
    kinds = [kind for kind in object.__getattribute__(module, "__class__").__mro__ if name in vars(kind)]
    if not kinds or kinds[0].__module__.startswith("torch.") or name.startswith("__") or name in DERIVED:
        return False
    return not hasattr(vars(kinds[0])[name], "__get__")


@contextmanager
def attributes_read(module: nn.Module) -> Iterator[Callable[[], AttributeReads]]:
    """Record the attributes of a module and those below that code reads, but for parameters, buffers and children.

    It yields a function that returns them.
    """
    paths = {each: path for path, each in module.named_modules()}
    classes = {each: type(each) for each in paths if not isinstance(each, GraphModule | Layer)}
    recorder = _Recorder([])
    for each in classes:
        derive(each, recorder)
    try:
        yield lambda: {
            (paths[each], name): _Mode() if name == "training" else getattr(each, name)
            for each, name in [*recorder.noted]
            if name != "training" or each is not module
        }
    finally:
        for each, kind in classes.items():
            each.__class__ = kind


def bypassed(module: nn.Module, paths: Collection[str]) -> AttributeReads:
    """Return the classes of modules that a new forward does not call, as attributes that must stay as they are."""
    return {(path, "__class__"): type(module.get_submodule(path)) for path in paths}
