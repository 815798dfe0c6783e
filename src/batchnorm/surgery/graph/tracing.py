"""The forward of a single module as a graph of torch.fx, which calls it with symbols in the place of tensors."""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate

from batchnorm.surgery.attributes import Attributes
from batchnorm.surgery.graph.blocks import MODES, Block, Mode, difference, named_arguments, parameters_of
from batchnorm.surgery.graph.symbols import SymbolTracer, isinstance_of_symbols

__all__ = [
    "SYMBOL",
    "Arguments",
    "Unreadable",
    "arguments_by_default",
    "arguments_given",
    "arguments_of_call",
    "symbols_of",
    "traced",
    "traced_in_mode",
]

Arguments = Mapping[str, Any]
"""The arguments that a forward is called with, by name; `SYMBOL` stands for one that is computed in the model."""

UNRECORDED = {"autocast", "no_grad", "inference_mode", "enable_grad", "set_grad_enabled", "checkpoint"}
UNRECORDED |= {"is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"}
"""Names of torch that torch.fx does not record, so that code made of a graph would run without them."""


STRUCTURES = (list, tuple, dict)
TYPE_QUESTIONS = {"type", "__class__", "is_tensor"}
"""Names by which a forward asks for the type of a value; `isinstance` is answered."""


@dataclass(frozen=True)
class Computed:
    """An argument that is computed in the model: a tensor, or a list, tuple or dictionary with tensors."""

    type: type = Tensor


SYMBOL = Computed()


class Unreadable(Exception):  # noqa: N818 (it carries a reason within this package, and is no error of the user's)
    """A block cannot be read; the message is the reason, as a clause."""


def arguments_by_default(module: nn.Module) -> Arguments:
    """Return the arguments of a call whose caller is not known: symbols for those without a default, or the first."""
    if any(p.kind is p.VAR_POSITIONAL for p in parameters_of(module)):
        raise Unreadable(f"the forward of {type(module).__name__} takes any number of arguments")
    named = [p for p in parameters_of(module) if p.kind is not p.VAR_KEYWORD]
    return {p.name: SYMBOL for p in [p for p in named if p.default is p.empty] or named[:1]}


def arguments_of_call(module: nn.Module, node: Node) -> Arguments:
    """Return the arguments of a step that calls a module; those that hold values of the graph are symbols."""
    return arguments_given(module, node.args, node.kwargs)


def arguments_given(module: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call of a module; those that hold tensors or values of a graph are symbols."""
    try:
        arguments = named_arguments(module, args, kwargs)
    except TypeError as error:
        raise Unreadable(f"{type(module).__name__} is called in a way that its forward does not declare") from error
    return {name: _symbolic(value) for name, value in arguments.items()}


def symbols_of(graph: Graph) -> dict[str, Any]:
    """Return the arguments with which a graph was traced, but for constants, to trace it again."""
    return {str(node.target): node.meta.get("argument", SYMBOL) for node in graph.nodes if node.op == "placeholder"}


def _symbolic(value: Any) -> Any:
    found: list[bool] = []
    map_aggregate(value, lambda item: found.append(True) if isinstance(item, Node | Tensor) else None)
    if not found:
        return value
    return SYMBOL if isinstance(value, Node | Tensor) else Computed(next(t for t in STRUCTURES if isinstance(value, t)))


class ForwardTracer(SymbolTracer):
    """Traces the forward of one module. Every module that it calls is a step, but those given, which are inlined."""

    def __init__(self, arguments: Arguments, inlined: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.arguments, self.inlined = arguments, inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a call of the module is one node of the graph."""
        return m not in self.inlined

    def proxy(self, node: Node) -> Proxy:
        """Return the symbol for a node, which notes how torch runs it."""
        node.meta["state"] = _state()
        return super().proxy(node)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Return a function of no arguments that calls the forward, with placeholders for the symbols."""
        parameters = {p.name: p for p in parameters_of(self.root)}
        given: dict[str, Any] = {}
        for name, value in self.arguments.items():
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            defaults = () if default is inspect.Parameter.empty else (default,)
            given[name] = value
            if isinstance(value, Computed):
                given[name] = self.create_proxy("placeholder", name, defaults, {})
                self.types[given[name].node] = value.type
                given[name].node.meta["argument"] = value
        first = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
        first += [p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL]
        if any(parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in first if name in given):
            raise Unreadable(f"the forward of {type(self.root).__name__} takes any number of arguments")
        positional = [given.pop(name) for name in first if name in given]
        return lambda: root_fn(self.root, *positional, **given), []


def traced_in_mode(module: nn.Module, arguments: Arguments, inlined: Collection[nn.Module] = ()) -> Graph:
    """Return the graph of a module's forward in the mode that the model is in.

    Parameters
    ----------
    module : Module
    arguments : mapping
        The arguments of forward; those left out have their defaults.
    inlined : collection of Module
        Modules below whose forwards become part of the graph.

    Raises
    ------
    Exception
        Whatever the forward raises when it is called with symbols.
    """
    tracer = ForwardTracer(arguments, inlined)
    with isinstance_of_symbols(each for block in (module, *inlined) for each in _functions_of(type(block))):
        graph = tracer.trace(module)
    if tracer.unanswered:  # and the forward caught the error
        raise Unreadable(f"torch.fx cannot trace {type(module).__name__}: {tracer.unanswered}")
    return graph


def traced(module: nn.Module, arguments: Arguments, inlined: Collection[nn.Module] = ()) -> Block:
    """Return a module's forward as a block, the same in training and in eval.

    Raises
    ------
    Unreadable
        It cannot be traced, or its steps depend on the mode.
    """
    if "forward" in vars(module):
        raise Unreadable(f"its forward was set on the {type(module).__name__} itself")
    if TYPE_QUESTIONS & _names(inspect.unwrap(type(module).forward).__code__):
        raise Unreadable(f"the forward of {type(module).__name__} may depend on the types of values")
    graphs, kept, changes = [], set(), False
    for mode in MODES:
        with in_mode(module, mode) as attributes:
            drawn = _generator_states()
            try:
                graphs.append(traced_in_mode(module, arguments, inlined))
            except Unreadable:
                raise
            except Exception as error:  # a forward may raise anything when it is called with symbols
                raise Unreadable(f"torch.fx cannot trace {type(module).__name__}: {_short(error)}") from error
            if _generator_states() != drawn:
                raise Unreadable(f"the forward of {type(module).__name__} draws random numbers outside of its graph")
            for value in attributes.changed(module):
                changes = True
                if mode == "eval":
                    map_aggregate(value, lambda item: kept.add(item.node) if isinstance(item, Proxy) else None)
    where = difference(graphs, constants=False)
    if where:
        raise Unreadable(f"{type(module).__name__} computes otherwise in training than in eval ({where})")
    _read_mode(*graphs)
    constants = {name: value for name, value in arguments.items() if not isinstance(value, Computed)}
    omitted = [p for p in parameters_of(module) if p.name not in arguments and p.default is not p.empty]
    constants |= {p.name: p.default for p in omitted}
    reason = _reason_against_code(module, graphs, changes)
    return Block(graphs[0], constants, reason, frozenset(kept))


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Iterator[Attributes]:
    """Set the flags of a mode on a module and all below it, without ``train()``; restore all attributes at the end."""
    attributes = Attributes(module)
    try:
        for each in module.modules():
            vars(each)["training"] = mode == "train"
        yield attributes
    finally:
        attributes.restore()


def _read_mode(in_eval: Graph, in_training: Graph) -> None:
    """Let functions read the module's mode where their arguments are False in eval and True in training.

    So ``F.dropout(x, training=self.training)`` becomes code that is right in both.
    """
    graphs = (in_eval, in_training)
    pairs = list(zip(in_eval.nodes, in_training.nodes, strict=True))
    first = [next(step for step in graph.nodes if step.op != "placeholder") for graph in graphs]
    modes: list[Node] = []
    for nodes in pairs:
        if nodes[0].op not in ("call_function", "call_method"):
            continue
        leaves: list[list[Any]] = [_leaves(node) for node in nodes]
        follows = [value is False and other is True for value, other in zip(*leaves, strict=True)]
        if not any(follows):
            continue
        if not modes:
            for graph, step in zip(graphs, first, strict=True):
                with graph.inserting_before(step):
                    modes.append(graph.create_node("get_attr", "training"))
        for node, mode in zip(nodes, modes, strict=True):
            _replace_leaves(node, follows, mode)


def _leaves(node: Node) -> list[Any]:
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return found


def _replace_leaves(node: Node, which: Iterable[bool], new: Node) -> None:
    each = iter(which)

    def replaced(leaf: Any) -> Any:
        return new if next(each) else leaf

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), replaced)


def _reason_against_code(module: nn.Module, graphs: list[Graph], changes: bool) -> str:
    name = type(module).__name__
    if changes:
        return f"the forward of {name} sets attributes"
    where = difference(graphs, constants=True)
    if where:
        return f"the forward of {name} has other constants in training than in eval ({where})"
    if any(node.meta.get("state") != _state() for graph in graphs for node in graph.nodes if "state" in node.meta):
        return f"the forward of {name} turns gradients or autocast on or off"
    unrecorded = UNRECORDED & {name for each in _functions_of(type(module)) for name in _names(each.__code__)}
    if unrecorded:
        return f"the forward of {name} uses {', '.join(sorted(unrecorded))}"
    return ""


def _functions_of(kind: type[nn.Module]) -> set[FunctionType]:
    """Return the forward of a class, and the methods and functions of its author that it calls."""
    found = {inspect.unwrap(kind.forward)}
    waiting = [*found]
    while waiting:
        each = waiting.pop()
        for name in _names(each.__code__):
            called = getattr(kind, name, each.__globals__.get(name))
            called = inspect.unwrap(called) if callable(called) else None
            if isinstance(called, FunctionType) and called not in found and not called.__module__.startswith("torch."):
                found.add(called)
                waiting.append(called)
    return {each for each in found if isinstance(each, FunctionType)}


def _names(code: CodeType) -> set[str]:
    return {*code.co_names, *(name for item in code.co_consts if isinstance(item, CodeType) for name in _names(item))}


def _state() -> tuple[bool, ...]:
    """Return what decides how torch runs a step: whether it keeps gradients, and autocast."""
    devices = ("cpu", "cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, devices)


def _generator_states() -> tuple[Any, ...]:
    """Return the states of the generators that a forward may draw from: torch's, Python's and NumPy's."""
    of_numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the one that forwards draw from)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), pickle.dumps(of_numpy)


def _short(error: Exception) -> str:
    """Return the first sentence of an error."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
