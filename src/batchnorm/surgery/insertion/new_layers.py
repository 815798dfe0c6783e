"""New modules behind steps of a model's forwards, under names of their own, so that all other names stay.

In an `nn.Sequential` a new module comes behind its neighbor. Elsewhere the forward of the block is written anew, with a
call of the module. Where that cannot be done, the module whose output it takes ends with a call of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from batchnorm.surgery.acceleration.rewriting import Forward, attributes_read, forward_from
from batchnorm.surgery.derived import derive
from batchnorm.surgery.graph import Dataflow, Step
from batchnorm.surgery.graph.dataflow import has_hooks
from batchnorm.surgery.graph.tracing import symbols_of, traced

__all__ = ["Insertion", "Place", "planned"]


@dataclass(frozen=True)
class Place:
    """A place for a new module: a name among the children of another.

    Attributes
    ----------
    owner : str
        Path of the module that gets the child.
    name : str
    behind : str
        The child of an `nn.Sequential` behind which it stands; else "".
    """

    owner: str
    name: str
    behind: str = ""

    @property
    def path(self) -> str:
        """The path of the new module."""
        return f"{self.owner}{self.owner and '.'}{self.name}"


@dataclass(frozen=True)
class EndsWith:
    """A change of `derive`: the forward hands its output to a child of this name."""

    child: str

    def __call__(self, base: type[nn.Module]) -> Mapping[str, Any]:
        """Return the forward."""
        child, own = self.child, base.forward

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, child)(own(self, *args, **kwargs))

        return {"forward": forward}


@dataclass(frozen=True)
class WithCalls:
    """A change of `derive`: a forward that calls new modules, and stays when those of `accelerate` are taken back."""

    forward: Forward

    def __call__(self, base: type[nn.Module]) -> Mapping[str, Any]:
        """Return the forward."""
        return self.forward(base)


@dataclass
class Insertion:
    """How new modules come into a model and its copies.

    Attributes
    ----------
    places : dict
        By the step whose output the module takes.
    refused : dict
        Why there is no place behind the other steps, as clauses.
    changes : dict
        The changes of modules, by path: a change of their class, or a graph for a GraphModule.
    """

    places: dict[Step, Place] = field(default_factory=dict)
    refused: dict[Step, str] = field(default_factory=dict)
    changes: dict[str, WithCalls | EndsWith | Graph] = field(default_factory=dict)

    def put(self, model: nn.Module, made: Mapping[str, nn.Module]) -> None:
        """Put new modules, by their path, into their places."""
        for place in self.places.values():
            owner = model.get_submodule(place.owner)
            owner.add_module(place.name, made[place.path])
            if place.behind:
                names = [name for name in owner._modules if name != place.name]
                names.insert(names.index(place.behind) + 1, place.name)
                children = {name: owner._modules[name] for name in names}
                owner._modules.clear()
                owner._modules.update(children)
        for path, change in self.changes.items():
            module = model.get_submodule(path)
            if isinstance(change, Graph):
                assert isinstance(module, GraphModule)
                module.graph = change
            else:
                derive(module, change)


def planned(flow: Dataflow, names: Mapping[Step, str]) -> Insertion:
    """Return how modules of these names, or similar free ones, can take the outputs of steps."""
    insertion = Insertion()
    by_block: dict[str, dict[Step, str]] = {}
    for step, name in names.items():
        block = flow.model.get_submodule(step.block)
        reason = "" if block is flow.model else flow.why_no_single_call(block)
        if reason:
            insertion.refused[step] = f"{step.block} is not called once: {reason}"
        elif type(block).forward is nn.Sequential.forward:
            _plan_in_sequential(flow, insertion, step)
        else:
            by_block.setdefault(step.block, {})[step] = name
    for path, wanted in by_block.items():
        _plan_in_forward(flow, insertion, path, wanted)
    return insertion


def _plan_in_sequential(flow: Dataflow, insertion: Insertion, step: Step) -> None:
    sequential = flow.model.get_submodule(step.block)
    calls = [node for node in flow.blocks[step.block].graph.nodes if node.op == "call_module"]
    # A module that is called twice has two names here, of which the graph shows the first.
    behind = list(sequential._modules)[calls.index(step.node)]
    insertion.places[step] = Place(step.block, _free_name(sequential, f"{behind}_bn"), behind)


def _plan_in_forward(flow: Dataflow, insertion: Insertion, path: str, names: Mapping[Step, str]) -> None:
    """Plan modules whose calls come into the forward of a block, or into the modules that it calls."""
    block = flow.model.get_submodule(path)
    places: dict[Step, Place] = {}
    for step, name in names.items():
        taken = [place.name for place in places.values()]
        places[step] = Place(path, _free_name(block, name, taken))
    change = _rewritten(flow, path, {step.node: place.name for step, place in places.items()})
    if not isinstance(change, str):
        insertion.places.update(places)
        insertion.changes[path] = change
        return
    for step in names:
        module = flow.module(step)
        reason = change if module is None else _why_no_end(flow, module)
        if module is None or reason:
            insertion.refused[step] = reason
            continue
        place = Place(flow.path(module), _free_name(module, "bn"))
        insertion.places[step] = place
        insertion.changes[place.owner] = EndsWith(place.name)


def _why_no_end(flow: Dataflow, module: nn.Module) -> str:
    """Return why a module cannot end with a new one; empty if it can."""
    if has_hooks(module):
        return "there are hooks on it, which would see another output"
    if "forward" in vars(module):
        return "its forward was replaced by an assignment"
    return flow.why_no_single_call(module)


def _rewritten(flow: Dataflow, path: str, names: Mapping[Node, str]) -> WithCalls | Graph | str:
    """Return the forward of a block with calls of new modules behind some steps, or the reason why there is none."""
    module, block = flow.model.get_submodule(path), flow.blocks[path]
    if block.reason_against_code:
        return block.reason_against_code
    graph, twins = copied_graph(block.graph)
    for node, name in names.items():
        twin = twins[node]
        with graph.inserting_after(twin):
            call = graph.call_module(name, (twin,))
        twin.replace_all_uses_with(call)
        call.args = (twin,)
    if isinstance(module, GraphModule):
        return graph
    symbols = symbols_of(block.graph)
    with attributes_read(module) as reads:
        traced(module, {**symbols, **block.constants})
        read = reads()
    forward = forward_from(module, graph, block.constants, read, {})
    return forward if isinstance(forward, str) else WithCalls(forward)


def copied_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Return a copy of a graph, to be edited, and its nodes by those of the original."""
    twin, nodes = Graph(), dict[Node, Node]()
    twin.output(twin.graph_copy(graph, nodes))
    return twin, nodes


def _free_name(module: nn.Module, name: str, taken: Any = ()) -> str:
    """Return the name, with a number behind it where the module has such an attribute."""
    found, number = name, 2
    while hasattr(module, found) or found in taken:
        found, number = f"{name}{number}", number + 1
    return found
