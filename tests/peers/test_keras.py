"""`from_keras` and `to_keras` against Keras itself, on its backend of torch."""

import importlib
import os

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Keras itself

# Values below 10 in float32: both libraries round some 10 times by 6e-8 of that.
CLOSE = {"rtol": 1e-6, "atol": 5e-6}


@pytest.fixture(scope="module")
def keras():
    """Keras with torch as its backend, in float32, on the CPU."""
    os.environ["KERAS_BACKEND"] = "torch"
    found = peer("keras")
    assert found.backend.backend() == "torch"
    return found


def drawn(weights):
    """Return arrays of the same shapes and dtypes, with values that no new layer has."""
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 2, values.shape).astype(values.dtype) for values in weights]


def trained(keras, shape=(6, 3), **options):
    """Return a layer for inputs (N, C, *), which Keras takes as (N, *, C)."""
    layer = keras.layers.BatchNormalization(**options)
    layer.build((None, *shape[2:], shape[1]))
    layer.set_weights(drawn(layer.get_weights()))
    return layer


def channels_last(x):
    return x.movedim(1, -1)


OPTIONS = [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}, {"epsilon": 0.1}]
OPTIONS += [{"momentum": 0.5}]


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_infers_and_trains_as_in_keras(keras, options, shape):
    there = trained(keras, shape, **options)
    here = bn.from_keras(there)
    assert repr(here.momentum) == repr(round(1 - there.momentum, 3))
    for step in range(5):
        training, x = 0 < step < 4, randn(*shape, seed=step) * 2 + 1  # inference, 3 steps, inference
        expected = there(channels_last(x), training=training)
        torch.testing.assert_close(channels_last(here.train(training)(x)), expected, **CLOSE)
        for name, values in bn.to_keras(here).items():
            np.testing.assert_allclose(values, np.asarray(getattr(there, name)), **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_weights_come_back_bit_for_bit(keras, options, dtype):
    there = trained(keras, dtype=dtype, **options)
    before = [values.tobytes() for values in there.get_weights()]
    found = [*bn.to_keras(bn.from_keras(there)).values()]
    there.set_weights([np.ones_like(values) for values in found])
    there.set_weights(found)
    assert [values.tobytes() for values in there.get_weights()] == before


def test_a_gradient_step_is_that_of_keras(keras):
    there = trained(keras)
    here, x = bn.from_keras(there), randn(6, 3)
    (here(x) * randn(6, 3, seed=1)).sum().backward()
    (there(x, training=True) * randn(6, 3, seed=1)).sum().backward()
    torch.testing.assert_close(here.weight.grad, there.gamma.value.grad, **CLOSE)
    torch.testing.assert_close(here.bias.grad, there.beta.value.grad, **CLOSE)


def test_a_layer_that_is_not_trainable_comes_frozen(keras):
    there = trained(keras, trainable=False)
    here, x = bn.from_keras(there), randn(6, 3)
    torch.testing.assert_close(here.train()(x), there(x, training=True), **CLOSE)
    assert here.frozen_statistics
    assert here.frozen_affine


def test_a_layer_that_was_never_built_raises_a_sentence(keras):
    with pytest.raises(bn.InputError, match="fresh must be built, which gives it its arrays"):
        bn.from_keras(keras.layers.BatchNormalization(name="fresh"))


def convolutional(keras):
    """A Keras model of three convolutions, one in a custom layer, and torch's model with the same kernels."""
    layers = keras.layers

    class Block(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm, self.conv = layers.BatchNormalization(momentum=0.9), layers.Conv2D(4, 3, use_bias=False)

        def call(self, x, training=None):
            return self.norm(self.conv(x), training=training)

    inputs = keras.Input((9, 9, 2))
    x = layers.ReLU()(layers.BatchNormalization(name="first")(layers.Conv2D(4, 3)(inputs)))
    x = layers.ReLU()(Block(name="block")(x))
    inner = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization(scale=False, name="last")], name="inner")
    there = keras.Model(inputs, inner(x))
    here = nn.Sequential()
    for kernel in [w for w in there.weights if w.name == "kernel"]:
        here.extend([nn.Conv2d(kernel.shape[2], 4, 3, bias="block" not in kernel.path), nn.BatchNorm2d(4), nn.ReLU()])
        weights = {w.path: torch.tensor(np.asarray(w)) for w in there.weights}
        with torch.no_grad():
            here[-3].weight.copy_(weights[kernel.path].permute(3, 2, 0, 1))
            if here[-3].bias is not None:
                here[-3].bias.copy_(weights[kernel.path.replace("kernel", "bias")])
    return there, here[:-1]


@pytest.mark.parametrize("names", [{"first": "1", "block/batch_normalization": "4", "inner/last": "7"}, "order"])
def test_a_model_infers_and_trains_as_in_keras(keras, names):
    keras.utils.clear_session()
    there, model = convolutional(keras)
    if names != "order":
        (block,) = {v.path.rpartition("/")[0] for v in there.weights if v.path.startswith("block/batch")}
        names = {block if path == "4" else name: path for name, path in names.items()}
    here, report = bn.from_keras(there, model, names)
    assert [row.path for row in report.layers] == ["1", "4", "7"]
    assert [here[i].momentum for i in (1, 4, 7)] == [0.01, 0.1, 0.01]
    for step in range(5):
        training, x = 0 < step < 4, randn(2, 2, 9, 9, seed=step)
        expected = there(channels_last(x), training=training)
        # Three layers: each passes the error of the one before, divided by a standard deviation near 1.
        torch.testing.assert_close(channels_last(here.train(training)(x)), expected, rtol=1e-5, atol=2e-5)


def test_the_arrays_in_a_file_of_keras_are_read(keras, tmp_path):
    h5py = importlib.import_module("h5py")
    there, _ = convolutional(keras)
    for layer in there.layers:
        layer.set_weights(drawn(layer.get_weights()))
    there.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        vars_of_first = file["layers/batch_normalization/vars"]
        found = bn.from_keras([vars_of_first[str(i)] for i in range(4)])
    expected = bn.to_keras(bn.from_keras(there.get_layer("first")))
    assert all(np.array_equal(values, expected[name]) for name, values in bn.to_keras(found).items())
