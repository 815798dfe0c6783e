"""The graphs of all blocks of a model together, asked across the borders of the blocks."""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import NamedTuple

from torch import nn
from torch.fx import Node

from batchnorm.surgery.graph.blocks import Block, bound_arguments, is_block, paths_above
from batchnorm.surgery.graph.metadata import is_metadata

__all__ = ["Dataflow", "Step", "Unknown", "has_hooks"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Step(NamedTuple):
    """A call of a module, a function or a method, a tensor of the model, or the end of the model.

    Attributes
    ----------
    block : str
        Path of the block whose forward makes the call.
    node : torch.fx.Node
        The call in the block's graph.
    """

    block: str
    node: Node


class Unknown(NamedTuple):
    """A place that cannot be followed: the reason, as a clause."""

    reason: str


class Dataflow:
    """Who feeds whom in a model.

    Attributes
    ----------
    model : Module
    blocks : dict
        The blocks that were read, by path; "" is the model.
    unread : dict
        Why the others were not, by path, as clauses.
    observed : dict
        How often each module was called on the example, by path; empty without one.
    """

    def __init__(
        self, model: nn.Module, blocks: dict[str, Block], unread: dict[str, str], observed: dict[str, int]
    ) -> None:
        self.model, self.blocks, self.unread, self.observed = model, blocks, unread, observed
        self._paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}

    def notes(self) -> tuple[str, ...]:
        """Return what helps where blocks could not be read, as sentences for a report."""
        if not self.unread or self.observed:
            return ()
        blocks = "One block" if len(self.unread) == 1 else f"{len(self.unread)} blocks"
        return (f"{blocks} could not be traced; an example may help: pass example=, an input of the model.",)

    def path(self, module: nn.Module) -> str:
        """Return the first path of a module."""
        return self._paths[module]

    def module(self, step: Step) -> nn.Module | None:
        """Return the module that a step calls; None for functions, methods and tensors."""
        if step.node.op != "call_module":
            return None
        return self.model.get_submodule(step.block).get_submodule(str(step.node.target))

    def calls(self, module: nn.Module) -> list[Step]:
        """Return the known calls of a module."""
        return self._calls.get(module, [])

    def why_no_single_call(self, module: nn.Module) -> str:
        """Return why a module is not known to run exactly once in a forward of the model; empty if it does."""
        if module is self.model:
            return "it is the whole model"
        seen = self.observed.get(self._paths[module], 0)
        if self.observed and seen != 1:
            return f"it is called {seen} times on the example"
        here = module
        while here is not self.model:
            calls = self.calls(here)
            if len(calls) > 1:
                return f"{'it' if here is module else self._paths[here]} is called {len(calls)} times"
            if not calls:
                return self._why_no_call(here) if here is module else ""  # whoever calls the block, calls it as a whole
            elsewhere = self._unread_around_another_path(here, calls[0].block)
            if elsewhere is not None:
                return f"{self._name(elsewhere)}, which has it too, cannot be read: {self.unread[elsewhere]}"
            here = self.model.get_submodule(calls[0].block)
        return ""

    def source(self, step: Step, argument: int = 0) -> Step | Unknown:
        """Return the step whose output a step takes as an argument, across blocks and identities.

        Parameters
        ----------
        step : Step
        argument : int
            The position of the argument, whether it is given by position or by name.
        """
        module = self.module(step)
        if module is None:
            found = step.node.args[argument] if argument < len(step.node.args) else None
        else:
            values = list(bound_arguments(module, step.node).values())
            found = values[argument] if argument < len(values) else None
        if not isinstance(found, Node):
            return Unknown(f"it does not take the output of one step as argument {argument}")
        return self.origin(Step(step.block, found))

    def origin(self, step: Step) -> Step | Unknown:
        """Return the step that makes a value, where the value given is the input or the output of a block too."""
        furthest, reason = self.followed(step)
        return Unknown(reason) if reason else furthest

    def followed(self, step: Step) -> tuple[Step, str]:
        """Return the furthest step to which a value can be followed back, and why it does not make the value.

        The reason is empty if it does, as a step returned by `origin`.
        """
        while True:
            block, node = step
            if node.op == "placeholder":
                found = self._given(block, str(node.target))
            elif (module := self.module(step)) is None:
                return step, ""
            elif _passes(module):
                value = next(iter(bound_arguments(module, node).values()), None)
                found = Step(block, value) if isinstance(value, Node) else Unknown("an identity takes several values")
            elif is_block(module):
                found = self._returned_by(module)
            else:
                return step, ""
            if isinstance(found, Unknown):
                return step, found.reason
            step = found

    def uses(self, step: Step) -> list[Step | Unknown]:
        """Return all steps that take the output of a step, across blocks and identities.

        Reads of its shape and the like are left out. A step whose node is an output is the end of the model.
        """
        found: list[Step | Unknown] = []
        waiting, seen = deque([step]), {step}
        while waiting:
            value = waiting.popleft()
            if value.node in self.blocks[value.block].kept:
                found.append(Unknown(f"the forward of {self._name(value.block)} keeps it as an attribute"))
            for node in value.node.users:
                if is_metadata(node):
                    continue
                use = Step(value.block, node)
                onward = self._onward(use, value.node)
                if isinstance(onward, list):
                    waiting.extend(each for each in onward if each not in seen)
                    seen.update(onward)
                elif onward not in found:
                    found.append(onward)
        return found

    # Across the borders of blocks.

    def _onward(self, use: Step, value: Node) -> list[Step] | Step | Unknown:
        """Return the values as which a use hands a value on; the use itself where it is a step, and no border."""
        if use.node.op == "output":
            return self._returned(use, value)
        module = self.module(use)
        if module is None:
            return use
        if _passes(module):
            return [use]
        return self._entered(use, value, module) if is_block(module) else use

    def _returned(self, use: Step, value: Node) -> list[Step] | Step | Unknown:
        """Return the values as which the caller of a block gets one that the block returns."""
        path = use.block
        if path == "":
            return use
        if use.node.args[0] is not value:
            return Unknown(f"{path} returns it among several values")
        return self._single_caller(path)

    def _entered(self, use: Step, value: Node, module: nn.Module) -> list[Step] | Unknown:
        """Return the values as which a block gets one that it is called with."""
        inside = self._readable(module)
        if isinstance(inside, Unknown):
            return inside
        path = self._paths[module]
        names = [name for name, given in bound_arguments(module, use.node).items() if given is value]
        if not names:
            return Unknown(f"{path} is given it among several values")
        return [Step(path, node) for node in inside.graph.nodes if node.op == "placeholder" and node.target in names]

    def _given(self, path: str, name: str) -> Step | Unknown:
        """Return the value that a block is given as an argument."""
        if path == "":
            return Unknown("it is the input of the model")
        caller = self._single_caller(path)
        if isinstance(caller, Unknown):
            return caller
        block, node = caller[0]
        value = bound_arguments(self.model.get_submodule(path), node).get(name)
        return Step(block, value) if isinstance(value, Node) else Unknown(f"{path} is given several values as {name}")

    def _returned_by(self, module: nn.Module) -> Step | Unknown:
        """Return the value that a block returns."""
        inside = self._readable(module)
        if isinstance(inside, Unknown):
            return inside
        value = next(node for node in inside.graph.nodes if node.op == "output").args[0]
        path = self._paths[module]
        return Step(path, value) if isinstance(value, Node) else Unknown(f"{path} returns several values")

    def _unread_around_another_path(self, module: nn.Module, caller: str) -> str | None:
        """Return an unread block that has a module of several paths, and is not around its known caller."""
        for path in self._all_paths[module]:
            above = paths_above(path)
            around = next((block for block in above if block in self.blocks or block in self.unread), None)
            if around in self.unread and around not in (caller, *paths_above(caller)):
                return around
        return None

    def _single_caller(self, path: str) -> list[Step] | Unknown:
        """Return the only call of a block."""
        module = self.model.get_submodule(path)
        calls = self.calls(module)
        if has_hooks(module):
            return Unknown(f"there are hooks on {path}")
        if not calls:
            return Unknown(f"it crosses the border of {path}, and {self._why_no_call(module)}")
        elsewhere = self._unread_around_another_path(module, calls[0].block)
        if elsewhere is not None:
            return Unknown(f"{self._name(elsewhere)}, which has {path} too, cannot be read: {self.unread[elsewhere]}")
        return calls if len(calls) == 1 else Unknown(f"{path} is called {len(calls)} times")

    def _readable(self, module: nn.Module) -> Block | Unknown:
        """Return a block that is called once and has no hooks."""
        path = self._paths[module]
        if path not in self.blocks:
            return Unknown(f"{path} cannot be read: {self.unread[path]}")
        caller = self._single_caller(path)
        return caller if isinstance(caller, Unknown) else self.blocks[path]

    @cached_property
    def _all_paths(self) -> dict[nn.Module, list[str]]:
        found: dict[nn.Module, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            found.setdefault(module, []).append(path)
        return found

    # Words.

    def _why_no_call(self, module: nn.Module) -> str:
        path = self._paths[module]
        while path:
            path = path.rpartition(".")[0]
            if path in self.unread:
                return f"{self._name(path)} cannot be read: {self.unread[path]}"
        return f"no forward calls {self._paths[module]}"

    def _name(self, path: str) -> str:
        return path or type(self.model).__name__

    @cached_property
    def _calls(self) -> dict[nn.Module, list[Step]]:
        found: dict[nn.Module, list[Step]] = {}
        for path, block in self.blocks.items():
            steps = [Step(path, node) for node in block.graph.nodes if node.op == "call_module"]
            for step in steps:
                found.setdefault(self.module(step), []).append(step)  # type: ignore[arg-type]
        return found


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks that see or change its inputs, outputs or their gradients."""
    return any(getattr(module, name) for name in HOOKS)


def _passes(module: nn.Module) -> bool:
    """Return whether a module returns its input: an identity, or an nn.Sequential of nothing."""
    empty = isinstance(module, nn.Sequential) and not len(module)
    return (type(module) is nn.Identity or empty) and not has_hooks(module)
