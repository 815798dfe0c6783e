"""Layers on DTensors: in every placement the results are those of the whole batch in one process."""

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from ranks import on_ranks, run_rank
from support import compiles, randn

# Sums of at most a few hundred float32 numbers of size 10 or less, in another order: off by less than 1e-5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
C = 6
PLACEMENTS = ["replicate", "samples", "channels", "positions", "partial"]

OPTIONS = {
    "plain": {},
    "activation": {"activation": "relu"},
    "cumulative": {"momentum": None, "unbiased": False},
    "virtual batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": bn.Renorm(3.0, 3.0)},
    "channels last": {"channel_dim": -1},
    "without gamma": {"affine": False},
    "without statistics": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
}


def placed(values, mesh, placement):
    """Return the values as a DTensor that is placed so."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    if placement == "partial":
        return DTensor.from_local(values / mesh.size(), mesh, [Partial()])
    each = {"replicate": Replicate(), "samples": Shard(0), "channels": Shard(1), "positions": Shard(2)}
    return distribute_tensor(values, mesh, [each[placement]])


def distributed(layer, mesh):
    from torch.distributed.tensor import distribute_module

    return distribute_module(copy.deepcopy(layer), mesh)


def whole(values):
    return None if values is None else values.full_tensor()


def step(layer, x, dy, residual=None, mask=None):
    """Return y, gradients and buffers by name."""
    y = layer(x.requires_grad_(), residual, mask)
    (y * dy).sum().backward()
    found = {"y": y.detach(), "dx": x.grad} | dict(layer.named_buffers())
    return found | {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}


def check_step(layer, mesh, placement, x, *, mask=None, residual=None):
    """Compare a step of a layer on DTensors with one on whole tensors, and return the former."""
    dy = randn(*x.shape, seed=9, dtype=x.dtype)
    expected = step(copy.deepcopy(layer), x.clone(), dy, residual, mask)
    others = [None if each is None else placed(each, mesh, "replicate") for each in (dy, residual, mask)]
    found = step(distributed(layer, mesh), placed(x, mesh, placement).detach(), *others)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(whole(values), expected[name], **CLOSE, msg=f"{placement}: {name}")
    return found


def mesh_of(world):
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (world,))


def batch(dtype=torch.float32):
    return randn(4, C, 4, C, dtype=dtype) * 2 + 3


def check_options(rank, world):
    mesh = mesh_of(world)
    for options in OPTIONS.values():
        layer, x = bn.BatchNorm(C, **options), batch(options.get("dtype", torch.float32))
        for placement in PLACEMENTS:
            check_step(layer.train(), mesh, placement, x)
        check_step(layer.eval(), mesh, "samples", x)


@pytest.mark.parametrize("world", [1, 2])
def test_each_option_gives_the_results_of_the_whole_batch(world, tmp_path):
    on_ranks(check_options, world, tmp_path, world)


def check_residual_and_mask(rank, world):
    mesh, x, mask = mesh_of(world), batch(), randn(4, 4, C, seed=3) > -0.5
    for placement in PLACEMENTS:
        layer = bn.BatchNorm2d(C, activation="silu", virtual_batch_size=2)
        check_step(layer, mesh, placement, x, residual=randn(*x.shape, seed=4), mask=mask)


def test_a_residual_and_a_mask_are_dtensors_too(tmp_path):
    on_ranks(check_residual_and_mask, 2, tmp_path, 2)


def check_placements(rank, world):
    mesh = mesh_of(world)
    for mode in (True, False):
        for placement in PLACEMENTS:
            found = check_step(bn.BatchNorm2d(C).train(mode), mesh, placement, batch())
            if placement == "partial":  # torch has no sharding that costs less
                continue
            y = distributed(nn.BatchNorm2d(C), mesh).train(mode)(placed(batch(), mesh, placement))
            assert found["y"].placements == y.placements


def test_y_is_placed_as_by_torchs_layer(tmp_path):
    on_ranks(check_placements, 2, tmp_path, 2)


def check_state(rank, world):
    mesh, x = mesh_of(world), batch()
    layer = distributed(bn.BatchNorm2d(C), mesh)
    poisoned = x.clone()
    poisoned[0, 0, 0, 0] = torch.inf
    layer(placed(poisoned, mesh, "channels"))  # its first channel is on one rank alone
    assert whole(layer.skipped_batches).item() == 1
    assert torch.equal(whole(layer.running_var), torch.ones(C))
    twin = bn.BatchNorm2d(C)
    with bn.accumulate(layer), bn.accumulate(twin):
        for part in x.split(2):
            layer(placed(part, mesh, "channels")), twin(part)
    torch.testing.assert_close(whole(layer.running_var), twin.running_var, **CLOSE)


def test_skipped_and_accumulated_batches_count_for_the_whole_mesh(tmp_path):
    on_ranks(check_state, 2, tmp_path, 2)


def check_frozen_gamma(rank, world):
    mesh = mesh_of(world)
    layer, x = distributed(bn.BatchNorm2d(C), mesh), placed(batch(), mesh, "channels").detach().requires_grad_()
    for learns in (False, True):  # torch keeps the shapes of gradients that it has seen
        layer.weight.requires_grad_(learns)
        layer(x).square().sum().backward()
    assert whole(layer.weight.grad).shape == (C,)


def test_a_gamma_that_learns_again_gets_its_whole_gradient(tmp_path):
    on_ranks(check_frozen_gamma, 1, tmp_path, 1)


def check_sync(rank, world):
    mesh = mesh_of(world)
    distributed(bn.BatchNorm2d(C, sync=True), mesh)(placed(batch(), mesh, "samples"))


def test_sync_refuses_a_dtensor_whose_batch_is_whole_already(tmp_path):
    for error in on_ranks(check_sync, 2, tmp_path, 2, errors=2):
        assert isinstance(error, bn.UnsupportedError)
        assert "a DTensor has the statistics of its whole mesh without sync=True" in str(error)


def check_mesh(rank, world):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, x = init_device_mesh("cpu", (2, 2)), batch()
    expected = bn.BatchNorm2d(C)(x)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Replicate(), Shard(1)], [Shard(0), Shard(2)]):
        y = distributed(bn.BatchNorm2d(C), mesh)(distribute_tensor(x, mesh, placements))
        torch.testing.assert_close(whole(y), expected, **CLOSE)


def test_a_mesh_of_two_dimensions_gives_the_whole_batchs_results(tmp_path):
    on_ranks(check_mesh, 4, tmp_path, 4)


def check_compiled(rank, world):
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.compile's own
    mesh, x = mesh_of(world), batch()
    for placement in ("samples", "channels"):
        layer, expected = distributed(bn.BatchNorm2d(C), mesh), bn.BatchNorm2d(C)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(placed(x, mesh, placement))
        torch.testing.assert_close(whole(y), expected(x), **CLOSE)
        torch.testing.assert_close(whole(layer.running_mean), expected.running_mean, **CLOSE)


@compiles
def test_a_compiled_layer_takes_dtensors(tmp_path):
    on_ranks(check_compiled, 1, tmp_path, 1, seconds=120)


if __name__ == "rank":
    run_rank(globals())
