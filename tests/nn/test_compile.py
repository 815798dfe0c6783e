"""Training under torch.compile: one graph, one compilation per mode, eager's numbers."""

import math
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import batchnorm as bn
from support import randn

# torch.compile itself uses deprecated functions of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
C = 5
# The same float32 sums in another order: 100 products of size 10 are off by 100 x 10 x 2**-24 = 6e-5 at most.
CLOSE = {"rtol": 1e-5, "atol": 6e-5}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """A layer among other operations, with a residual and a mask."""

    def __init__(self, **options):
        super().__init__()
        self.layer = bn.BatchNorm(C, **options)
        torch.nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x, residual=None, mask=None):
        return self.layer(x * 2 + 1, residual, mask).sin()


def pair(**options):
    """Return a block for eager mode, its compiled twin, and the counter of compilations."""
    eager, twin = Block(**options), Block(**options)
    counter = CompileCounterWithBackend("aot_eager")
    return eager, twin, torch.compile(twin, backend=counter, fullgraph=True), counter


def step(run, block, x, residual=None, mask=None):
    """Return y and the gradients of a training step."""
    leaves = [values.clone().requires_grad_() for values in (x, residual) if values is not None]
    y = run(*leaves, mask=mask) if residual is not None else run(leaves[0], mask=mask)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [*leaves, *block.parameters()], allow_unused=True)]


def assert_same(eager, compiled):
    for (name, theirs), mine in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def train(eager, twin, run, batches, **inputs):
    for x in batches:
        for mine, theirs in zip(step(run, twin, x, **inputs), step(eager, eager, x, **inputs), strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE, equal_nan=True)
        assert_same(eager, twin)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_twenty_steps_are_one_compilation_and_a_change_of_mode_one_more(momentum):
    eager, twin, run, counter = pair(momentum=momentum)
    batches = [randn(8, C, 3, seed=seed) + seed for seed in range(20)]
    train(eager, twin, run, batches)
    assert counter.frame_count == 1
    assert twin.layer.num_batches_tracked == 20
    x = randn(8, C, 3, seed=30)
    for block in (eager, twin):
        block.eval()
    for _ in range(3):
        torch.testing.assert_close(run(x), eager(x), **CLOSE)
    assert counter.frame_count == 2
    for block in (eager, twin):
        block.train()
    train(eager, twin, run, batches[:3])
    assert counter.frame_count == 2


def test_statistics_after_compiled_training_are_torchs():
    _, _, run, _ = pair(momentum=None)
    torchs = torch.nn.BatchNorm1d(C, momentum=None).double()
    for seed in range(5):
        x = randn(8, C, 3, seed=seed) + seed
        run(x)
        torchs(x.double() * 2 + 1)
    layer = run.layer
    torch.testing.assert_close(layer.running_mean.double(), torchs.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), torchs.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_poisoned_batch_is_skipped_as_in_eager(momentum):
    eager, twin, run, counter = pair(momentum=momentum, nonfinite="skip")
    batches = [randn(8, C, 3, seed=seed) for seed in range(4)]
    batches[1][2, 3, 1] = math.inf
    batches[2][0, 0, 0] = math.nan
    train(eager, twin, run, batches)
    assert (int(twin.layer.skipped_batches), int(twin.layer.num_batches_tracked)) == (2, 2)
    assert twin.layer.running_var.isfinite().all()
    assert counter.frame_count == 1


def test_propagate_poisons_the_statistics_as_in_eager():
    eager, twin, run, counter = pair(nonfinite="propagate")
    batches = [randn(8, C, 3, seed=seed) for seed in range(3)]
    batches[1][2, 3, 1] = math.inf
    train(eager, twin, run, batches)
    assert not twin.layer.running_var[3].isfinite()
    assert counter.frame_count == 1


OPTIONS = {
    "virtual batches": {"virtual_batch_size": 3},
    "renorm": {"renorm": bn.Renorm(1.5, 0.5)},
    "scheduled renorm": {"renorm": bn.RenormSchedule(start=1, r_end=6, d_end=4)},
    "virtual batches, renorm, activation": {
        "virtual_batch_size": 4,
        "renorm": bn.Renorm(1.5, 0.5),
        "activation": "leaky_relu",
    },
    "biased": {"unbiased": False},
    "activation": {"activation": "gelu"},
    "nothing tracked": {"track_running_stats": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_option_trains_as_in_eager_in_one_compilation(options):
    eager, twin, run, counter = pair(**options)
    train(eager, twin, run, [randn(8, C, 3, seed=seed) + seed / 4 for seed in range(6)])
    assert counter.frame_count == 1


@pytest.mark.parametrize("dim", [1, -1])
def test_mask_and_residual_train_as_in_eager_in_one_compilation(dim):
    eager, twin, run, counter = pair(channel_dim=dim, activation="relu")
    mask = bn.lengths_to_mask(torch.tensor([3, 1, 0, 2, 3, 3, 1, 2]))
    batches = []
    for seed in range(4):
        x = torch.where(mask.unsqueeze(1), randn(8, C, 3, seed=seed) + seed, math.nan)
        batches.append(x if dim == 1 else x.transpose(1, 2).contiguous())
    residual = randn(*batches[0].shape, seed=9)
    train(eager, twin, run, batches, residual=residual, mask=mask)
    assert counter.frame_count == 1
    assert twin.layer.skipped_batches == 0


def test_masks_of_other_values_are_no_new_compilation():
    eager, twin, run, counter = pair()
    for lengths in ([3, 3, 3, 3], [1, 0, 2, 3], [0, 0, 0, 0]):
        train(eager, twin, run, [randn(4, C, 3)], mask=bn.lengths_to_mask(torch.tensor(lengths), 3))
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_channels_in_the_last_dimension_train_as_in_eager_in_one_compilation(layout):
    eager, twin, run, counter = pair(channel_dim=-1, virtual_batch_size=3)
    batches = [randn(8, 3, C, seed=seed) for seed in range(4)]
    if layout == "permuted":
        batches = [randn(8, C, 3, seed=seed).transpose(1, 2) for seed in range(4)]
    train(eager, twin, run, batches)
    assert counter.frame_count == 1


def test_a_small_batch_with_running_statistics_has_a_compilation_of_its_own():
    eager, twin, run, counter = pair(small_batch="running")
    train(eager, twin, run, [randn(8, C, seed=seed) for seed in range(3)])
    before = twin.layer.running_mean.clone()
    train(eager, twin, run, [randn(1, C, seed=seed) for seed in range(3)])
    assert counter.frame_count == 2
    assert twin.layer.num_batches_tracked == 3
    assert torch.equal(twin.layer.running_mean, before)


def test_a_frozen_layer_moves_nothing_and_freezing_is_one_compilation():
    eager, twin, run, counter = pair()
    train(eager, twin, run, [randn(8, C, 3, seed=seed) for seed in range(3)])
    before = [buffer.clone() for buffer in twin.buffers()]
    for block in (eager, twin):
        bn.freeze(block)
    train(eager, twin, run, [randn(8, C, 3, seed=seed) + 5 for seed in range(3)])
    assert counter.frame_count == 2
    assert all(torch.equal(old, new) for old, new in zip(before, twin.buffers(), strict=True))


def test_all_options_together_train_as_in_eager():
    eager, twin, run, counter = pair(
        channel_dim=-1, virtual_batch_size=3, renorm=bn.Renorm(1.5, 0.5), activation="silu", momentum=None
    )
    mask = bn.lengths_to_mask(torch.tensor([3, 1, 2, 2, 3, 3, 1, 2]))
    batches = [randn(8, 3, C, seed=seed) + seed / 4 for seed in range(4)]
    batches[2][4, 0, 1] = math.inf
    train(eager, twin, run, batches, residual=randn(8, 3, C, seed=9), mask=mask)
    assert counter.frame_count == 1
    assert (int(twin.layer.skipped_batches), int(twin.layer.num_batches_tracked)) == (1, 3)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_trains_as_eager():
    eager, twin = Block(activation="relu"), Block(activation="relu")
    run = torch.compile(twin, backend="inductor", fullgraph=True)
    train(eager, twin, run, [randn(8, C, 3, seed=seed) for seed in range(3)])
