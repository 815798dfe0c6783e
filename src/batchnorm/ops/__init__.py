"""Batch normalization as a differentiable operation on tensors.

In plain eager mode a CPU batch goes straight to the native kernels, which also update the running statistics. Under
torch.compile, fake tensors and dispatch modes, and on other devices, it goes through the operators
``batchnorm::forward`` and ``batchnorm::backward``, so that a compiled graph keeps each as one node, virtual batches
included; batch renormalization also needs ``batchnorm::moments``. Each operator has its gradient. Transforms of
torch.func, second derivatives and torch.export use the reference, which consists of differentiable operations.
"""

from batchnorm.ops import operators, running
from batchnorm.ops.autograd import sign_of_activation
from batchnorm.ops.chunks import corrected
from batchnorm.ops.dispatch import is_sharded
from batchnorm.ops.normalization import (
    Normalized,
    apply_activation,
    batch_norm,
    make_plan,
    moments,
    normalize,
    run_plan,
)
from batchnorm.ops.subclasses import are_overridden, without_subclass
from batchnorm.ops.subclasses import call as call_overridden

__all__ = [
    "Normalized",
    "apply_activation",
    "are_overridden",
    "batch_norm",
    "call_overridden",
    "corrected",
    "is_sharded",
    "make_plan",
    "moments",
    "normalize",
    "operators",
    "run_plan",
    "running",
    "sign_of_activation",
    "without_subclass",
]
