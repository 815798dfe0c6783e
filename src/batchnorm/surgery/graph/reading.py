"""Reads the blocks of a model, from the model inward: how a block is called decides what its forward computes."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn

from batchnorm.surgery.examples import Example, arguments_of
from batchnorm.surgery.graph.blocks import Block, is_block, paths_above
from batchnorm.surgery.graph.dataflow import Dataflow
from batchnorm.surgery.graph.recording import Recording, recorded
from batchnorm.surgery.graph.tracing import (
    Arguments,
    Unreadable,
    arguments_by_default,
    arguments_given,
    arguments_of_call,
    traced,
)

__all__ = ["read_dataflow"]


def read_dataflow(model: nn.Module, example: Example | None = None) -> Dataflow:
    """Return who feeds whom in a model.

    The forward of every block, a module that calls others, is traced by torch.fx with its children as single steps. A
    block that cannot be traced, or whose steps in training differ from those in eval, is recorded on the example; where
    there is none, or its calls differ there too, it stays unread, and the others are read all the same.

    Parameters
    ----------
    model : Module
        It is left as it is.
    example : tensor, tuple, mapping or None
        Arguments for the model.
    """
    with torch.random.fork_rng([]):  # a forward may draw tensors while it is traced
        return _Reader(model, example).read()


class _Reader:
    def __init__(self, model: nn.Module, example: Example | None) -> None:
        self.model, self.example = model, example
        self.recording: Recording | None = None if example is None else recorded(model, example)
        self.paths = {module: path for path, module in model.named_modules()}
        self.arguments: dict[str, Arguments] = {}
        self.blocks: dict[str, Block] = {}
        self.unread: dict[str, str] = {}

    def read(self) -> Dataflow:
        """Read the model, then the blocks that may be called by a forward that cannot be read."""
        if is_block(self.model):
            self._read_from(self.model)
        for module, path in self.paths.items():
            known = path in self.blocks or path in self.unread
            if is_block(module) and not known and self._may_be_called(path):
                self._read_from(module)
        observed = {} if self.recording is None or self.recording.failure else self.recording.calls
        return Dataflow(self.model, self.blocks, self.unread, observed)

    def _read_from(self, module: nn.Module) -> None:
        """Read a block whose callers are not known, and all blocks that are called from there."""
        waiting: deque[nn.Module] = deque()
        self._try(module, None)
        waiting.append(module)
        while waiting:
            caller = waiting.popleft()
            path = self.paths[caller]
            if path not in self.blocks:
                continue
            for node in self.blocks[path].graph.nodes:
                if node.op != "call_module":
                    continue
                called = caller.get_submodule(str(node.target))
                if not is_block(called):
                    continue
                if self.paths[called] not in self.arguments:
                    waiting.append(called)
                self._try(called, node)

    def _try(self, module: nn.Module, node: Any) -> None:
        """Read a block as a step calls it, or check that it was read for the same arguments."""
        path = self.paths[module]
        if path in self.unread:
            return
        try:
            arguments = self._arguments_without_caller(module) if node is None else arguments_of_call(module, node)
            known = self.arguments.setdefault(path, arguments)
            _check_same(known, arguments)
            if path not in self.blocks:
                self.blocks[path] = self._block(module, arguments)
        except Unreadable as error:
            self.arguments.setdefault(path, {})
            self.blocks.pop(path, None)
            self.unread[path] = str(error)

    def _may_be_called(self, path: str) -> bool:
        """Return whether the block around a module is unread; a forward that was read does not call it."""
        around = next((above for above in paths_above(path) if above in self.blocks or above in self.unread), None)
        return around in self.unread

    def _arguments_without_caller(self, module: nn.Module) -> Arguments:
        if module is not self.model or self.example is None:
            return arguments_by_default(module)
        return arguments_given(module, *arguments_of(self.example))

    def _block(self, module: nn.Module, arguments: Arguments) -> Block:
        try:
            return traced(module, arguments)
        except Unreadable as error:
            if self.recording is None:
                raise
            try:
                graph = self.recording.graph(self.paths[module])
            except Unreadable as its:
                raise Unreadable(f"{error}; {its}") from error
            return Block(graph, {}, str(error))


def _check_same(known: Arguments, arguments: Arguments) -> None:
    """Raise `Unreadable` if two calls give other arguments, or other constants."""
    if repr(known) != repr(arguments):
        raise Unreadable(f"it is called with {', '.join(known)} and with {', '.join(arguments)}")
