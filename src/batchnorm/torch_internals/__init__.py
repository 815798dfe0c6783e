"""Every private name of torch that the library uses, each behind a function that says what it tells.

Private names may change in any release. So none is touched at import: the first call of an accessor looks the name up
and tries it on a tiny case (`lookup`). If it works as known here, the object found replaces the function in this
package, and later calls cost no more than the private name itself. Otherwise the body of the function gives the answer
that turns the fast path off. Call accessors as ``torch_internals.name()``: a name imported from here is not replaced.

torch.compile traces through this package. Code that runs under it must call only the functions that say so; they read
the names directly, and never replace anything.
"""

from __future__ import annotations

from batchnorm.torch_internals.autograd import fast_apply, graph_task_id, has_saved_tensors_hooks, profiler_is_active
from batchnorm.torch_internals.dispatch import (
    compiled_module,
    constant_while_compiling,
    count_dispatch_modes,
    dispatch_mode_class,
    is_exporting,
    jit_tracing_state,
    traces_pre_dispatch,
    without_compile_wrappers,
    without_modes,
)
from batchnorm.torch_internals.distributed import collectives, collectives_while_compiling, default_store
from batchnorm.torch_internals.layers import TorchBatchNorm, TorchLazyNorm, move_hooks, move_hooks_of_the_output
from batchnorm.torch_internals.lookup import PATHS
from batchnorm.torch_internals.tensors import (
    has_storage,
    is_functional,
    is_zero_tensor,
    tensor_guards,
    without_torch_functions,
)
from batchnorm.torch_internals.transforms import (
    forward_mode_is_active,
    interpreter_stack,
    is_functorch_wrapped,
    is_legacy_batched,
    is_transformed,
    may_be_transformed,
    obstacle_to_update,
    transforms_are_active,
    vmap_is_active,
)

__all__ = [
    "PATHS",
    "TorchBatchNorm",
    "TorchLazyNorm",
    "collectives",
    "collectives_while_compiling",
    "compiled_module",
    "constant_while_compiling",
    "count_dispatch_modes",
    "default_store",
    "dispatch_mode_class",
    "fast_apply",
    "forward_mode_is_active",
    "graph_task_id",
    "has_saved_tensors_hooks",
    "has_storage",
    "interpreter_stack",
    "is_exporting",
    "is_functional",
    "is_functorch_wrapped",
    "is_legacy_batched",
    "is_transformed",
    "is_zero_tensor",
    "jit_tracing_state",
    "may_be_transformed",
    "move_hooks",
    "move_hooks_of_the_output",
    "obstacle_to_update",
    "profiler_is_active",
    "tensor_guards",
    "traces_pre_dispatch",
    "transforms_are_active",
    "vmap_is_active",
    "without_compile_wrappers",
    "without_modes",
    "without_torch_functions",
]
