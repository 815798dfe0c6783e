"""The parts of torch.distributed that have no public name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batchnorm.torch_internals.lookup import accessor

__all__ = ["collectives", "collectives_while_compiling", "default_store"]


def _store_or_none(get: Callable[[], Any]) -> Callable[[], Any]:
    def store() -> Any:
        try:
            found = get()
        except Exception:  # noqa: BLE001 (a changed torch may raise anything)
            return None
        return found if isinstance(found, torch.distributed.distributed_c10d.Store) else None

    return store


@accessor(
    "torch.distributed.distributed_c10d._get_default_store",
    make=_store_or_none,
    probe=lambda store: True,  # it needs processes
)
def default_store() -> Any:
    """Return the store that all processes share, or None."""
    return None


def _are_collectives(operators: Any) -> bool:
    return all(callable(getattr(operators, name)) for name in ("all_gather_into_tensor", "all_reduce", "wait_tensor"))


@accessor(
    "torch.ops._c10d_functional", make=lambda operators: lambda: operators, probe=lambda get: _are_collectives(get())
)
def collectives() -> Any:
    """Return the collective operators that torch.compile keeps in its graph, or None."""
    return None


def collectives_while_compiling() -> Any:
    """Return the same under torch.compile, which traces this."""
    return torch.ops._c10d_functional
