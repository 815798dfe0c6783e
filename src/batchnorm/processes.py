"""Processes of torch.distributed: whether there are any, which share a batch, and how they exchange values.

A process group of None means all processes. Without torch.distributed, and in a process outside of the group, there is
one process, and nothing to exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.errors import DistributedError

__all__ = [
    "Group",
    "all_gather",
    "all_gather_objects",
    "all_gather_through_store",
    "gather_in_graph",
    "group_of",
    "group_size",
    "has_processes",
    "process_group_of",
    "sum_in_graph",
]

_AVAILABLE = dist.is_available()
_GROUPS: dict[str, dist.ProcessGroup] = {}
"""The groups by name, for collectives that take the group itself."""


class Group(NamedTuple):
    """The processes that share a batch.

    Attributes
    ----------
    name : str
        The name that the operators of a compiled graph use.
    size : int
        Number of processes, at least 2.
    """

    name: str
    size: int


def has_processes() -> bool:
    """Return whether torch.distributed is initialized."""
    return _AVAILABLE and dist.is_initialized()


def group_size(process_group: dist.ProcessGroup | None) -> int:
    """Return the number of processes in the group; 1 in a process outside of it."""
    return max(dist.get_world_size(process_group), 1) if has_processes() else 1  # torch says -1 outside of the group


def process_group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group, or that of all processes if it is None; return None if it has one process."""
    if group_size(process_group) == 1:
        return None
    return dist.group.WORLD if process_group is None else process_group


def group_of(process_group: dist.ProcessGroup | None) -> Group | None:
    """Return the name and size of the group; None if it has one process."""
    size = group_size(process_group)
    if size == 1:
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    if not torch.compiler.is_compiling():
        _GROUPS[group.group_name] = group
    return Group(group.group_name, size)


def all_gather(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the values (K,) of all processes, (processes, K)."""
    ranks = [torch.empty_like(values) for _ in range(group_size(process_group))]
    dist.all_gather(ranks, values, group=process_group)
    return torch.stack(ranks)


def all_gather_objects(value: Any, process_group: dist.ProcessGroup | None) -> list[Any]:
    """Return the objects of all processes, which must be picklable."""
    ranks: list[Any] = [None] * group_size(process_group)
    dist.all_gather_object(ranks, value, group=process_group)
    return ranks


def all_gather_through_store(text: str, key: str, process_group: dist.ProcessGroup | None) -> list[str]:
    """Return the texts that all processes have given under the key, without a collective.

    A collective would be matched with any other collective that a process runs at that time; the store is not. Where
    torch does not give its store only the text of this process is returned.

    Raises
    ------
    DistributedError
        A process has given no text within the timeout of the store.
    """
    shared = torch_internals.default_store()
    if shared is None:
        return [text]
    store = dist.distributed_c10d.PrefixStore(key, shared)
    store.set(str(dist.get_rank(process_group)), text)
    texts = []
    for rank in range(group_size(process_group)):
        try:
            texts.append(store.get(str(rank)).decode())
        except (dist.DistStoreError, RuntimeError) as error:
            raise DistributedError(f"rank {rank} of the group did not answer within the timeout") from error
    return texts


def gather_in_graph(values: Tensor, group: Group) -> Tensor:
    """Return the values (K,) of all processes, (processes, K), by operators that torch.compile keeps in its graph."""
    operators = _collectives()
    if operators is None:
        return all_gather(values, _GROUPS[group.name])
    found = operators.all_gather_into_tensor(values.unsqueeze(0), group.size, group.name)
    return operators.wait_tensor(found)  # type: ignore[no-any-return]


def sum_in_graph(values: Tensor, group: str) -> Tensor:
    """Return the sum of the values of all processes, by operators that torch.compile keeps in its graph."""
    operators = _collectives()
    if operators is None:
        total = values.clone()
        dist.all_reduce(total, group=_GROUPS[group])
        return total
    return operators.wait_tensor(operators.all_reduce(values, "sum", group))  # type: ignore[no-any-return]


def _collectives() -> Any:
    if torch.compiler.is_compiling():
        return torch_internals.collectives_while_compiling()
    return torch_internals.collectives()
