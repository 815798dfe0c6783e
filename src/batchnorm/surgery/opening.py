"""The door of every operation: the model to operate on, and its batch normalization layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.nn.buffers import Buffers, context_of
from batchnorm.nn.contexts import PLAIN
from batchnorm.nn.recognition import describe_norms, is_batch_norm
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.tuning.tuned_pairs import end_tuning, is_tuned
from batchnorm.torch_internals import compiled_module

__all__ = [
    "COPIES",
    "batch_norms",
    "check_contexts",
    "check_model",
    "copied",
    "deep_copy",
    "is_lazy",
    "opened",
    "untuned",
]

COPIES = (
    "The parameters are copies: make a new optimizer, or call batchnorm.surgery.update_optimizer(old_model, "
    "new_model, optimizer)."
)
"""The note of a report whose model is a copy."""

_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.sparse.quantized",
    "torchao",
    "bitsandbytes",
)
"""The packages of quantized modules."""


def opened(model: nn.Module, function: str, *, inplace: bool) -> nn.Module:
    """Return the model to operate on: the model given, or a deep copy of it.

    Parameters
    ----------
    model : Module
    function : str
        The name of the operation, for messages.
    inplace : bool
        Operate on the model given.

    Raises
    ------
    InputTypeError
        It is no module.
    UnsupportedError
        It is or has a wrapper of DistributedDataParallel, FSDP or torch.compile, a TorchScript module or a quantized
        one, or it cannot be copied.
    """
    check_model(model, function)
    return model if inplace else copied(model, function)


def check_contexts(modules: Mapping[str, nn.Module], function: str, kind: str, way_out: str) -> None:
    """Raise `UnsupportedError` if a context gives a layer other statistics, which a copy would not have."""
    for path, module in modules.items():
        if isinstance(module, Buffers) and context_of(module) != PLAIN:
            raise UnsupportedError(
                f"{function} takes {kind} outside of use_domain, adapt and other contexts; got one for "
                f"{layer_name(path)}. Leave it, or call {way_out} first"
            )


def untuned(model: nn.Module, function: str, *, inplace: bool) -> nn.Module:
    """Return a frozen copy of a tuned model; other models, and all with ``inplace``, are returned as they are.

    Raises
    ------
    UnsupportedError
        A context gives the layers of a tuned model other statistics, which a copy does not have.
    """
    tuned = {path: module for path, module in model.named_modules() if is_tuned(module)}
    if inplace or not tuned:
        return model  # `check_model` refuses a tuned one
    check_contexts(tuned, function, "a tuned model", "batchnorm.unfreeze(model)")
    twin = copied(model, function)
    for module in twin.modules():
        end_tuning(module)
    return twin


def check_model(model: nn.Module, function: str, *, takes_tuned: bool = False) -> None:
    """Raise what `opened` does, without making a copy."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{function} takes a torch.nn.Module; got {_described(model)}")
    for path, module in model.named_modules():
        for refused in (_wrapper, _script, _quantized, *(() if takes_tuned else (_tuned,))):
            reason = refused(module, path, function)
            if reason:
                raise UnsupportedError(reason)


def copied(model: nn.Module, function: str) -> nn.Module:
    """Return a deep copy of a model, which shares its process groups.

    Raises
    ------
    UnsupportedError
        The model cannot be copied.
    """
    try:
        return deep_copy(model)
    except Exception as error:  # whatever a module's own __deepcopy__ or __reduce__ raises
        raise UnsupportedError(
            f"{function} works on a deep copy of the model, which cannot be made: {type(error).__name__}: {error}. "
            f"Operate on the model itself: {function}(model, inplace=True)"
        ) from error


def batch_norms(model: nn.Module, function: str) -> dict[str, nn.Module]:
    """Return the batch normalization layers of any library, by their first path.

    Raises
    ------
    InputError
        There is none; the message says which normalization layers there are.
    """
    found = {path: module for path, module in model.named_modules() if is_batch_norm(module)}
    if not found:
        raise InputError(
            f"{function} needs a model with batch normalization layers; {type(model).__name__} {describe_norms(model)}"
        )
    return found


def _described(model: object) -> str:
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"the class {model.__name__}, of which you may pass an instance"
    if isinstance(model, Mapping):
        return f"{type(model).__name__}, which may be a state dict: load it into a model"
    return type(model).__name__


_Refusal = Callable[[nn.Module, str, str], str]


def _wrapper(module: nn.Module, path: str, function: str) -> str:
    """Return why a wrapper is refused, and the module to pass instead; empty if it is none."""
    model = f"model{path and '.'}{path}"
    if compiled_module(module) is not None:
        return (
            f"{function} takes a model before torch.compile; got a compiled module at {layer_name(path)}. Pass "
            f"{model}._orig_mod, and compile the result"
        )
    if isinstance(module, DistributedDataParallel):
        return (
            f"{function} takes a model before DistributedDataParallel, since its copies would not be synchronized; got "
            f"the wrapper at {layer_name(path)}. Pass {model}.module, and wrap the result"
        )
    if any(kind.__name__ in ("FullyShardedDataParallel", "FSDPModule") for kind in type(module).__mro__):
        return (
            f"{function} takes a model before FSDP, which has divided the parameters among processes; got the wrapper "
            f"at {layer_name(path)}. Operate on the model first, and wrap the result"
        )
    return ""


def _script(module: nn.Module, path: str, function: str) -> str:
    if any(kind.__name__ == "ScriptModule" for kind in type(module).__mro__):
        return (
            f"{function} takes a model of Python, and TorchScript has compiled {layer_name(path)}. Operate on the "
            "model first, and script the result"
        )
    return ""


def _quantized(module: nn.Module, path: str, function: str) -> str:
    kind = type(module)
    if kind.__name__ == "FloatFunctional":  # adds tensors of floating point, in a package of quantized modules
        return ""
    of_tensors = [type(values) for values in (*module._parameters.values(), *module._buffers.values())]
    if _is_of(kind, _QUANTIZED) or any(_is_of(each, ("torchao",)) for each in of_tensors):
        return (
            f"{function} takes a model before quantization; got quantized {kind.__name__} at {layer_name(path)}. "
            "Operate on the float model first, and quantize the result"
        )
    return ""


def _tuned(module: nn.Module, path: str, function: str) -> str:
    if is_tuned(module):
        return (
            f"{function} takes a model that is not tuned; got the tuned {type(module).__name__} at {layer_name(path)}. "
            "Call batchnorm.unfreeze(model) first"
        )
    return ""


def _is_of(kind: type, packages: Sequence[str]) -> bool:
    return any(kind.__module__ == package or kind.__module__.startswith(f"{package}.") for package in packages)


def deep_copy(module: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Return a deep copy, with copies of tensors that torch refuses to copy; process groups are shared.

    These are the buffers of lazy layers, and tensors with a graph: the weight that pruning computes, caches.

    Parameters
    ----------
    module : Module
    instead : mapping of Module to Module, optional
        The modules that take the places of others in the copy.
    """
    memo: dict[int, Any] = {id(child): other for child, other in (instead or {}).items()}
    for each in module.modules():
        for value in _values(vars(each)):
            if isinstance(value, UninitializedBuffer):
                memo[id(value)] = UninitializedBuffer(device=value.device, dtype=value.dtype)  # type: ignore[call-arg]
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif dist.is_available() and isinstance(value, dist.ProcessGroup):
                memo[id(value)] = value
    return copy.deepcopy(module, memo)


def _values(container: object) -> Iterator[object]:
    """Iterate over all values in nested dicts, lists and tuples."""
    if type(container) in (dict, list, tuple):
        values = container.values() if isinstance(container, dict) else container
        for value in values:  # type: ignore[attr-defined]
            yield from _values(value)
    else:
        yield container


def is_lazy(module: nn.Module) -> bool:
    """Return whether a module waits for its first input to make its parameters."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
