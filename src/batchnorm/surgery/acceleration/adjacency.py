"""What the code of a model's classes does with a layer besides what a trace of its forward shows.

A trace shows one way through a forward. Optional arguments, flags and values of tensors may choose others, and methods
besides forward may call the layer too. Here the source is read: whether a layer is always followed by its activation.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn
from torch.fx import GraphModule

from batchnorm.surgery.graph import Dataflow
from batchnorm.surgery.graph.blocks import paths_above

__all__ = ["always_together", "method_that_names", "reached_from_outside"]

Parents = dict[ast.AST, ast.AST]
OWN_VALUES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "num_features"}
REFLECTION = {"children", "modules", "named_children", "named_modules", "_modules", "get_submodule", "getattr"}


def always_together(block: nn.Module, layer: str, activation: str) -> bool:
    """Return whether all code of a block's class hands a child's output to another child, and to nothing else.

    Parameters
    ----------
    block : Module
    layer, activation : str
        Names of the children.
    """
    if isinstance(block, GraphModule):
        return True  # its graph has no branches
    if type(block).forward is nn.Sequential.forward:
        return not method_that_names(block, layer)
    if not (layer.isidentifier() and activation.isidentifier()):
        return False
    identities = {name for name, child in block.named_children() if type(child) is nn.Identity}
    for function in _functions(type(block)):
        if not {layer, activation} & _names(function.__code__):
            continue
        tree = _tree(function)
        if tree is None or not _together(tree, layer, activation, identities):
            return False
    return True


def method_that_names(block: nn.Module, layer: str) -> str:
    """Return the method besides forward that names a child, and may call it; empty if none does.

    Methods of the author's that begin with an underscore are part of forward where that calls them.
    """
    kind = type(block)
    if kind.forward is nn.Sequential.forward:
        through = (
            function for function in _functions(kind) if layer in _names(function.__code__) or _goes_through(function)
        )
        return next((function.__name__ for function in through), "")
    inner = _names(inspect.unwrap(kind.forward).__code__)
    for function in _functions(kind):
        name = function.__name__
        private = name.startswith("_") and name in inner
        if name != "forward" and not private and layer in _names(function.__code__):
            return name
    return ""


def reached_from_outside(dataflow: Dataflow, block: str, names: set[str]) -> str:
    """Return which module's code may call children of a block without the block; empty if none may.

    Parameters
    ----------
    dataflow : Dataflow
    block : str
        The path of the block whose forward calls the children.
    names : set of str
        Names of the children.
    """
    module = dataflow.model.get_submodule(block)
    container = isinstance(module, nn.Sequential)
    for path in paths_above(block):
        around = dataflow.model.get_submodule(path)
        if isinstance(around, GraphModule) or type(around).__module__.startswith("torch."):
            continue
        inner = block[len(path) + 1 if path else 0 :].split(".") if container else []
        if any(_reaches(each, names, inner, unread=path in dataflow.unread) for each in _functions(type(around))):
            return f"the code of {type(around).__name__} may call it by itself"
    return ""


def _functions(kind: type) -> Iterator[FunctionType]:
    """Iterate over the functions of a class by its author that take values, and the author's functions they call.

    Those of base classes in other files count where the class has a forward, which those of libraries have not.
    """
    waiting = [
        function
        for each in kind.__mro__
        if not each.__module__.startswith("torch.") and (each.__module__ == kind.__module__ or "forward" in vars(each))
        for function in map(_plain, vars(each).values())
        if function is not None and function.__name__ != "__init__" and _takes_values(function)
    ]
    seen = set(waiting)
    while waiting:
        function = waiting.pop()
        yield function
        for name in function.__code__.co_names:
            called = inspect.unwrap(found) if inspect.isfunction(found := function.__globals__.get(name)) else None
            if isinstance(called, FunctionType) and called not in seen and not called.__module__.startswith("torch."):
                seen.add(called)
                waiting.append(called)


def _plain(value: object) -> FunctionType | None:
    value = getattr(value, "__func__", value)
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _takes_values(function: FunctionType) -> bool:
    code = function.__code__
    many = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount > 1 or bool(many)


def _names(code: CodeType) -> set[str]:
    inner = [item for item in code.co_consts if isinstance(item, CodeType)]
    strings = {item for item in code.co_consts if isinstance(item, str)}
    return {*code.co_names, *strings, *(name for each in inner for name in _names(each))}


@cache
def _tree(function: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


@cache
def _parents(tree: ast.AST) -> Parents:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _attributes(tree: ast.AST, name: str) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == name]


def _together(tree: ast.AST, layer: str, activation: str, identities: set[str]) -> bool:
    """Return whether each use of a layer in a function is a call whose result the activation's call takes alone."""
    parents = _parents(tree)
    if any(isinstance(node, ast.Constant) and node.value in (layer, activation) for node in ast.walk(tree)):
        return False  # getattr
    followed = [_follower(node, parents, identities) for node in _attributes(tree, layer) if _matters(node, parents)]
    calls = [node for node in _attributes(tree, activation) if _matters(node, parents)]
    return None not in followed and {id(node) for node in followed} == {id(node) for node in calls}


def _matters(node: ast.Attribute, parents: Parents) -> bool:
    """Return whether an attribute is more than a layer whose own tensors are read, as ``self.bn.weight``."""
    parent = parents[node]
    return not (isinstance(parent, ast.Attribute) and parent.attr in OWN_VALUES)


def _follower(node: ast.Attribute, parents: Parents, identities: set[str]) -> ast.expr | None:
    """Return the function that takes the result of a layer's call; None if it is no call, or others may take it too."""
    call = parents[node]
    if not isinstance(call, ast.Call) or call.func is not node or len(call.args) != 1 or call.keywords:
        return None
    around = parents[call]
    if isinstance(around, ast.Call) and around.args == [call] and not around.keywords:
        return around.func
    if not isinstance(around, ast.Assign) or len(around.targets) != 1 or not isinstance(around.targets[0], ast.Name):
        return None
    name = around.targets[0].id
    for statement in _statements_after(around, parents):
        reads = [each for each in ast.walk(statement) if isinstance(each, ast.Name) and each.id == name]
        loads = [each for each in reads if isinstance(each.ctx, ast.Load)]
        overwritten = isinstance(statement, ast.Return) or _assigns(statement, name)
        if len(loads) != 1 or not overwritten:
            return None
        taker = parents[loads[0]]
        if (
            not isinstance(taker, ast.Call)
            or taker.args != [loads[0]]
            or taker.keywords
            or _is_inside(taker, statement)
        ):
            return None
        function = taker.func
        if isinstance(function, ast.Attribute) and function.attr in identities and taker is _value(statement):
            continue
        return function
    return None


def _value(statement: ast.stmt) -> ast.expr | None:
    return statement.value if isinstance(statement, ast.Assign | ast.Return) else None


def _is_inside(call: ast.Call, statement: ast.stmt) -> bool:
    """Return whether a call stands in a conditional or an inner function of a statement."""
    choices = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return any(
        isinstance(node, choices) and any(each is call for each in ast.walk(node)) for node in ast.walk(statement)
    )


def _assigns(statement: ast.stmt, name: str) -> bool:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == name


def _statements_after(statement: ast.stmt, parents: Parents) -> list[ast.stmt]:
    for _, body in ast.iter_fields(parents[statement]):
        if isinstance(body, list) and any(each is statement for each in body):
            place = next(i for i, each in enumerate(body) if each is statement)
            found: list[ast.stmt] = body[place + 1 :]
            return found
    return []


def _goes_through(function: FunctionType) -> bool:
    """Return whether a method may go through the children of its module, or is not known not to."""
    tree = _tree(function)
    if tree is None:
        return True
    parents, own = _parents(tree), function.__code__.co_varnames[0]
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == own]
    return any(not isinstance(parents[node], ast.Attribute) for node in names)


def _reaches(function: FunctionType, names: set[str], container: list[str], *, unread: bool) -> bool:
    """Return whether a function may call children of a module below by themselves.

    Parameters
    ----------
    function : function
    names : set of str
        Names of the children.
    container : list of str
        The names that lead to a container, which can be gone through; empty if the module is none.
    unread : bool
        Whether nothing else is known about the code.
    """
    known = {name for name in names if name.isidentifier()}
    tree, used = _tree(function), _names(function.__code__)
    if unread and function.__name__ == "forward" and REFLECTION & used:
        return True
    if tree is None:
        return bool(known & used or set(container) & used)
    parents, own = _parents(tree), function.__code__.co_varnames[:1]
    for node in (node for name in known for node in _attributes(tree, name)):
        if _matters(node, parents) and not (isinstance(node.value, ast.Name) and node.value.id in own):
            return True
    return any(
        not _as_a_whole(node, parents, levels_inside=len(container) - 1 - i)
        for i, name in enumerate(container)
        if name.isidentifier()
        for node in _attributes(tree, name)
    )


def _as_a_whole(node: ast.expr, parents: Parents, levels_inside: int) -> bool:
    """Return whether a container is called, or gone through where all that is done with its elements are calls."""
    parent = parents[node]
    if isinstance(parent, ast.Call):
        if parent.func is node:
            return True
        enumerated = isinstance(parent.func, ast.Name) and parent.func.id == "enumerate"
        if not enumerated:
            return False
        node, parent = parent, parents[parent]
    if isinstance(parent, ast.Compare):
        return all(isinstance(each, ast.Constant) and each.value is None for each in parent.comparators)
    if not isinstance(parent, ast.For) or parent.iter is not node or not levels_inside:
        return False
    element = parent.target.elts[-1] if isinstance(parent.target, ast.Tuple) else parent.target
    if not isinstance(element, ast.Name):
        return False
    loads = [
        each
        for each in ast.walk(parent)
        if isinstance(each, ast.Name) and each.id == element.id and isinstance(each.ctx, ast.Load)
    ]
    return all(isinstance(call := parents[each], ast.Call) and call.func is each for each in loads)
