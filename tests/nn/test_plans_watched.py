"""Planned layers among modes, tracers, transforms, subclasses and hooks, which must see every call."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from planned import CHANNELS, assert_same, laid_out, step, twins, without_plans
from support import randn

pytestmark = pytest.mark.usefixtures("native_kernels")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenByNoGuard(Seen):
    @classmethod
    def ignore_compile_internals(cls):
        return True


@pytest.mark.parametrize("kind", [Seen, SeenByNoGuard])
def test_a_dispatch_mode_sees_the_operator_of_a_planned_layer(kind):
    x = randn(4, CHANNELS)
    layer, _ = twins(x)
    with kind() as mode:
        step(layer, x, torch.ones_like(x))
    assert {"batchnorm.forward.default", "batchnorm.backward.default"} <= set(mode.names)


@pytest.mark.parametrize("kind", [Seen, SeenByNoGuard])
def test_a_dispatch_mode_sees_the_backward_of_a_forward_outside_of_it(kind):
    x = randn(4, CHANNELS).requires_grad_()
    layer, _ = twins(x)
    y = layer(x)
    with kind() as mode:
        y.sum().backward()
    assert "batchnorm.backward.default" in mode.names


@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("planned", [True, False])
def test_a_tracer_records_the_layer(planned, pre_dispatch):
    x = randn(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS).eval()
    if planned:
        layer(x)
        assert layer.step_state.plans
    graph = make_fx(lambda values: layer(values), pre_dispatch=pre_dispatch)(x)
    torch.testing.assert_close(graph(x + 1), layer(x + 1))


def test_a_tracer_records_the_backward_of_a_planned_layer():
    x, dy = randn(4, CHANNELS).requires_grad_(), randn(4, CHANNELS, seed=1)
    layer, fresh = twins(x)
    y = layer(x)
    graph = make_fx(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True))(dy)
    torch.testing.assert_close(graph(2 * dy), torch.autograd.grad(fresh(x), x, 2 * dy))


def test_a_layer_is_traced_with_sizes_left_open():
    layer = bn.BatchNorm1d(CHANNELS).eval()
    trace = make_fx(lambda values: layer(values), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph, x = trace(randn(4, CHANNELS)), randn(7, CHANNELS)
    torch.testing.assert_close(graph(x), layer(x))


def test_with_fake_tensors_a_planned_layer_updates_nothing():
    x = randn(4, CHANNELS)
    layer, _ = twins(x)
    layer(x)
    before = [buffer.clone() for buffer in layer.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x)
    assert_same(before, layer.buffers())


def test_a_selective_checkpoint_keeps_the_output_of_a_planned_layer():
    x = randn(4, CHANNELS)
    layer, fresh = twins(x)

    def policy(context, operator, *_, **__):
        return CheckpointPolicy.MUST_SAVE if "batchnorm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    gradients = []
    for each in (layer, fresh):
        given = x.clone().requires_grad_()
        checkpoint(
            lambda values, each=each: each(values).relu(),
            given,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        ).sum().backward()
        gradients.append(given.grad)
    assert_same(*([gradient] for gradient in gradients))
    assert_same(layer.buffers(), fresh.buffers())


# Torch's own rules for dual numbers use torch.jit.script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_and_forward_mode_use_no_plan():
    x, tangent = randn(4, CHANNELS), randn(4, CHANNELS, seed=1)
    layer, _ = twins(x)
    layer.eval()
    slope = (layer.weight * (layer.running_var + layer.eps).rsqrt()).detach()
    with torch.no_grad():
        for given in (x, x[:1], x.clone().requires_grad_()):
            layer(given)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, tangent * slope)
    given = dict(layer.named_parameters()) | dict(layer.named_buffers())
    per_sample = vmap(lambda each: functional_call(layer, given, (each.unsqueeze(0),)))(x)
    torch.testing.assert_close(per_sample.squeeze(1), layer(x))
    jacobian = torch.func.jacrev(lambda each: layer(each))(x)
    torch.testing.assert_close(jacobian.sum((2, 3)), slope.expand(4, CHANNELS))


class Logged(torch.Tensor):
    pass


def test_a_subclass_of_tensor_uses_no_plan():
    x = randn(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    layer(x)
    assert type(layer(x.as_subclass(Logged))) is Logged


def test_inference_mode_leaves_no_plan_for_training():
    x = randn(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    with torch.inference_mode():
        layer(x)
    fresh = copy.deepcopy(layer)
    assert_same(step(layer, x, torch.ones_like(x)), step(fresh, x, torch.ones_like(x)))


@pytest.mark.parametrize("count", ["num_batches_tracked", "skipped_batches"])
@pytest.mark.parametrize(
    "values", [torch.zeros((), dtype=torch.int64, device="meta"), torch.zeros(3, dtype=torch.int64)]
)
def test_a_count_that_is_not_one_number_here_is_refused_by_the_first_forward(values, count):
    layer = bn.BatchNorm1d(CHANNELS, momentum=None)
    layer._buffers[count] = values
    for _ in range(2):
        with pytest.raises(
            bn.InputError, match=r"input's device, cpu; got one on meta|expected 1 values; got shape \(3,\)"
        ):
            layer(randn(4, CHANNELS))
    assert not layer.running_mean.any()


class Computed(bn.BatchNorm1d):
    share = 0.5

    @property
    def momentum(self):
        return self.share

    @momentum.setter
    def momentum(self, value):
        pass


def test_a_momentum_that_a_subclass_computes_is_read_at_each_forward(monkeypatch):
    layer, x = Computed(CHANNELS), randn(64, CHANNELS) + 10
    for _ in range(2):
        layer(x)
    monkeypatch.setattr(Computed, "share", 1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def test_a_check_of_a_subclass_runs_at_each_forward():
    asked = []

    class Checked(bn.BatchNorm1d):
        def _check_input_dim(self, values):
            asked.append(values.shape)

    layer = Checked(CHANNELS)
    for _ in range(3):
        layer(randn(4, CHANNELS))
    assert len(asked) == 3


# Backward.


@pytest.mark.parametrize("training", [True, False])
def test_a_second_derivative_is_taken_of_a_planned_call(training):
    x = randn(5, CHANNELS, 2, dtype=torch.float64)
    layer = bn.BatchNorm1d(CHANNELS, dtype=torch.float64, track_running_stats=not training)
    for _ in range(2):
        step(layer, x, torch.ones_like(x))
    assert torch.autograd.gradgradcheck(layer.train(training), (x.requires_grad_(),))


def test_batched_gradients_of_a_planned_call_equal_a_loop():
    x, directions = randn(5, CHANNELS), randn(3, 5, CHANNELS, seed=1)
    layer, _ = twins(x)
    x.requires_grad_()
    y = layer(x)
    for _ in range(2):
        (batched,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
        looped = [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in directions]
        torch.testing.assert_close(batched, torch.stack(looped), rtol=1e-4, atol=1e-5)


GRADIENTS = {
    "expanded": lambda dy: dy.sum().expand_as(dy),
    "channels last": lambda dy: laid_out(dy, "channels last"),
    "zeros that are nowhere": lambda dy: torch._efficientzerotensor(dy.shape),
    "negative view": lambda dy: torch._neg_view(dy),
}


@pytest.mark.parametrize("what", GRADIENTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_of_another_layout_is_read_correctly(what, first):
    x, dy = randn(4, CHANNELS, 3, 2), randn(4, CHANNELS, 3, 2, seed=1)
    layer = bn.BatchNorm2d(CHANNELS)
    other = GRADIENTS[what](dy)
    for given in (other, other, dy) if first else (dy, dy, other):
        fresh = copy.deepcopy(layer)
        assert_same(step(layer, x, given), step(fresh, x, given.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_tensors_that_hooks_replace_are_read_correctly(layout):
    x, dy = randn(4, CHANNELS, 3, 2), laid_out(randn(4, CHANNELS, 3, 2, seed=1), layout)
    layer, fresh = twins(x)
    layer.eval()
    expected = step(fresh.eval(), x, dy)

    def unpack(values):
        return laid_out(values, "channels last") if values.dim() == 4 else values[:]

    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda values: values.detach().clone(), unpack):
            found = step(layer, x, dy)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 2), (4, 6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("planned", [True, False])
def test_saved_tensors_that_hooks_lay_out_as_no_kernel_reads_them_are_copied(monkeypatch, planned, shape):
    x, dy = randn(*shape), randn(*shape, seed=1)
    layer, fresh = twins(x)
    expected = step(fresh, x, dy)
    if not planned:
        without_plans(monkeypatch)
        layer = copy.deepcopy(layer)

    def unpack(values):
        return values.transpose(0, -1).contiguous().transpose(0, -1) if values.dim() > 1 else values

    with torch.autograd.graph.saved_tensors_hooks(lambda values: values.detach().clone(), unpack):
        found = step(layer, x, dy)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_tensor_changed_before_the_backward_is_noticed():
    x = randn(4, CHANNELS)
    layer, _ = twins(x)
    y = layer(x.clone().requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_nobody_wants_are_left_out():
    x = randn(4, CHANNELS)
    layer, _ = twins(x)
    y = layer(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x), retain_graph=True)
    (dweight,) = torch.autograd.grad(y, layer.weight, torch.ones_like(x))
    assert dx.shape == x.shape
    assert dweight.shape == (CHANNELS,)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_updates_the_statistics_once(use_reentrant):
    x = randn(4, CHANNELS)
    layer, fresh = twins(x)
    for each in (layer, fresh):
        checkpoint(each, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert_same(layer.buffers(), fresh.buffers())
    assert layer.num_batches_tracked == 3
