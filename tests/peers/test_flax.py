"""`from_flax` and `to_flax` against Flax itself, linen and nnx, with JAX on the CPU."""

import importlib
import os

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flax and JAX themselves

# Values below 10 in float32: both libraries round some 10 times by 6e-8 of that, and Flax takes the variance as the
# difference of two means of squares.
CLOSE = {"rtol": 1e-6, "atol": 1e-5}
OPTIONS = [{}, {"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False}]
OPTIONS += [{"epsilon": 0.1, "momentum": 0.5}]
NUMBERS = ("epsilon", "momentum")


@pytest.fixture(scope="module")
def flax():
    os.environ["JAX_PLATFORMS"] = "cpu"
    peer("flax.linen")
    peer("flax.nnx")
    return importlib.import_module("flax")


def last(x):
    """Return a tensor as an array with its channels last."""
    return x.detach().movedim(1, -1).numpy()


def drawn(tree):
    """Return a tree of arrays with other values than those of a new layer."""
    rng = np.random.default_rng(0)
    return importlib.import_module("jax").tree.map(lambda a: rng.uniform(0.5, 2, a.shape).astype(a.dtype), tree)


def linen_layer(flax, channels=3, dtype="float32", **options):
    """Return a function of (variables, x, training), and variables."""
    layer = flax.linen.BatchNorm(param_dtype=dtype, **options)
    variables = drawn(layer.init(importlib.import_module("jax").random.key(0), np.ones((2, channels)), True))
    return layer, variables


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_infers_and_trains_as_in_linen(flax, options):
    there, variables = linen_layer(flax, **options)
    here = bn.from_flax(variables, **{name: value for name, value in options.items() if name in NUMBERS})
    for step in range(5):
        training, x = 0 < step < 4, randn(2, 3, 4, 5, seed=step) * 2 + 1  # inference, 3 steps, inference
        expected, changed = there.apply(variables, last(x), not training, mutable=["batch_stats"])
        variables = {**variables, **changed}
        np.testing.assert_allclose(last(here.train(training)(x)), expected, **CLOSE)
        for name, values in bn.to_flax(here)["batch_stats"].items():
            np.testing.assert_allclose(values, variables["batch_stats"][name], **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_infers_and_trains_as_in_nnx(flax, options):
    nnx = flax.nnx
    there = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    nnx.update(there, drawn(nnx.state(there)))
    here = bn.from_flax(there)
    for step in range(5):
        training, x = 0 < step < 4, randn(6, 3, seed=step) * 2 + 1
        expected = there(last(x), use_running_average=not training)
        np.testing.assert_allclose(last(here.train(training)(x)), expected, **CLOSE)
        for name, values in bn.to_flax(here)["batch_stats"].items():
            np.testing.assert_allclose(values, np.asarray(getattr(there, name)), **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_variables_come_back_bit_for_bit(flax, options, dtype):
    _, variables = linen_layer(flax, dtype=dtype, **options)
    back = bn.to_flax(bn.from_flax(variables))
    for collection, arrays in variables.items():
        assert back[collection].keys() == arrays.keys()
        for name, values in arrays.items():
            # NumPy has no bfloat16, and statistics are float32 at least; a cast back is exact.
            assert back[collection][name].astype(values.dtype).tobytes() == np.asarray(values).tobytes()


def networks(flax):
    """Three dense layers in linen, two of them in blocks, and torch's model with the same kernels."""
    linen = flax.linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(4)(x))

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.relu(Block()(x, train))
            x = linen.LayerNorm(use_scale=False, use_bias=False)(linen.relu(Block()(x, train)))
            return linen.BatchNorm(use_running_average=not train, momentum=0.9, name="last")(linen.Dense(4)(x))

    jax, there = importlib.import_module("jax"), Network()
    variables = drawn(jax.jit(there.init, static_argnums=2)(jax.random.key(0), np.ones((2, 3)), True))
    kernels = [variables["params"][name] for name in ("Block_0", "Block_1")]
    kernels = [block["Dense_0"] for block in kernels] + [variables["params"]["Dense_0"]]
    here = nn.Sequential()
    for dense in kernels:
        here.extend([nn.Linear(len(dense["kernel"]), 4), nn.BatchNorm1d(4), nn.ReLU()])
        with torch.no_grad():
            here[-3].weight.copy_(torch.tensor(dense["kernel"]).T)
            here[-3].bias.copy_(torch.tensor(dense["bias"]))
    here.insert(6, nn.LayerNorm(4, eps=1e-6, elementwise_affine=False))
    return there, variables, here[:-1]


NAMES = {"Block_0/BatchNorm_0": "1", "Block_1/BatchNorm_0": "4", "last": "8"}


def test_a_model_infers_trains_and_returns_as_in_linen(flax):
    there, variables, model = networks(flax)
    apply = importlib.import_module("jax").jit(there.apply, static_argnums=2, static_argnames="mutable")
    here, _ = bn.from_flax(variables, model, NAMES, momentum=0.9)
    back = bn.to_flax(here, NAMES)
    for collection, tree in back.items():
        for name in NAMES:
            given, found = variables[collection], tree
            for part in name.split("/"):
                given, found = given[part], found[part]
            assert found.keys() == given.keys()
            assert all(values.tobytes() == np.asarray(given[key]).tobytes() for key, values in found.items())
    for step in range(5):
        training, x = 0 < step < 4, randn(6, 3, seed=step)
        expected, changed = apply(variables, x.numpy(), training, mutable=("batch_stats",))
        variables = {**variables, **changed}
        # Three layers, each divided by a standard deviation below 1: some ten times the error of one.
        np.testing.assert_allclose(here.train(training)(x).detach(), expected, rtol=1e-5, atol=1e-4)


def test_a_frozen_dict_and_a_state_of_nnx_are_read(flax):
    norm = {"scale": np.ones(3), "mean": np.ones(3), "var": np.ones(3)}
    collections = {"params": ["scale"], "batch_stats": ["mean", "var"]}
    norms = {name: {key: norm[key] for key in keys} for name, keys in collections.items()}
    frozen = flax.core.freeze({name: {"Block_0": {"BatchNorm_0": norms[name]}, "last": norms[name]} for name in norms})
    with pytest.raises(bn.InputError, match="got 2, the first 'Block_0/BatchNorm_0'"):
        bn.from_flax(frozen)
    with pytest.raises(bn.InputError, match="differ by a number alone"):
        bn.from_flax(frozen, nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), "order")
    assert bn.from_flax(flax.nnx.state(flax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)))).num_features == 3


def test_a_module_of_nnx_is_read_by_its_paths_and_takes_its_state_back(flax):
    nnx = flax.nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.BatchNorm(3, rngs=rngs, momentum=0.5)
            self.blocks = nnx.List([nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))])

    there = Network(nnx.Rngs(0))
    nnx.update(there, drawn(nnx.state(there)))
    names = {"first": "0", "blocks/0/layers/1": "1"}
    here, report = bn.from_flax(there, nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), names)
    assert [row.after for row in report.layers] == ["bn.BatchNorm1d of first", "bn.BatchNorm1d of blocks/0/layers/1"]
    assert (here[0].momentum, here[1].momentum) == (0.5, 0.01)
    same, _ = bn.from_flax(nnx.state(there), nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), names)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), here.parameters(), strict=True))
    here(randn(4, 3))
    state = bn.to_flax(here, {"first": "0"})
    for collection in state.values():
        nnx.update(there, collection)
    assert np.array_equal(np.asarray(there.first.mean), here[0].running_mean.numpy())
