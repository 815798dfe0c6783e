"""Layers under FSDP1 and FSDP2, on gloo: their statistics stay float32, and begin right on the meta device."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard

import batchnorm as bn
from ranks import on_ranks, run_rank

FINE = 1 + 2.0**-12
"""A value that bfloat16 rounds to 1."""

HALF = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 3), bn.BatchNorm1d(3, momentum=None))
    for layer in model[1::2]:
        layer.running_mean.fill_(FINE)
        layer.running_var.fill_(FINE)
    return model


def fsdp1(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True, **options)


def fsdp2(model, **options):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def wrapped_in_half(kind, model):
    if kind == "fsdp1":
        return fsdp1(model, mixed_precision=MixedPrecision(**HALF, buffer_dtype=torch.bfloat16))
    return fsdp2(model, mp_policy=MixedPrecisionPolicy(**HALF))


def statistics(model):
    return [values.clone() for name, values in model.named_buffers() if name.endswith(("running_mean", "running_var"))]


def keep_float32(rank, kind):
    """Wrap a model, run it in eval and in training, and return its statistics after each."""
    model = network()
    wrapped = wrapped_in_half(kind, model)
    wrapped.eval()(torch.randn(8, 4))
    found = [statistics(model)]
    wrapped.train()
    for seed in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * rank + seed))
        wrapped(x).float().square().sum().backward()
    found.append(statistics(model))
    state = {name: values for name, values in wrapped.state_dict().items() if "running" in name}
    return found, state


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_statistics_stay_float32_to_the_last_digit_under_mixed_precision(kind, tmp_path):
    for (loaded, trained), state in on_ranks(keep_float32, 2, tmp_path, kind):
        assert all(values.dtype == torch.float32 and values.tolist() == [FINE] * 3 for values in loaded)
        assert all(values.dtype == torch.float32 and not torch.equal(values, values.bfloat16()) for values in trained)
        assert [values.tolist() for values in state.values()] == [values.tolist() for values in trained]


def begin_on_meta(rank, kind):
    """Materialize a model that was built on meta, with a frozen layer, and train it on a batch that is not finite."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), bn.freeze(bn.BatchNorm1d(3), affine=True))
    if kind == "fsdp1":
        wrapped = fsdp1(model, param_init_fn=functools.partial(nn.Module.to_empty, device="cpu", recurse=False))
    else:
        wrapped = fsdp2(model)
        wrapped.to_empty(device="cpu")
    nn.init.ones_(model[0].weight)
    wrapped(torch.full((8, 4), torch.nan))
    names = [name for name, _ in model[1].named_buffers()]
    return names, int(model[1].skipped_batches), int(model[1].num_batches_tracked), statistics(model)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_model_built_on_meta_begins_as_a_new_one(kind, tmp_path):
    for names, skipped, batches, found in on_ranks(begin_on_meta, 2, tmp_path, kind):
        assert {"skipped_batches", "samples_seen"} <= set(names)
        assert (skipped, batches) == (1, 0)
        assert [values.tolist() for values in found] == [[0.0] * 3, [1.0] * 3] * 2


def pool_after_loading(rank):
    """Train a model that was built on meta and loaded tensor by tensor, then pool."""
    with torch.device("meta"):
        layer = bn.BatchNorm1d(1, momentum=None)
    for name, values in bn.BatchNorm1d(1).state_dict().items():
        (layer._parameters if name in layer._parameters else layer._buffers)[name] = values.clone()
    for seed in range(10):
        size, mean = [(64, 0.0), (4, 10.0)][rank]
        layer(torch.randn(size, 1, generator=torch.Generator().manual_seed(seed)) + mean)
    before, samples = layer.running_mean.clone(), int(layer.samples_seen)
    bn.pool_running_stats(layer)
    return before, samples, layer.running_mean


def test_pooling_weighs_models_built_on_meta_by_the_samples_they_saw(tmp_path):
    found = on_ranks(pool_after_loading, 2, tmp_path)
    assert [samples for _, samples, _ in found] == [640, 40]
    expected = (640 * found[0][0] + 40 * found[1][0]) / 680
    for _, _, pooled in found:
        torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)  # rounded once to float32


if __name__ == "rank":
    run_rank(globals())
