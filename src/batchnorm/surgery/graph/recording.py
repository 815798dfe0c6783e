"""The forwards of a model's blocks as graphs, recorded while the model runs on an example."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from batchnorm.surgery.examples import Example, arguments_of, copied_tensors
from batchnorm.surgery.graph.blocks import MODES, Mode, difference, is_block
from batchnorm.surgery.graph.metadata import reads_metadata
from batchnorm.surgery.graph.tracing import Unreadable

__all__ = ["Recording", "recorded"]

OPERATORS = {f"__{name.strip('_')}__": getattr(operator, name) for name in operator.__all__ if name != "index"}
"""The functions of `operator` by the methods of Tensor that stand for them."""


@dataclass
class Recording:
    """The graphs of the calls of each block, and how often every module was called, by path.

    Attributes
    ----------
    graphs : dict
        The graphs of a block, one per call; a text is the reason why a call could not be recorded.
    calls : dict
        Calls of each module in eval.
    failure : str
        Why the model did not run to its end, as a clause; empty if it did.
    """

    graphs: dict[str, list[Graph | str]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    def graph(self, path: str) -> Graph:
        """Return the graph of a block, which all of its calls share.

        Raises
        ------
        Unreadable
            There is none, or the calls differ.
        """
        if self.failure:
            raise Unreadable(self.failure)
        graphs = self.graphs.get(path, [])
        if not graphs:
            raise Unreadable("the example does not reach it")
        for graph in graphs:
            if isinstance(graph, str):
                raise Unreadable(graph)
        found = [graph for graph in graphs if isinstance(graph, Graph)]
        where = difference(found, constants=False)
        if where:
            raise Unreadable(f"its calls on the example, in training and in eval, differ ({where})")
        return found[0]


def recorded(model: nn.Module, example: Example) -> Recording:
    """Run a copy of a model on an example, in eval and in training, and record the forwards of its blocks."""
    recording = Recording()
    for mode in MODES:
        try:
            _run(copy.deepcopy(model), example, mode, recording)
        except Exception as error:  # noqa: BLE001 (the code of the model may raise anything)
            recording.failure = f"the model fails on the example in {mode} mode: {type(error).__name__}: {error}"
            break
    return recording


def _run(model: nn.Module, example: Example, mode: Mode, recording: Recording) -> None:
    paths = {module: path for path, module in model.named_modules()}
    recorder = _Recorder(paths, recording, counts=mode == "eval")
    for module in model.modules():
        module.training = mode == "train"
        module.register_forward_pre_hook(recorder.enter, with_kwargs=True)
        module.register_forward_hook(recorder.leave, with_kwargs=True, always_call=True)
    arguments, named = copied_tensors(arguments_of(example))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(_devices(model)))
        stack.enter_context(recorder)
        model(*arguments, **named)


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


class _Frame:
    """The graph of one call of a block, while it runs."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.graph, self.fault = module, Graph(), ""
        self.paths = {child: path for path, child in module.named_modules()}
        self.nodes: dict[int, tuple[Tensor, Node]] = {}  # by the identity of tensors, which are kept for that
        self.pending: list[tuple[Any, Any]] = []
        own = [*module.named_parameters(), *module.named_buffers()]
        self.own = {id(tensor): name for name, tensor in own}
        try:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        except TypeError:
            bound, self.fault = {}, "its forward is called in a way that it does not declare"
        for name, value in list(bound.items())[1:]:
            self.note(self.graph.placeholder(name), value)

    def note(self, node: Node, value: Any) -> None:
        """Remember which node made a value; the tensors in a structure are items of it."""
        if isinstance(value, Tensor):
            self.nodes[id(value)] = (value, node)
        elif isinstance(value, tuple | list | Mapping):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                if _has_tensors(item):
                    self.note(self.graph.call_function(operator.getitem, (node, key)), item)

    def node(self, value: Any) -> Any:
        """Return the node that made a tensor; other values are returned as they are."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            name = self.own.get(id(value), "")
            node = self.graph.create_node("get_attr", name or "a_constant")
            self.nodes[id(value)] = (value, node)
        return self.nodes[id(value)][1]

    def arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return arguments with nodes in the place of tensors."""
        return map_aggregate(tuple(args), self.node), map_aggregate(dict(kwargs), self.node)


def _has_tensors(value: Any) -> bool:
    found: list[bool] = []
    map_aggregate(value, lambda item: found.append(True) if isinstance(item, Tensor) else None)
    return bool(found)


class _Recorder(TorchFunctionMode):
    """Adds every call of a function or module to the graph of the block whose forward is running."""

    def __init__(self, paths: Mapping[nn.Module, str], recording: Recording, *, counts: bool) -> None:
        super().__init__()
        self.paths, self.recording, self.counts = paths, recording, counts
        self.frames: list[_Frame | None] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin the graph of a block; within a single step nothing is recorded."""
        above = self.frames[-1] if self.frames else None
        if above is not None:
            above.pending.append(above.arguments(args, kwargs))
        inside_a_step = bool(self.frames) and above is None
        self.frames.append(_Frame(module, args, kwargs) if is_block(module) and not inside_a_step else None)
        if self.counts:
            path = self.paths[module]
            self.recording.calls[path] = self.recording.calls.get(path, 0) + 1

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End the graph of a block, and add the call of the module to the one around."""
        frame = self.frames.pop()
        if frame is not None:
            frame.graph.output(map_aggregate(output, frame.node))
            self.recording.graphs.setdefault(self.paths[module], []).append(frame.fault or frame.graph)
        above = self.frames[-1] if self.frames else None
        if above is not None:
            arguments, named = above.pending.pop()
            if module in above.paths:
                above.note(above.graph.create_node("call_module", above.paths[module], arguments, named), output)
            else:
                above.fault = f"its forward calls {self.paths[module]}, which is no part of it"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and add it to the graph of the block that is running."""
        named = kwargs or {}
        frame = self.frames[-1] if self.frames else None
        if frame is None or reads_metadata(func):
            return func(*args, **named)
        given = frame.arguments(args, named)
        result = func(*args, **named)
        name = getattr(func, "__name__", "function")
        if getattr(Tensor, name, None) is func and name not in OPERATORS:
            node = frame.graph.create_node("call_method", name, *given)
        else:
            node = frame.graph.create_node("call_function", OPERATORS.get(name, func), *given, name=name)
        frame.note(node, result)
        return result
