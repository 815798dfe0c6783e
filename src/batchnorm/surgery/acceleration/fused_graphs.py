"""The graph of a block in which batch norm layers do the activations and additions that follow them."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, Node

from batchnorm.surgery.acceleration.addition import add_normalized
from batchnorm.surgery.acceleration.patterns import (
    activation_of,
    addends,
    changes_in_place,
    kind_of,
    may_change_in_place,
)
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["fuse"]

MAKES_NEW_TENSORS = (
    *(TorchBatchNorm, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
NEW_BY_FUNCTIONS = {operator.add, operator.mul, torch.add, torch.cat, add_normalized}


def fuse(graph: Graph, block: nn.Module, layer: str, *, adds: bool, activates: bool) -> set[str] | str:
    """Let a layer do the steps that follow it, and return the paths of the modules that are no longer called.

    Parameters
    ----------
    graph : torch.fx.Graph
        It is changed.
    block : Module
    layer : str
        The target of the layer's only call.
    adds, activates : bool
        Whether an addition and an activation follow.

    Returns
    -------
    set or str
        If it is a str, the graph computes what it did, and it is the reason: a clause.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    if len(calls) != 1:
        return f"the code around it calls it {len(calls)} times"
    chain = _Chain(graph, block, calls[0])
    residual = None
    if adds:
        found = chain.take_addition()
        if isinstance(found, str):
            return found
        residual = found
    if activates:
        reason = chain.take_activation()
        if reason:
            return reason
    return chain.replace(residual)


@dataclass
class _Chain:
    """A call of a layer and the steps after it, one taking the output of the one before."""

    graph: Graph
    block: nn.Module
    call: Node

    def __post_init__(self) -> None:
        self.steps = [self.call]
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}

    def module(self, node: Node) -> nn.Module | None:
        """Return the module that a node calls."""
        return self.block.get_submodule(str(node.target)) if node.op == "call_module" else None

    def next(self) -> Node | str:
        """Return the step that alone takes the output of the last step; identities become part of the chain."""
        while True:
            last = self.steps[-1]
            users = sorted(last.users, key=self.order.__getitem__)
            if not users:
                return "nothing takes its output"
            first, *others = users
            if others and not self._writes_over(first, last):
                return f"{len(users)} steps take its output"
            for other in others:  # they see what was written
                other.replace_input_with(last, first)
            if type(self.module(first)) is not nn.Identity:
                return first
            self.steps.append(first)

    def _writes_over(self, node: Node, value: Node) -> bool:
        return changes_in_place(node, self.module(node)) and node.args[:1] == (value,)

    def take_addition(self) -> Node | str:
        """Add the next step to the chain, and return the other value that it adds; or the reason why it cannot."""
        node = self.next()
        if isinstance(node, str):
            return node
        value, pair = self.steps[-1], addends(node)
        if pair is None:
            return f"{kind_of(node, self.module(node))} follows it"
        other = pair[1] if pair[0] is value else pair[0]
        if changes_in_place(node, None) and pair[0] is not value and not self._is_private(other):
            return f"the addition that follows writes over {other}, which other code may see"
        if not self._may_move(node):
            return "its input may be changed in place before the addition"
        self.steps.append(node)
        return other

    def _is_private(self, value: Node) -> bool:
        """Return whether a value is a new tensor that one step takes, and nothing else sees."""
        if len(value.users) != 1:
            return False
        module = self.module(value)
        if type(module) is nn.Identity or (module is None and addends(value) and changes_in_place(value, None)):
            return isinstance(value.args[0], Node) and self._is_private(value.args[0])
        return isinstance(module, MAKES_NEW_TENSORS) or value.target in NEW_BY_FUNCTIONS

    def _may_move(self, to: Node) -> bool:
        """Return whether the layer can be called at a later place: whether nothing changes its input until then."""
        value = self.call.args[0]
        if isinstance(value, Node) and self._is_private(value):
            return True
        between = range(self.order[self.call] + 1, self.order[to])
        return not any(i in between and may_change_in_place(node, self.module(node)) for node, i in self.order.items())

    def take_activation(self) -> str:
        """Add the next step to the chain; return the reason if it is no activation."""
        node = self.next()
        if isinstance(node, str):
            return node
        if activation_of(node, self.module(node)) is None:
            return f"{kind_of(node, self.module(node))} follows it"
        self.steps.append(node)
        return ""

    def replace(self, residual: Node | None) -> set[str]:
        """Put one step in the place of the chain, and return the paths of the modules that are no longer called."""
        new = self.call
        if residual is not None:
            addition = next(node for node in self.steps if addends(node) is not None)
            with self.graph.inserting_before(addition):
                layer = self.graph.get_attr(str(self.call.target))
                new = self.graph.call_function(add_normalized, (layer, self.call.args[0], residual))
        gone = [node for node in self.steps if node is not new]
        for node in gone:
            for user in [*node.users]:
                if user not in self.steps:
                    user.replace_input_with(node, new)
        for node in reversed(gone):
            self.graph.erase_node(node)
        self.graph.lint()
        return {str(node.target) for node in gone if node.op == "call_module" and node is not self.call}
