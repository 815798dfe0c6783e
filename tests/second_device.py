"""A device without hardware: ``second:0``, whose tensors only their own kind may meet, as CUDA's may.

torch lets Python be the backend of its device type PrivateUse1. A tensor of this device holds a tensor of the CPU, and
every operator computes with the held tensors. Tensors of the CPU among the inputs are refused, apart from scalars, as
CUDA's kernels refuse them; only a copy crosses. `register` acts on the whole process, so tests that need the device
run in a process of their own; importing this file, as the search for doctests does, must not.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
DEVICE = torch.device("privateuseone", 0)


class SecondDeviceTensor(torch.Tensor):
    """A tensor of the device, which holds its values on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (aten._to_copy.default, aten.copy_.default):
            return cls.copied(function, args, kwargs)
        here = pytree.tree_leaves((args, kwargs))
        for value in here:
            if isinstance(value, torch.Tensor) and not isinstance(value, cls) and value.dim():
                raise RuntimeError(f"{function}: expected all tensors to be on {DEVICE}; got one on {value.device}")
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = torch.device("cpu")
        args, kwargs = pytree.tree_map_only(cls, lambda value: value.held, (args, kwargs))
        inputs = {id(value.held): value for value in here if isinstance(value, cls)}
        return pytree.tree_map_only(torch.Tensor, lambda y: inputs.get(id(y)) or cls(y), function(*args, **kwargs))

    @classmethod
    def copied(cls, function, args, kwargs):
        """Copy values, which alone may cross between devices."""
        held = pytree.tree_map_only(cls, lambda value: value.held, args)
        if function is aten.copy_.default:
            function(*held)
            return args[0]
        device = kwargs.pop("device", None) or DEVICE
        kwargs.pop("non_blocking", None)
        copy = function(*held, **kwargs)
        return copy if device.type == "cpu" else cls(copy)


def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    """Allocate memory of the device, which a copy from the CPU fills."""
    return SecondDeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    """Allocate memory of the device."""
    return SecondDeviceTensor(torch.empty(size, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    """Copy values between the devices."""
    held = getattr(target, "held", target)
    held.copy_(getattr(source, "held", source))
    return target


def register():
    """Register the device in this process."""
    _setup_privateuseone_for_python_backend("second")
    for name, function in (
        ("empty_strided", empty_strided),
        ("empty.memory_format", empty),
        ("_copy_from", copy_from),
    ):
        torch.library.impl(f"aten::{name}", "privateuseone", function)
