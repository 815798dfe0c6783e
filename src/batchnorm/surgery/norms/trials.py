"""The trials of a layer with a forward of its own: its formula must hold in all that a run can show.

In batches of many sizes, for any count of batches, with NaN and infinity, for a batch of one, with its gradients, and
without a look at random numbers or at the values of tensors. What no run shows, `own_code` reads.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from batchnorm.surgery.norms.own_code import batch_sizes_in, reason_against_code
from batchnorm.surgery.norms.probing import Formula, Probe, Run, is_close, told

__all__ = ["probe"]

BATCHES = (2, 3, 40, 64, 256, 1024, 4096)
"""Batch sizes that are tried. Ghost batch normalization divides large batches, often of more than 32."""

COUNTS = (0, 1, 100, 1_000_000)
"""Counts of batches that are tried, where a warm-up shows."""

LOOKS = {"__bool__", "__float__", "__int__", "__index__", "item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
"""Functions that make numbers of tensors, on which a forward may branch."""


def probe(module: nn.Module) -> Formula | str:
    """Return the formula of a layer, or the reason why it is not that of batch normalization: a clause."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if len(parameters) != 1 or parameters[0].kind in several:
        return f"its forward takes other arguments than the input ({', '.join(p.name for p in parameters) or 'none'})"
    with torch.random.fork_rng(devices=[]), _random_state() as has_drawn, torch.no_grad():
        torch.manual_seed(0)
        try:
            tried = _Tried(module)
            formula = tried.formula()
        except Exception as error:  # noqa: BLE001 (whatever its forward raises)
            return f"its own forward cannot be run by itself ({told(error)})"
        if isinstance(formula, str):
            return formula
        reason = reason_against_code(module)
        if reason:
            return reason
        try:
            return _trials(tried, formula, has_drawn) or formula
        except Exception as error:  # noqa: BLE001 (as above)
            return f"its own forward fails where batch normalization does not ({told(error)})"


class _Looks(TorchFunctionMode):
    """Notes whether values of tensors become numbers; the count of batches may, as torch's own forward does."""

    def __init__(self, count: Tensor | None) -> None:
        super().__init__()
        self.count, self.seen = count, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOOKS and args[0] is not self.count:
            self.seen = True
        return func(*args, **(kwargs or {}))


class _Tried(Probe):
    """A probe that notes what its forward looks at."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.looks = _Looks(self.copy._buffers.get("num_batches_tracked"))

    def run(self, x: Tensor) -> Run:
        """Run the forward of the copy on an input, which it may overwrite."""
        with self.looks:
            return super().run(x)


@contextmanager
def _random_state() -> Iterator[Any]:
    """Put the random state of Python and NumPy back; yields a function that tells whether theirs or torch's moved."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the one that users' code draws from)

    def moved(before: Tensor) -> bool:
        now = np.random.get_state()  # noqa: NPY002 (as above)
        unlike = any(not np.array_equal(a, b) for a, b in zip(now, numpy, strict=True))
        return unlike or random.getstate() != python or not torch.equal(torch.get_rng_state(), before)

    try:
        yield moved
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 (as above)


def _trials(tried: _Tried, formula: Formula, has_drawn: Any) -> str:
    """Return how a layer differs from its formula in one of the trials; empty if it does not."""
    shape = {1: (), 2: (1, 1), 3: (1, 1, 1)}.get(formula.dims or 0, ())
    if formula.dims is None:  # the first number of dimensions that the forward takes
        shape = next(shape for shape in ((), (1,), (1, 1), (1, 1, 1)) if _runs(tried, shape))
    generator = torch.Generator().manual_seed(1)

    def batch(size: int, *more: int) -> Tensor:
        sizes = (size, tried.channels(), *(more or shape))
        return 3 * torch.randn(sizes, dtype=torch.float64, generator=generator) + 1

    before = torch.get_rng_state()
    named = batch_sizes_in(tried.original)
    for mode in (False, True):
        tried.copy.train(mode)
        for size in sorted({*BATCHES, *named}):
            if _differs(tried, formula, batch(size)):
                return f"its own forward computes something else for a batch of {size}"
        for count in sorted({*COUNTS, *named}):
            if _set_count(tried, count) and _differs(tried, formula, batch(6)):
                return f"its own forward computes something else after {count} batches"
    _set_count(tried, 0)
    if tried.looks.seen:
        return "its own forward looks at the values of tensors, on which it may depend"
    if has_drawn(before):
        return "its own forward draws random numbers"
    for mode, value in ((False, math.nan), (True, math.nan), (False, math.inf), (False, -math.inf)):
        tried.copy.train(mode)
        x = batch(6)
        x[1, 0] = value
        if _differs(tried, formula, x):
            return f"its own forward computes something else where the input has {value}"
    return _alone(tried, formula, batch(1)) or _gradients(tried, formula, batch(6))


def _runs(tried: _Tried, shape: tuple[int, ...]) -> bool:
    try:
        tried.copy.eval().forward(torch.ones(2, tried.channels(), *shape, dtype=torch.float64))
    except Exception:  # noqa: BLE001 (a check of its dimensions)
        return False
    return True


def _set_count(tried: _Tried, count: int) -> bool:
    counted = tried.copy._buffers.get("num_batches_tracked")
    if counted is not None:
        counted.fill_(count)
    return counted is not None


def _uses_batch(tried: _Tried, formula: Formula) -> bool:
    return tried.lacks_statistics() or (tried.copy.training and not formula.frozen)


def _differs(tried: _Tried, formula: Formula, x: Tensor) -> bool:
    """Return whether the output, or the running statistics afterwards, are not those of batch normalization."""
    z = tried.normalized(x, formula.eps, training=_uses_batch(tried, formula))
    before = _buffers(tried)
    statistics = None if tried.lacks_statistics() else tried.statistics()
    counted = tried.batches()
    run = tried.run(x)
    if statistics is not None and _uses_batch(tried, formula) and getattr(tried.copy, "track_running_stats", True):
        momentum = getattr(tried.copy, "momentum", None)
        weight = 1 / ((counted or 0) + 1) if momentum is None else momentum
        mean, var = statistics
        F.batch_norm(x, mean, var, training=True, momentum=weight)
    updated = statistics is None or all(map(is_close, tried.statistics(), statistics))
    _restore(tried, before)
    return not (updated and _ends(tried, formula, z, run))


def _ends(tried: _Tried, formula: Formula, z: Tensor, run: Run) -> bool:
    """Return whether a run ended as the formula says, after normalized values."""
    behind = tried.behind(z, run, [formula.activation])
    return not isinstance(behind, str) and behind[0] == formula.children


def _alone(tried: _Tried, formula: Formula, x: Tensor) -> str:
    """Return how a layer treats a single value per channel in another way; empty if it does not."""
    tried.copy.train()
    if not _uses_batch(tried, formula):
        return "its own forward computes something else for one sample" if _differs(tried, formula, x) else ""
    before = _buffers(tried)
    try:
        run = tried.run(x)
    except Exception:  # noqa: BLE001 (torch's layer refuses it too)
        run = None
    _restore(tried, before)
    bias = getattr(tried.copy, "bias", None)
    z = torch.zeros_like(x) if bias is None else bias.detach().view(1, -1, *[1] * (x.dim() - 2)).expand_as(x)
    if run is not None and not _ends(tried, formula, z, run):
        return "its own forward returns something else for a single value per channel"
    more = x.expand(1, -1, *[2] * (x.dim() - 2)) + torch.randn(1, x.shape[1], *[2] * (x.dim() - 2), dtype=x.dtype)
    differs = x.dim() > 2 and _differs(tried, formula, more)
    return "its own forward computes something else for one sample" if differs else ""


def _gradients(tried: _Tried, formula: Formula, x: Tensor) -> str:
    """Return in which mode the gradients are not those of the formula; empty if they are."""
    for mode in (False, True):
        tried.copy.train(mode)
        before = _buffers(tried)
        inputs = [x.clone().requires_grad_()]
        inputs += [
            values for values in (getattr(tried.copy, name, None) for name in ("weight", "bias")) if _learns(values)
        ]
        with torch.enable_grad():
            z = tried.normalized(inputs[0], formula.eps, training=_uses_batch(tried, formula))
            run = tried.run(inputs[0])
            last = z + (run.calls[-1][2] - z).detach() if run.calls else z
            expected = last if formula.activation is None else formula.activation(last)
            weights = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
            if not run.y.requires_grad:
                return "its own forward passes no gradients on"
            found, wanted = (
                torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True) for y in (run.y, expected)
            )
        _restore(tried, before)
        if any(a is None or b is None or not is_close(a, b) for a, b in zip(found, wanted, strict=True)):
            return f"its gradients are not those of batch normalization in {'train' if mode else 'eval'} mode"
    return ""


def _learns(values: Tensor | None) -> TypeGuard[Tensor]:
    return values is not None and values.is_leaf and values.requires_grad


def _buffers(tried: _Tried) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in tried.copy.named_buffers()}


def _restore(tried: _Tried, before: dict[str, Tensor]) -> None:
    for name, values in tried.copy.named_buffers():  # which a forward may have assigned anew
        values.copy_(before[name])
