"""Share of a training step that batch norm, activations and additions take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from batchnorm import torch_internals
from batchnorm.errors import UnsupportedError

__all__ = ["share_of_batch_norm"]

PARTS_OF_NAMES = ("batch_norm", "relu", "threshold", "hardtanh", "clamp")
STEPS = 3


@dataclass
class _Seconds:
    """Seconds in torch's operations, forward and backward: in all of them, and in those of the share."""

    all: float = 0.0
    part: float = 0.0

    def run(self, operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run an operation and add up its time."""
        started = time.perf_counter()
        result = operation(*arguments, **options)
        seconds = time.perf_counter() - started
        self.all += seconds
        name = operation.overloadpacket.__name__
        addition = name in ("add", "add_") and not isinstance(arguments[0], nn.Parameter)  # the optimizer's
        if addition or any(part in name for part in PARTS_OF_NAMES):
            self.part += seconds
        return result


def share_of_batch_norm(step: Callable[[], object]) -> float:
    """Return the share of batch norm, activations and additions in the time of a step's operations.

    Raises
    ------
    UnsupportedError
        This torch does not let a mode watch its operations.
    """
    mode = torch_internals.dispatch_mode_class()
    if mode is None:
        raise UnsupportedError("timing operations needs torch's TorchDispatchMode, which this torch lacks")
    seconds = _Seconds()

    class Timing(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(
            self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            return seconds.run(func, args, kwargs or {})

    step()
    with Timing():
        for _ in range(STEPS):
            step()
    return seconds.part / seconds.all
