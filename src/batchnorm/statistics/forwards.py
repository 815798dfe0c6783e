"""Hooks that read the inputs of layers in forward passes, and the state of a model that such passes restore."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.nn.contexts import Setting
from batchnorm.nn.opening import settings
from batchnorm.statistics.layers import Layers, Statistics

__all__ = ["PathHook", "restored", "uncompiled", "with_input_hook"]

PathHook = Callable[[str, Tensor, Tensor | None], Statistics | None]
"""A function of the module path of a layer, its input as (N, C, *) and its mask (N, *).

It may return a mean and a variance, with which a layer in eval mode then normalizes this input.
"""


@contextmanager
def with_input_hook(layers: Layers, hook: PathHook) -> Iterator[None]:
    """Call the hook at every input of the layers in this thread and task, before they normalize it."""

    def setting(path: str) -> Setting:
        return Setting(hook=lambda _, x, mask: hook(path, x, mask))

    with settings({layer: setting(path) for path, layer in layers.items()}):
        yield


class _Eager:
    """Counts who needs compiled models to run eagerly: torch's stance is one for all threads."""

    def __init__(self) -> None:
        self._lock, self._users = threading.RLock(), 0
        self._stance: AbstractContextManager[None] | None = None

    def add(self) -> None:
        with self._lock:
            self._users += 1
            if self._stance is None and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")

    def remove(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_EAGER = _Eager()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly, those of other threads too, because hooks cannot be compiled."""
    _EAGER.add()
    try:
        yield
    finally:
        _EAGER.remove()


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module and the state of the random generators at the end, also after an error."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (transforms draw from the global generator)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
