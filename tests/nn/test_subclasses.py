"""Tensors of subclasses through the layers: kernels read the tensor underneath, y is of the class of torch's y."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import batchnorm as bn
from support import assert_same_buffers, compiles, copied_buffers, randn

# Sums of 40 float32 values of order 5, in another order: off by a few roundings of 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Tagged(torch.Tensor):
    """A subclass like most: results are of its class, and its methods take other arguments than a tensor's."""

    def new_empty(self, size, dtype=None):
        raise AssertionError("new_empty must not be called")

    contiguous = is_contiguous = data_ptr = stride = new_empty


class Unwrapping(torch.Tensor):
    """A subclass whose results are plain tensors, as torchvision's images are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found


class Hidden(torch.Tensor):
    """A subclass that is not asked."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class OwnParameter(nn.Parameter):
    pass


KINDS = [Tagged, Unwrapping, Hidden, nn.Parameter, OwnParameter, nn.Buffer]


def of_kind(kind, values):
    return values.as_subclass(kind) if kind in (Tagged, Unwrapping, Hidden) else kind(values)


def outcome(run, x, layer):
    """Return class and values of y, then of the gradients, then the statistics."""
    x = x.detach().requires_grad_() if not x.requires_grad else x
    y = run(x)
    y.square().sum().backward()
    return [(type(v), v.detach().as_subclass(torch.Tensor)) for v in (y, x.grad, layer.weight.grad, layer.running_var)]


def assert_same_outcome(found, expected):
    assert [kind for kind, _ in found] == [kind for kind, _ in expected]
    torch.testing.assert_close([values for _, values in found], [values for _, values in expected], **CLOSE)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_a_subclass_gives_what_torchs_layer_gives(kind, mode):
    x = randn(5, 3, 4, 2) * 2 + 1
    layers = [of.BatchNorm2d(3).train(mode) for of in (bn, nn)]
    assert_same_outcome(*(outcome(layer, of_kind(kind, x.clone()), layer) for layer in layers))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [lambda values: nn.Parameter(of_kind(Tagged, values)), OwnParameter])
def test_a_gamma_of_a_subclass_gives_what_torchs_layer_gives(kind, mode):
    found = []
    for of in (bn, nn):
        layer = of.BatchNorm2d(3).train(mode)
        layer.weight = kind(randn(3, seed=1))
        found.append(outcome(layer, randn(5, 3, 4, 2), layer))
    assert_same_outcome(*found)


OPTIONS = {
    "activation": {"activation": "silu"},
    "virtual batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": bn.Renorm(3.0, 3.0)},
    "channels last": {"channel_dim": -1},
    "accumulate": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_gives_a_subclass_the_numbers_of_a_tensor(name):
    layer, x = bn.BatchNorm(3, **OPTIONS[name]), randn(6, 3, 3)
    twin = copy.deepcopy(layer)
    residual, mask = randn(6, 3, 3, seed=1), randn(6, 3, seed=2) > 0
    if name == "accumulate":
        with bn.accumulate(layer), bn.accumulate(twin):
            found, expected = layer(of_kind(Tagged, x), residual, mask), twin(x, residual, mask)
    else:
        found, expected = layer(x, of_kind(Tagged, residual), of_kind(Tagged, mask)), twin(x, residual, mask)
    assert type(found) is Tagged
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert_same_buffers(layer, copied_buffers(twin))
    assert {type(buffer) for buffer in layer.buffers()} == {torch.Tensor}


def test_a_subclass_with_an_infinity_does_not_poison_the_statistics():
    layer = bn.BatchNorm1d(3)
    before = copied_buffers(layer) | {"skipped_batches": torch.tensor(1)}
    layer(of_kind(Tagged, torch.full((4, 3), torch.inf)))
    assert_same_buffers(layer, before)


@pytest.mark.parametrize("called", [torch.ops.batchnorm.forward, bn.batch_norm])
def test_operators_and_functions_call_no_method_of_a_subclass(called):
    x = randn(4, 3, 2)
    options = {"training": True} if called is bn.batch_norm else {"eps": 1e-5, "activation": None}
    names = ("residual", "mask") if called is not bn.batch_norm else ()
    given = dict.fromkeys(names)
    y = (called(of_kind(Tagged, x), None, None, None, None, **given, **options),)
    y = y[0] if isinstance(y[0], torch.Tensor) else y[0][0]
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(torch.Tensor), F.batch_norm(x, None, None, training=True), **CLOSE)


def test_normalize_gives_y_of_the_subclass_and_plain_statistics():
    x, stats = randn(4, 3, 2), bn.Stats(torch.zeros(3), torch.ones(3), torch.tensor(0))
    y, found = bn.normalize(of_kind(Tagged, x), stats)
    expected, expected_stats = bn.normalize(x, stats)
    assert type(y) is Tagged
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    assert [type(values) for values in found] == [torch.Tensor] * 3
    torch.testing.assert_close(found, expected_stats, rtol=0, atol=0)


class Simple(torch.Tensor):
    """A subclass that replaces no method; torch.compile itself calls some of them."""


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_compiled_layer_gives_the_class_that_torchs_layer_gives(mode):
    x, ours, theirs = randn(5, 3, 4, 2), bn.BatchNorm2d(3).train(mode), nn.BatchNorm2d(3).train(mode)
    found = outcome(torch.compile(ours, backend="aot_eager"), x.clone().as_subclass(Simple), ours)
    assert_same_outcome(found, outcome(theirs, x.clone().as_subclass(Simple), theirs))


class KnowsBatchNorm(torch.Tensor):
    """A class with a fixed list of functions, those that torch's layer calls."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (F.batch_norm, torch.Tensor.dim, torch.Tensor.as_subclass):
            return super().__torch_function__(function, types, args, kwargs or {})
        return NotImplemented


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_class_that_takes_torchs_batch_norm_alone_gets_that(mode):
    x = randn(4, 3, 2)
    ys = [of.BatchNorm1d(3).train(mode)(x.as_subclass(KnowsBatchNorm)) for of in (bn, nn)]
    assert type(ys[0]) is type(ys[1]) is KnowsBatchNorm
    assert torch.equal(*(y.as_subclass(torch.Tensor) for y in ys))


def test_a_class_that_takes_torchs_batch_norm_alone_refuses_options():
    with pytest.raises(bn.UnsupportedError, match="KnowsBatchNorm takes torch's batch norm and no other function"):
        bn.BatchNorm1d(3, activation="relu")(randn(4, 3, 2).as_subclass(KnowsBatchNorm))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_wrapper_of_two_tensors_gives_what_torchs_layer_gives(mode):
    x, found = randn(5, 3, 4, 2), []
    for of in (bn, nn):
        layer, pair = of.BatchNorm2d(3).train(mode), TwoTensor(x.clone(), x + 1).requires_grad_()
        y = layer(pair)
        y.square().sum().backward()
        found.append([y.a, y.b, pair.grad.a, pair.grad.b, layer.weight.grad.b])
    torch.testing.assert_close(*found, **CLOSE)


REFUSED = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_that_is_not_dense_is_refused_with_a_way_out(kind):
    with pytest.raises(bn.InputError, match=r"must be a dense tensor; got .*(Pad it|Give input.to_dense)"):
        bn.BatchNorm2d(3)(REFUSED[kind](randn(4, 3, 4, 2)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_an_input_that_is_not_of_a_floating_dtype_is_refused(dtype):
    with pytest.raises(bn.InputError, match="input must have a floating dtype; got"):
        bn.BatchNorm1d(3)(torch.ones(4, 3).to(dtype))


def test_parameters_of_a_complex_dtype_are_refused():
    layer = bn.BatchNorm1d(3)
    layer.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(bn.InputError, match=r"must have one of the dtypes torch.float32.*; got torch.complex64"):
        layer(randn(4, 3))
