"""Synchronized layers: a batch in parts on several processes gives the results of the whole batch in one process."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from ranks import on_ranks, run_rank
from support import randn

# Sums of at most a few hundred float32 numbers of size 10 or less, in another order: off by less than 1e-5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Half precision rounds the gradient twice, by 2**-9 each, and y once.
TOLERANCES = {torch.float32: CLOSE, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
TOLERANCES[torch.bfloat16] = {"rtol": 2**-7, "atol": 2**-7}
C = 3
# One batch through one layer.


def doubles(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float64)


SETTINGS = {
    "plain": {},
    "rows": {"shape": (C,)},
    "float64": {"dtype": torch.float64, "activation": "relu"},
    "bfloat16": {"dtype": torch.bfloat16},
    "without gamma and beta": {"affine": False, "activation": "relu"},
    "without beta": {"bias": False},
    "masked": {"masked": True, "activation": "leaky_relu"},
    "residual": {"with_residual": True, "activation": "relu"},
    "residual alone": {"with_residual": True, "masked": True},
    "silu": {"with_residual": True, "masked": True, "activation": "silu"},
    "channels last": {"shape": (C, 2, 3), "channels_last": True, "activation": "relu"},
    "channel_dim": {"shape": (2, C), "channel_dim": -1, "with_residual": True, "masked": True},
    "renorm": {"renorm": bn.Renorm(9.0, 9.0), "activation": "relu"},
    "kept as in Keras": {"unbiased": False, "momentum": None},
}


def batch_of(
    counts, shape=(C, 4), dtype=torch.float32, masked=False, with_residual=False, channels_last=False, **options
):
    """Return a layer, the whole batch and the gradient of its output, given the counts of samples on the ranks."""
    layer = bn.BatchNorm(C, dtype=dtype, **options)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(doubles(C, seed=i + 1) + 1)
    x = (doubles(sum(counts), *shape) * 2 + 3).to(dtype)
    residual = doubles(*x.shape, seed=5).to(dtype) if with_residual else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    positions = torch.empty(x.shape).select(layer.channel_dim, 0).shape
    mask = doubles(*positions, seed=6) > -0.5 if masked else None
    return layer, x, residual, mask, doubles(*x.shape, seed=7).to(dtype)


def step(layer, x, residual, mask, dy):
    """Return the output, the gradients and the buffers of a training step."""
    leaves = [None if values is None else values.clone().requires_grad_() for values in (x, residual)]
    y = layer(*leaves, mask=mask)
    y.backward(dy)
    found = {"y": y.detach(), "dx": leaves[0].grad, "dresidual": None if residual is None else leaves[1].grad}
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | {
        name: values for name, values in layer.named_buffers() if name != "samples_seen"
    }  # it counts the local samples


def part_of(whole, counts, rank):
    return [values if values is None else values.split(counts)[rank] for values in whole]


def one_batch(rank, setting, counts):
    layer, *whole = batch_of(counts, **setting)
    layer.sync = True
    part = part_of(whole, counts, rank)
    step(copy.deepcopy(layer), *part)  # which the layer itself must not notice
    return step(layer, *part)


def assert_as_of_the_whole(parts, whole, close):
    for name, expected in whole.items():
        values = [part[name] for part in parts]
        if name in ("y", "dx", "dresidual"):
            actual = None if expected is None else torch.cat(values)
        elif name in ("dweight", "dbias"):
            actual = sum(values)
        else:
            actual = values[0]
            assert all(torch.equal(other, actual) for other in values)
        torch.testing.assert_close(actual, expected, **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_of_a_batch_give_what_the_whole_gives_in_one_process(setting, tmp_path):
    setting, counts = SETTINGS[setting], (4, 0, 1)
    parts = on_ranks(one_batch, 3, tmp_path, setting, counts)
    layer, *whole = batch_of(counts, **setting)
    close = TOLERANCES[setting.get("dtype", torch.float32)]
    assert_as_of_the_whole(parts, step(layer, *whole), close)
    assert parts[1]["y"].shape[0] == 0
    assert all(not parts[1][f"d{name}"].any() for name, _ in layer.named_parameters())


@pytest.mark.parametrize("counts", [(1, 1), (0, 6), (2, 0, 1, 5)], ids=str)
def test_counts_may_be_any_on_any_rank(counts, tmp_path):
    parts = on_ranks(one_batch, len(counts), tmp_path, {"shape": (C,)}, counts)
    layer, *whole = batch_of(counts, shape=(C,))
    assert_as_of_the_whole(parts, step(layer, *whole), CLOSE)


def far_away(rank, counts):
    x = (doubles(sum(counts), C, 50) + 1e5).float()
    layer = bn.BatchNorm1d(C, sync=True)
    return step(layer, *part_of((x, None, None, doubles(*x.shape, seed=1).float()), counts, rank))


def test_a_mean_far_above_the_deviation_costs_no_digits(tmp_path):
    counts = (3, 5)
    parts = on_ranks(far_away, 2, tmp_path, counts)
    x = (doubles(8, C, 50) + 1e5).float().double().requires_grad_()
    y = nn.BatchNorm1d(C).double()(x)
    y.backward(doubles(*x.shape, seed=1).float().double())
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]).double(), y, **CLOSE)
    torch.testing.assert_close(torch.cat([part["dx"] for part in parts]).double(), x.grad, **CLOSE)


# Training.


def network(dtype=torch.float32, **options):
    torch.manual_seed(0)
    norms = bn.BatchNorm1d(6, activation="relu", **options), bn.BatchNorm1d(5, **options)
    return nn.Sequential(nn.Linear(4, 6), norms[0], nn.Linear(6, 5), norms[1], nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batches(world, steps):
    """Yield the inputs and targets of every rank for each step; parts differ in size, down to 0 samples."""
    for i in range(steps):
        counts = [(3 * rank + i) % 7 + (rank == i % world) * 2 for rank in range(world)]
        x = doubles(sum(counts), 4, seed=i) * 2 + 1
        yield x.split(counts), x.sin().sum(1, keepdim=True).split(counts)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def train(model, run, parts, whole, weight=1.0):
    """Train by momentum SGD; ``whole`` is called before each step of the optimizer, to add up gradients."""
    optimizer = optimizer_of(model)
    dtype = next(model.parameters()).dtype
    for x, target, count in parts:
        x, target = x.to(dtype), target.to(dtype)
        optimizer.zero_grad()
        ((run(x) - target).square().sum() * weight / count).backward()
        whole(model)
        optimizer.step()


def on_one_process(world, steps, dtype=torch.float32):
    model = network(dtype)
    parts = [(torch.cat(x), torch.cat(target), sum(map(len, x))) for x, target in batches(world, steps)]
    train(model, model, parts, lambda _: None)
    return model.state_dict()


def own_parts(rank, world, steps):
    return [(x[rank], target[rank], sum(map(len, x))) for x, target in batches(world, steps)]


def add_up(model):
    gradients = nn.utils.parameters_to_vector(parameter.grad for parameter in model.parameters())
    dist.all_reduce(gradients)
    nn.utils.vector_to_parameters(gradients, [parameter.grad for parameter in model.parameters()])


def hundred_steps(rank, world):
    model = network(torch.float64, sync=True)
    train(model, model, own_parts(rank, world, 100), add_up)
    return model.state_dict()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_under_torchrun_a_hundred_steps_on_ragged_parts_train_as_one_process_does(world, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*torchrun, __file__, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    expected = on_one_process(world, 100, torch.float64)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        # In float32, training amplifies a rounding to 1e-5 in 100 steps, 100 times the rounding; in float64 to 1e-14.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def data_parallel(rank, world):
    model = network(sync=True)
    # DistributedDataParallel averages the gradients, so each rank's loss is multiplied by the world size.
    train(model, nn.parallel.DistributedDataParallel(model), own_parts(rank, world, 10), lambda _: None, world)
    return model.state_dict()


def sharded(rank, world):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    model = network(sync=True)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, model, own_parts(rank, world, 10), lambda _: None, world)
    return {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in model.state_dict().items()}


def compiled(rank, world):
    model = network(sync=True)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile itself uses deprecated functions of torch
        train(model, run, own_parts(rank, world, 3), add_up)
    return model.state_dict()


@pytest.mark.parametrize(("case", "steps"), [(data_parallel, 10), (sharded, 10), (compiled, 3)])
def test_it_trains_as_one_process_does_in_torchs_wrappers(case, steps, tmp_path):
    expected = on_one_process(2, steps)
    for found in on_ranks(case, 2, tmp_path, 2):
        torch.testing.assert_close(found, expected, **CLOSE)


def recomputed(rank, use_reentrant, renorm):
    model = network(sync=True, renorm=renorm)
    # The first batch on rank 0 has the same mean as the second on both ranks together.
    inputs = [
        (doubles(4 + rank, 4, seed=i).float() + means[rank]).requires_grad_()
        for i, means in enumerate([(10, -10), (0, 20)])
    ]
    outputs = [model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant) for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    found = {f"dx{i}": x.grad for i, x in enumerate(inputs)}
    return found | model.state_dict() | {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("renorm", [None, bn.Renorm(9.0, 9.0)], ids=str)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_recomputed_by_checkpointing_updates_the_statistics_once(use_reentrant, renorm, tmp_path):
    for folder in ("plain", "again"):
        (tmp_path / folder).mkdir()
    plain = on_ranks(recomputed, 2, tmp_path / "plain", None, renorm)
    assert int(plain[0]["1.num_batches_tracked"]) == 2
    for found, expected in zip(on_ranks(recomputed, 2, tmp_path / "again", use_reentrant, renorm), plain, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def recorded(rank, recorder):
    layer, part = bn.BatchNorm1d(C, sync=True, activation="relu"), doubles(9, C).float().split((2, 7))[rank]
    graph = make_fx(layer)(part) if recorder == "make_fx" else torch.export.export(layer, (part,)).module()
    x = part.clone().requires_grad_()
    y = graph(x)
    (y * torch.arange(C)).sum().backward()
    return {"y": y.detach(), "dx": x.grad}


@pytest.mark.parametrize("recorder", ["make_fx", "torch.export"])
def test_a_recorded_graph_has_the_gradients_of_the_whole_batch(recorder, tmp_path):
    x = doubles(9, C).float().requires_grad_()
    y = bn.BatchNorm1d(C, activation="relu")(x)
    (y * torch.arange(C)).sum().backward()
    parts = on_ranks(recorded, 2, tmp_path, recorder)
    for name, whole in (("y", y.detach()), ("dx", x.grad)):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole, **CLOSE)


def accumulated(rank):
    layer, parts = bn.BatchNorm1d(C, sync=True), doubles(12, C).float().split((2, 1, 5, 4))
    with bn.accumulate(layer):
        layer(parts[rank])
        layer(parts[2 + rank])
    return layer.state_dict()


def test_micro_batches_pool_the_moments_of_all_ranks(tmp_path):
    layer = bn.BatchNorm1d(C)
    layer(doubles(12, C).float())
    for found in on_ranks(accumulated, 2, tmp_path):
        torch.testing.assert_close(found, layer.state_dict(), **CLOSE)


if __name__ == "rank":
    run_rank(globals())
elif __name__ == "__main__":
    world = int(os.environ["WORLD_SIZE"])
    run_rank(globals(), ("hundred_steps", int(os.environ["RANK"]), world, sys.argv[1], (world,)))
    dist.barrier()
    os._exit(0)  # gloo now and then aborts an interpreter that winds down
