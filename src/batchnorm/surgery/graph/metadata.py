"""Reads of a tensor's shape, dtype and the like, also for a new tensor, which are no use of its values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

__all__ = ["is_metadata", "reads_metadata"]

ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "requires_grad", "is_quantized"}
METHODS = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "get_device",
}
METHODS |= {"is_complex", "element_size", "storage_offset", "data_ptr", "__len__", "type", "is_cuda"}
METHODS |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
FUNCTIONS = {"is_floating_point", "is_complex", "numel", "is_tensor"}
FUNCTIONS |= {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
GETTERS = {getattr(Tensor, name).__get__ for name in ATTRIBUTES}


def is_metadata(node: Node) -> bool:
    """Return whether a step reads the shape, dtype and the like of its first argument, and not its values."""
    if node.op == "call_method":
        return node.target in METHODS and not (node.target == "type" and len(node.args) > 1)
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return len(node.args) > 1 and node.args[1] in ATTRIBUTES
    return reads_metadata(node.target)  # type: ignore[arg-type]


def reads_metadata(function: Callable[..., Any]) -> bool:
    """Return whether a function of torch reads the shape, dtype and the like of a tensor."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return function in GETTERS
    if getattr(Tensor, name, None) is function:
        return name in METHODS - {"type"}
    return name in FUNCTIONS and function not in (operator.index,)
