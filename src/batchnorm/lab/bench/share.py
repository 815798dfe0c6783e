"""The share of a training step that batch norm, activations and additions take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["share_of_batch_norm"]

PARTS_OF_NAMES = ("batch_norm", "relu", "threshold", "hardtanh", "clamp")
STEPS = 3


class _Seconds(TorchDispatchMode):
    """Adds up what the operations take, forward and backward: all of them, and those that the share is of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = self.all = 0.0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started
        self.all += seconds
        name = func.overloadpacket.__name__
        addition = name in ("add", "add_") and not isinstance(args[0], nn.Parameter)  # that is the optimizer
        if addition or any(part in name for part in PARTS_OF_NAMES):
            self.part += seconds
        return result


def share_of_batch_norm(step: Callable[[], object]) -> float:
    """Of the time that torch's operations in a step take, the share of batch norm, activations and additions."""
    step()
    seconds: _Seconds
    with _Seconds() as seconds:
        for _ in range(STEPS):
            step()
    return seconds.part / seconds.all
