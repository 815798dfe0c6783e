"""Tensors that do not hold their values: wrappers of other tensors, and tensors whose memory was freed."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_map

import batchnorm as bn
from batchnorm.kernels import library
from support import randn

CHANNELS = 6


pytestmark = pytest.mark.usefixtures("native_kernels")


class Wrapped(torch.Tensor):
    """A tensor that wraps another."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values_within = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return tree_map(lambda each: cls(each) if isinstance(each, torch.Tensor) else each, function(*args, **kwargs))


def functional(values):
    return torch._to_functional_tensor(values)


def leaked(values):
    """Return a tensor of torch.func.grad that outlives it."""
    kept = []

    def keep(given):
        kept.append(given)
        return given.sum()

    torch.func.grad(keep)(values)
    return kept[0]


def plain(values):
    if not isinstance(values, torch.Tensor):
        return values
    if isinstance(values, Wrapped):
        return values.values_within
    if torch._is_functional_tensor(values):
        torch._sync(values)
        return torch._from_functional_tensor(values)
    return torch.func.debug_unwrap(values)


WRAPPERS = {"subclass": Wrapped, "functional": functional, "leaked": leaked}


@pytest.fixture(params=[True, False], ids=["planned", "fresh"])
def layer(request):
    """A layer with plans for the inputs of this file, or without."""
    layer = bn.BatchNorm1d(CHANNELS, activation="relu")
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    if request.param:
        for training in (False, True):
            layer.train(training)
            for x in (randn(4, CHANNELS), randn(4, CHANNELS).requires_grad_()):
                layer(x)
                layer(x, randn(4, CHANNELS))
    layer.eval()
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_layer_s_own_may_be_wrapped(layer, wrapper, name, training):
    x, other = randn(4, CHANNELS), copy.deepcopy(layer).train(training)
    values = randn(CHANNELS, seed=1).abs() + 1
    for each, given in ((layer.train(training), WRAPPERS[wrapper](values)), (other, values.clone())):
        held = each._parameters if name in each._parameters else each._buffers
        held[name] = given
    for _ in range(2):
        torch.testing.assert_close(plain(layer(x).detach()), other(x).detach())
    if training:
        for mine, theirs in zip(layer.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(plain(mine), theirs)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_input_or_residual_may_be_wrapped(layer, wrapper):
    x, residual = randn(4, CHANNELS), randn(4, CHANNELS, seed=1)
    expected = layer(x, residual).detach()
    wrap = WRAPPERS[wrapper]
    for given in ((wrap(x), residual), (x, wrap(residual)), (wrap(x), wrap(residual))):
        torch.testing.assert_close(plain(layer(*given).detach()), expected)


@pytest.mark.parametrize("wrapper", ["subclass", "leaked"])
def test_a_gradient_may_be_wrapped(layer, wrapper):
    dy, other = randn(4, CHANNELS, seed=2), copy.deepcopy(layer)
    x, same = randn(4, CHANNELS).requires_grad_(), randn(4, CHANNELS).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(layer(x), x, WRAPPERS[wrapper](dy))
        (expected,) = torch.autograd.grad(other(same), same, dy)
        torch.testing.assert_close(plain(found), expected)


def test_the_gradient_of_a_wrapped_weight_is_wrapped(layer):
    x, other = randn(4, CHANNELS), copy.deepcopy(layer)
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach()))
    for each in (layer, other):
        each(x).sum().backward()
    assert type(layer.weight.grad) is Wrapped
    torch.testing.assert_close(plain(layer.weight.grad), other.weight.grad)


def freed(values):
    values.untyped_storage().resize_(0)
    return values


def freed_view(values):
    """Return a part of a longer tensor, as when the parameters of a model share one."""
    whole = torch.cat((values.reshape(-1),) * 2)
    part = whole[values.numel() :].view(values.shape)
    whole.untyped_storage().resize_(0)
    return part


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("free", [freed, freed_view])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked", "x"])
def test_memory_that_was_freed_is_not_read(layer, name, free, training):
    layer.train(training)
    x = free(randn(4, CHANNELS)) if name == "x" else randn(4, CHANNELS)
    if name != "x":
        held = layer._parameters if name in layer._parameters else layer._buffers
        held[name] = free(held[name].detach().clone())
    with pytest.raises(bn.InputError, match=r"have their values in memory; that of one of shape \(.*\) was freed"):
        layer(x)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "dy"])
def test_memory_that_is_freed_before_the_backward_is_not_read(layer, name):
    tensors = {"x": randn(4, CHANNELS).requires_grad_(), "dy": randn(4, CHANNELS), **layer._parameters}
    y = layer.train()(tensors["x"])
    freed(tensors[name])
    with pytest.raises(bn.InputError, match="was freed"):
        y.backward(tensors["dy"])


def test_where_memory_begins_lower_than_was_thought_it_is_read_all_the_same(layer):
    x, other, handle = randn(4, CHANNELS).requires_grad_(), copy.deepcopy(layer), library.library().handle
    expected = torch.autograd.grad(other(x), x, x)
    try:
        handle.bn_set_min_address(1 << 62)
        y = layer(x)
        handle.bn_set_min_address(1 << 62)
        found = torch.autograd.grad(y, x, x)
    finally:
        handle.bn_set_min_address(library.low_address())
    torch.testing.assert_close(found, expected)


def test_no_values_need_no_memory():
    layer = bn.BatchNorm1d(0)
    assert layer(torch.empty(4, 0, 3)).shape == (4, 0, 3)
    assert bn.BatchNorm1d(CHANNELS).eval()(torch.empty(0, CHANNELS)).shape == (0, CHANNELS)


def test_in_inference_mode_no_gradient_is_kept_though_gradients_are_enabled(layer):
    with torch.inference_mode(), torch.enable_grad():
        for _ in range(2):
            assert not layer(randn(4, CHANNELS)).requires_grad


def test_any_number_of_dimensions_may_lie_in_any_order():
    x = randn(2, CHANNELS, 2, 3, 2, 2)
    shuffled = x.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    torch.testing.assert_close(bn.BatchNorm(CHANNELS)(shuffled), bn.BatchNorm(CHANNELS)(x))
