"""Blocks: modules whose forward calls other modules. Each is read by itself, with its children as single steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.nn.recognition import is_batch_norm
from batchnorm.torch_internals import TorchBatchNorm

__all__ = [
    "MODES",
    "Block",
    "Mode",
    "bound_arguments",
    "difference",
    "is_block",
    "named_arguments",
    "parameters_of",
    "paths_above",
]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, Mode] = ("eval", "train")
WITH_WEIGHTS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True)
class Block:
    """The forward of one module, as a graph of its calls of modules, functions and methods.

    Attributes
    ----------
    graph : torch.fx.Graph
        Targets of its calls of modules are relative to the block.
    constants : dict
        The arguments of forward that were left at their defaults, by name: the graph holds for these values alone.
    reason_against_code : str
        Why the graph shows who feeds whom but cannot replace the forward; empty where it can.
    kept : frozenset of Node
        Values that the forward keeps as attributes, where other code may use them.
    """

    graph: Graph
    constants: dict[str, Any] = field(default_factory=dict)
    reason_against_code: str = ""
    kept: frozenset[Node] = frozenset()


def is_block(module: nn.Module) -> bool:
    """Return whether a module is read as a block; else it is a single step.

    Steps are modules without children, those of torch but `nn.Sequential` and GraphModule, batch normalization of any
    library, and layers with weights, unless they have batch normalization inside.
    """
    if next(module.children(), None) is None or is_parametrized(module) or is_batch_norm(module):
        return False
    if isinstance(module, WITH_WEIGHTS):
        return any(isinstance(child, TorchBatchNorm) for child in module.modules())
    return isinstance(module, nn.Sequential | GraphModule) or not type(module).__module__.startswith("torch.")


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of a module's forward, without self."""
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def bound_arguments(module: nn.Module, node: Node) -> dict[str, Any]:
    """Return the arguments of a step that calls a module, by the names that its forward gives them.

    Raises
    ------
    TypeError
        The forward does not take them.
    """
    return named_arguments(module, node.args, node.kwargs)


def named_arguments(module: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a module, by the names that its forward gives them.

    Raises
    ------
    TypeError
        The forward does not take them.
    """
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    for parameter in parameters_of(module):
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def paths_above(path: str) -> list[str]:
    """Return the paths of the modules around a module, from the inside: "a.b" and "a" and "" for "a.b.c"."""
    above = []
    while path:
        path = path.rpartition(".")[0]
        above.append(path)
    return above


def difference(graphs: Iterable[Graph], *, constants: bool) -> str:
    """Return where a graph differs from the first one; empty if all are equal. Without ``constants`` edges count."""
    first, *others = (_described(graph, constants=constants) for graph in graphs)
    for other in others:
        for step, its in zip(first, other, strict=False):
            if step != its:
                return f"{step[1]} against {its[1]}" if step[1] != its[1] else f"the arguments of {step[1]}"
        if len(first) != len(other):
            return f"{len(first)} steps against {len(other)}"
    return ""


def _described(graph: Graph, *, constants: bool) -> list[tuple[str, str, str]]:
    """Return the operation, the target and the arguments of each node."""
    numbers = {node: i for i, node in enumerate(graph.nodes)}

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return f"%{numbers[value]}"
        if isinstance(value, Tensor):
            return f"tensor {id(value)}"
        return repr(value) if constants or isinstance(value, str) else None

    return [
        (
            node.op,
            node.target if isinstance(node.target, str) else getattr(node.target, "__name__", repr(node.target)),
            repr((map_aggregate(node.args, plain), map_aggregate(node.kwargs, plain))),
        )
        for node in graph.nodes
    ]
