"""The steps of a graph that a batch norm layer can take over: activations and additions, however they are written."""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.nn import functional as F

from batchnorm.checks import Activation
from batchnorm.surgery.graph.blocks import MODES
from batchnorm.surgery.graph.tracing import in_mode
from batchnorm.torch_internals import TorchBatchNorm

__all__ = [
    "ADDITIONS",
    "activation_of",
    "activation_of_module",
    "addends",
    "changes_in_place",
    "kind_of",
    "may_change_in_place",
]

FUNCTIONS: dict[Callable[..., Any] | str, Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    "tanh": "tanh",
    "tanh_": "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
"""Functions, and names of methods of a tensor."""

MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
SETTINGS = {"leaky_relu": ("negative_slope", 0.01), "gelu": ("approximate", "none")}
"""The setting of an activation that our layers have for one value alone."""

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, F.relu_, torch.relu_}
IN_PLACE |= {F.leaky_relu_, torch.tanh_, torch.sigmoid_, F.elu_, F.hardtanh_}


def activation_of_module(module: nn.Module) -> Activation | None:
    """Return the name that our layers give to the function that a module computes; None if they have no such function.

    A class of other code has the function if its forward consists of one call of it.
    """
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return None
    for kind, name in MODULES.items():
        if type(module).forward is kind.forward and isinstance(module, kind):
            setting, value = SETTINGS.get(name, ("training", module.training))
            return name if getattr(module, setting) == value else None
    if type(module).__module__.startswith("torch."):
        return None
    names = set[Activation | None]()
    for mode in MODES:
        try:
            with in_mode(module, mode):
                node = _only_step(Tracer().trace(module))
        except Exception:  # noqa: BLE001 (a forward may raise anything when it meets symbols)
            return None
        names.add(None if node is None else activation_of(node, None))
    return names.pop() if len(names) == 1 else None


def _only_step(graph: Graph) -> Node | None:
    """Return the one step that a graph's output is; None if there are more."""
    steps = list(graph.nodes)
    if len(steps) != 3 or steps[0].op != "placeholder" or steps[1].op not in ("call_function", "call_method"):
        return None
    first, step, last = steps
    return step if step.args[:1] == (first,) and last.args == (step,) else None


def activation_of(node: Node, module: nn.Module | None) -> Activation | None:
    """Return the name of the activation that a step applies to its first argument; None if it is something else."""
    if module is not None:
        return activation_of_module(module) if len(node.args) == 1 and not node.kwargs else None
    name = FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None or not node.args or not isinstance(node.args[0], Node):
        return None
    given = {**node.kwargs, **dict(zip(_parameters(name), node.args[1:], strict=False))}
    setting, value = SETTINGS.get(name, ("", None))
    return name if given.get(setting, value) == value and given.keys() <= {setting, "inplace"} else None


def _parameters(name: str) -> tuple[str, ...]:
    return ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)


def addends(node: Node) -> tuple[Node, Node] | None:
    """Return the two different values that a step adds; None if it does anything else."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return None
    given = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    if node.kwargs.keys() - {"input", "other", "alpha"} or node.kwargs.get("alpha", 1) != 1 or len(given) != 2:
        return None
    first, second = given
    if isinstance(first, Node) and isinstance(second, Node) and first is not second:
        return first, second
    return None


def changes_in_place(node: Node, module: nn.Module | None) -> bool:
    """Return whether a step writes its result over its first argument."""
    if module is not None:
        return any(_writes_in_place(each) for each in module.modules())
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__imul__", "__setitem__")
    if node.op != "call_function":
        return False
    if node.target is F.leaky_relu and len(node.args) > 2:
        return bool(node.args[2])
    if FUNCTIONS.get(node.target) is not None and node.target is not F.leaky_relu and len(node.args) > 1:
        return node.args[1] is True
    return node.target in IN_PLACE or node.kwargs.get("inplace", False) is not False or "out" in node.kwargs


def _writes_in_place(module: nn.Module) -> bool:
    """Return whether a module of torch's writes over its input; the attribute of another class may mean nothing."""
    kind = next(each for each in type(module).__mro__ if "forward" in vars(each))
    return kind.__module__.startswith("torch.") and getattr(module, "inplace", False) is True


def may_change_in_place(node: Node, module: nn.Module | None) -> bool:
    """Return whether a step may write over its first argument: those of other code too, where it is written so."""
    if module is None:
        return changes_in_place(node, None)
    return any(_writes_in_place(each) or _may_write(each) for each in module.modules())


def _may_write(module: nn.Module) -> bool:
    """Return whether the code of a module's forward has an operation in place; torch's have none but by `inplace`."""
    kind = next(each for each in type(module).__mro__ if "forward" in vars(each))
    if kind.__module__.startswith("torch.") or isinstance(module, TorchBatchNorm):
        return False
    code = getattr(inspect.unwrap(vars(kind)["forward"]), "__code__", None)
    return code is None or any(
        (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        or step.opname == "STORE_SUBSCR"
        or "inplace" in str(step.argval)
        or (isinstance(step.argval, str) and step.argval.endswith("_") and not step.argval.endswith("__"))
        for step in dis.get_instructions(code)
    )


def kind_of(node: Node, module: nn.Module | None) -> str:
    """Return the name of a step for a sentence: the class of a module, the name of a function or method."""
    if module is not None:
        return type(module).__name__
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
