"""The public names, by hand: a name added or lost here is a decision."""

import subprocess
import sys

import pytest

import batchnorm as bn

PUBLIC = [
    "Adaptation",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchNormMLPClassifier",
    "BatchNormMLPRegressor",
    "DataError",
    "Diagnosis",
    "DistributedError",
    "DivergedError",
    "Explanation",
    "InputError",
    "InputTypeError",
    "KernelError",
    "Kernels",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "MissingDependencyError",
    "Moments",
    "Recalibration",
    "Renorm",
    "RenormSchedule",
    "RunError",
    "Shift",
    "Snapshot",
    "Stats",
    "Surgery",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "accumulate",
    "adapt",
    "add_domains",
    "batch_norm",
    "convert",
    "detect_shift",
    "doctor",
    "explain",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "insert",
    "kernels",
    "lab",
    "lengths_to_mask",
    "no_stat_updates",
    "normalize",
    "param_groups",
    "pool_running_stats",
    "recalibrate",
    "replace",
    "restore",
    "snapshot",
    "surgery",
    "to_flax",
    "to_keras",
    "to_torch",
    "tune",
    "tune_allocator",
    "unfreeze",
    "use_domain",
    "zero_init_residual",
]


def test_the_public_names_are_these():
    assert sorted(bn.__all__) == sorted(PUBLIC)
    assert sorted(dir(bn)) == sorted(PUBLIC)


def test_every_public_name_is_there():
    assert all(getattr(bn, name) is not None for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(bn, "BatchNorm4d")


@pytest.mark.parametrize(
    "code",
    [
        "import batchnorm; assert 'torch' not in sys.modules; batchnorm.BatchNorm1d; assert 'torch' in sys.modules",
        "import batchnorm, torch; batchnorm.Moments; torch.ops.batchnorm.forward.default",
        "import torch, batchnorm; torch.ops.batchnorm.forward.default",
        "from batchnorm.kernels import native; import batchnorm; batchnorm.kernels().cpu",
        "from batchnorm import kernels; from batchnorm.kernels import library; kernels().cpu; library.reason()",
    ],
    ids=["torch is loaded late", "operators", "torch is there", "subpackage first", "function first"],
)
def test_the_core_is_loaded_at_the_first_use_of_a_name(code):
    subprocess.run([sys.executable, "-c", f"import sys; {code}"], check=True)
