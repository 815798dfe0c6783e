"""Choose the kernels that run on this machine, and say why the others do not."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchnorm.errors import KernelError, warn
from batchnorm.kernels.library import instructions
from batchnorm.kernels.library import reason as reason_without_native
from batchnorm.reports import Block, Entries, Report

__all__ = ["Kernel", "Kernels", "cpu_kernel", "kernels"]

VARIABLE = "BATCHNORM_KERNELS"
KNOWN = ("reference", "native")
NO_GPU_KERNELS = "this version has no GPU kernels"
REMEDY = (
    "To build the native ones, install a C++ compiler, then batchnorm again, with pip install --force-reinstall "
    f"--no-deps --no-cache-dir; {VARIABLE}=reference uses the reference without a warning."
)


@dataclass(frozen=True)
class Kernel:
    """The kernel of one kind of tensors.

    Attributes
    ----------
    name : str
        ``"native"``, the compiled kernels, or ``"reference"``, the formulas in torch operations.
    instructions : str or None
        The vector instructions that the native kernels use on this processor, such as ``"AVX2"``.
    reason : str or None
        The reason why the reference runs.
    """

    name: Literal["native", "reference"]
    instructions: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.instructions})" if self.reason is None else f"{self.name}: {self.reason}"


@dataclass(frozen=True, repr=False)
class Kernels(Report):
    """The kernels that run here.

    Attributes
    ----------
    cpu, cuda : Kernel
        For CPU tensors and for CUDA tensors.
    """

    cpu: Kernel
    cuda: Kernel

    def _summary(self) -> str:
        return f"CPU: {self.cpu.name}, CUDA: {self.cuda.name}"

    def _blocks(self) -> Iterable[Block]:
        yield Entries([("CPU tensors", str(self.cpu)), ("CUDA tensors", str(self.cuda))])

    def _records(self) -> list[dict[str, Any]]:
        return [{"tensors": name, **asdict(kernel)} for name, kernel in (("CPU", self.cpu), ("CUDA", self.cuda))]


def kernels() -> Kernels:
    """Return which kernels run here, and why the others do not.

    The environment variable ``BATCHNORM_KERNELS`` forces ``reference`` or ``native``.

    Raises
    ------
    KernelError
        The kernels that ``BATCHNORM_KERNELS`` names cannot run here, or there are none of that name.

    Examples
    --------
    >>> import batchnorm as bn
    >>> print(bn.kernels())  # doctest: +ELLIPSIS
    CPU tensors   ...
    CUDA tensors  reference: this version has no GPU kernels
    >>> bn.kernels().cuda
    Kernel(name='reference', instructions=None, reason='this version has no GPU kernels')
    """
    forced = os.environ.get(VARIABLE, "")
    if forced == "triton":
        raise KernelError(f"{VARIABLE}=triton is not available: {NO_GPU_KERNELS}")
    if forced and forced not in KNOWN:
        raise KernelError(f"{VARIABLE} must be {' or '.join(KNOWN)}; got {forced!r}")
    if forced == "reference":
        asked = Kernel("reference", reason=f"{VARIABLE}=reference")
        return Kernels(asked, asked)
    reason = reason_without_native()
    if reason is None:
        return Kernels(Kernel("native", instructions()), Kernel("reference", reason=NO_GPU_KERNELS))
    if forced == "native":
        raise KernelError(f"{VARIABLE}=native is not available: {reason}")
    return Kernels(Kernel("reference", reason=reason), Kernel("reference", reason=NO_GPU_KERNELS))


@functools.cache
def cpu_kernel() -> Literal["native", "reference"]:
    """Return the kernel of CPU tensors; warn once if it is the reference without being asked for."""
    chosen = kernels().cpu
    if chosen.name == "reference" and not os.environ.get(VARIABLE):
        warn(f"batchnorm runs on its slow reference kernels: {chosen.reason}. {REMEDY}", RuntimeWarning)
    return chosen.name
