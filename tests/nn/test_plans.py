"""Forwards like an earlier one go by its plan, without its questions, and give the same; others are told apart."""

import copy
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._C._dynamo import guards
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm as bn
from batchnorm import ops, torch_internals
from batchnorm.kernels import native, plan
from batchnorm.kernels.call import CallLayout
from batchnorm.kernels.chosen import cpu_kernel

LAYER = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
CHANNELS = 6


@pytest.fixture(autouse=True)
def native_kernels():
    """CPU tensors take the native kernels here."""
    assert cpu_kernel() == "native"


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x, layout):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if layout == "channels last" and x.dim() in formats else x


def step(layer, x, dy, residual=None, **how):
    """Everything that a forward and backward give, and what they leave in the layer."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual)
    leaves = [values for values in (x, residual, *layer.parameters()) if values is not None and values.requires_grad]
    gradients = torch.autograd.grad(y, leaves, dy, **how)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


def same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def twins(x, residual=None, **options):
    """A layer that has plans for such input, and its equal that has none."""
    layer = LAYER[x.dim()](CHANNELS, **options)
    with torch.no_grad():
        for values in layer.parameters():
            values.uniform_(0.5, 1.5)
    for _ in range(2):
        step(layer, x, torch.ones_like(x), residual)
    assert layer.step_state.plans
    fresh = copy.deepcopy(layer)
    assert not fresh.step_state.plans
    return layer, fresh


def by_questions(monkeypatch):
    """Let no call go by a plan."""
    monkeypatch.setattr(ops, "make_plan", lambda *_: None)


def refuse_questions(monkeypatch):
    """Let no call go without a plan, forward or backward."""

    def refuse(*_, **__):
        pytest.fail("asked again")

    for module, name in (
        (ops.normalization, "normalize"),
        (ops, "make_plan"),
        (CallLayout, "of"),
        (native, "backward"),
    ):
        monkeypatch.setattr(module, name, refuse)


OPTIONS = {
    "plain": {},
    "activation": {"activation": "leaky_relu"},
    "no parameters": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "propagate": {"nonfinite": "propagate"},
    "biased": {"unbiased": False},
    "eps": {"eps": 1e-2},
    "virtual batches": {"virtual_batch_size": 2},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_plan_gives_to_the_bit_what_questions_do(monkeypatch, options, with_residual, training):
    shape = (5, CHANNELS, 3)
    batches = [numbers(*shape, seed=i) + i for i in range(4)]
    batches[2][1, 2, 0] = torch.nan
    dy, residual = numbers(*shape, seed=8), numbers(*shape, seed=9) if with_residual else None
    layer = bn.BatchNorm1d(CHANNELS, **OPTIONS[options]).train(training)
    other = copy.deepcopy(layer)
    by_plan = [step(layer, x, dy, residual) for x in batches]
    assert layer.step_state.plans
    by_questions(monkeypatch)
    for mine, x in zip(by_plan, batches, strict=True):
        same(mine, step(other, x, dy, residual))
    assert not other.step_state.plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(8, 6), (2, 6, 5), (3, 6, 4, 4), (2, 6, 1, 1), (2, 6, 2, 3, 2)], ids=str)
def test_further_calls_of_a_shape_ask_nothing(monkeypatch, shape, layout, dtype):
    x, dy = (laid_out(numbers(*shape, seed=i, dtype=dtype), layout) for i in (0, 1))
    layer, fresh = twins(x, activation="relu")
    expected = step(fresh, x, dy)
    with monkeypatch.context() as patch:
        refuse_questions(patch)
        same(step(layer, x, dy), expected)
        layer(x.requires_grad_())
    assert {shape: len(plans) for shape, plans in layer.step_state.plans.items()} == {x.shape: 1}


class OfAnotherTorch:
    def __init__(self, *tensors):
        pass


class FitsAll:
    def __init__(self, *tensors, dynamic_dims_sizes, dynamic_dims_strides):
        self.check = lambda *_: True


@pytest.mark.parametrize("theirs", [None, OfAnotherTorch, FitsAll])
def test_a_torch_with_other_guards_has_no_plans(monkeypatch, theirs):
    assert plan.can_plan()
    if theirs is None:
        monkeypatch.delattr(guards, "TensorGuards")
    else:
        monkeypatch.setattr(guards, "TensorGuards", theirs)
    found = torch_internals._find(torch_internals.PATHS["tensor_guards"], lambda kind: kind, torch_internals._compares)
    monkeypatch.setattr(torch_internals, "tensor_guards", lambda: found)
    assert not plan.can_plan()
    x = numbers(8, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    other = copy.deepcopy(layer)
    for _ in range(2):
        same(step(layer, x, torch.ones_like(x)), step(other, x, torch.ones_like(x)))
    assert not layer.step_state.plans


# What differs from the plan.


def set_option(name, value):
    return lambda layer: setattr(layer, name, value)


def other_weight(make):
    def change(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach()))

    return change


def other_data(make):
    def change(layer):
        layer.weight.data = make(layer.weight.data)

    return change


def other_buffer(name, make):
    def change(layer):
        layer._buffers[name] = make(layer._buffers[name])

    return change


def no_weight(layer):
    layer._parameters["weight"] = None


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())


def fixed(layer):
    layer.bias.requires_grad_(False)


CHANGES = {
    "eps": set_option("eps", 0.5),
    "momentum": set_option("momentum", 0.7),
    "cumulative": set_option("momentum", None),
    "activation": set_option("activation", "relu"),
    "composed activation": set_option("activation", "silu"),
    "variance": set_option("unbiased", False),
    "nonfinite": set_option("nonfinite", "propagate"),
    "virtual batches": set_option("virtual_batch_size", 2),
    "renormalization": set_option("renorm", bn.Renorm(1.1, 0.1)),
    "evaluation": lambda layer: layer.eval(),
    "frozen statistics": lambda layer: layer.freeze(),
    "frozen parameters": lambda layer: layer.freeze(statistics=False, affine=True),
    "another weight": other_weight(lambda w: w + 1),
    "another dtype": other_data(lambda w: w.double()),
    "apart in memory": other_data(lambda w: w.repeat_interleave(2)[::2]),
    "the same number": other_data(lambda w: w[:1].expand(CHANNELS)),
    "no weight": no_weight,
    "parametrized": parametrized,
    "a fixed bias": fixed,
    "another mean": other_buffer("running_mean", lambda m: m + 3),
    "a wide variance": other_buffer("running_var", lambda v: v.double()),
    "a count of int32": other_buffer("num_batches_tracked", lambda n: n.int()),
    "no count": other_buffer("skipped_batches", lambda n: None),
    "no statistics": lambda layer: layer._buffers.update(running_mean=None, running_var=None),
    "cast": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_goes_by_no_old_plan(change):
    x, dy = numbers(5, CHANNELS, 3), numbers(5, CHANNELS, 3, seed=1)
    layer, fresh = twins(x)
    for each in (layer, fresh):
        CHANGES[change](each)
    for seed in range(2):
        same(step(layer, x + seed, dy), step(fresh, x + seed, dy))


def test_what_is_set_as_it_was_keeps_the_plans():
    layer, _ = twins(numbers(5, CHANNELS, 3))
    kept = layer.step_state.plans
    layer.train()  # as many do before each step
    layer.eps = layer.eps
    assert layer.step_state.plans is kept
    layer.eval()
    assert not layer.step_state.plans


INPUTS = {
    "size": lambda x: x[:3],
    "dtype": lambda x: x.bfloat16(),
    "layout": lambda x: laid_out(x, "channels last"),
    "apart in memory": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[..., :1].expand_as(x),
    "zeros that are nowhere": lambda x: torch._efficientzerotensor(x.shape),
    "negative view": lambda x: torch._neg_view(x),
    "a view further on": lambda x: torch.cat((x[:1], x))[1:],
}


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("residual", [True, False])
def test_an_input_or_residual_unlike_the_planned_one_is_taken_as_it_is(what, residual):
    x = numbers(4, CHANNELS, 3, 2)
    layer, fresh = twins(x, numbers(4, CHANNELS, 3, 2, seed=2) if residual else None)
    if residual and what != "size":
        given = (x, torch.ones_like(x), INPUTS[what](numbers(4, CHANNELS, 3, 2, seed=2)))
    else:
        given = (INPUTS[what](x), torch.ones_like(INPUTS[what](x)))
    same(step(layer, *given), step(fresh, *given))


def test_an_input_that_is_its_own_residual_is_added():
    x = numbers(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS).eval()
    for _ in range(3):
        torch.testing.assert_close(layer(x, x), 2 * x, rtol=1e-4, atol=1e-5)
    assert not layer.step_state.plans


def test_a_mask_counts_after_calls_without_one():
    x = numbers(4, CHANNELS, 3)
    layer, fresh = twins(x)
    x.requires_grad_()
    y = layer(x, None, torch.tensor([True, True, False, True]).reshape(4, 1))
    assert not y[2].any()
    torch.testing.assert_close(y[[0, 1, 3]], fresh(x[[0, 1, 3]]))


def test_a_shape_may_have_several_plans(monkeypatch):
    x, residual = numbers(4, CHANNELS, 3, 2), numbers(4, CHANNELS, 3, 2, seed=1)
    layer, _ = twins(x)
    given = [(x, None), (x, residual), (laid_out(x, "channels last"), None), (x.bfloat16(), None)]
    expected = [step(copy.deepcopy(layer).eval(), each, torch.ones_like(each), other) for each, other in given]
    layer.eval()
    for each, other in given * 2:
        step(layer, each, torch.ones_like(each), other)
    refuse_questions(monkeypatch)
    for (each, other), right in zip(given, expected, strict=True):
        same(step(layer, each, torch.ones_like(each), other), right)


def test_contexts_that_hold_or_gather_statistics_are_heeded():
    x = numbers(4, CHANNELS)
    layer, fresh = twins(x)
    before = layer.running_mean.clone()
    with bn.no_stat_updates(layer):
        layer(x)
        layer(x)
    assert torch.equal(layer.running_mean, before)
    with bn.accumulate(layer):
        layer(x)
        layer(x)
        assert torch.equal(layer.running_mean, before)
    assert not torch.equal(layer.running_mean, before)
    bn.add_domains(fresh, ["other"])
    fresh(x)
    with bn.use_domain(fresh, "other"):
        fresh(x)
    assert int(fresh.num_batches_tracked_other) == int(layer.num_batches_tracked) == 3


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
    x = numbers(4, CHANNELS)
    layer, _ = twins(x)
    with kind() as mode:
        step(layer, x, torch.ones_like(x))
    assert {"batchnorm.forward.default", "batchnorm.backward.default"} <= set(mode.names)


@pytest.mark.parametrize("kind", [Seen, SeenByNoGuard])
def test_a_dispatch_mode_sees_the_backward_of_a_forward_outside_of_it(kind):
    x = numbers(4, CHANNELS).requires_grad_()
    layer, _ = twins(x)
    y = layer(x)
    with kind() as mode:
        y.sum().backward()
    assert "batchnorm.backward.default" in mode.names


@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("planned", [True, False])
def test_a_tracer_records_the_layer(planned, pre_dispatch):
    x = numbers(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS).eval()
    if planned:
        layer(x)
        assert layer.step_state.plans
    graph = make_fx(lambda values: layer(values), pre_dispatch=pre_dispatch)(x)
    torch.testing.assert_close(graph(x + 1), layer(x + 1))


def test_a_tracer_records_the_backward_of_a_planned_layer():
    x, dy = numbers(4, CHANNELS).requires_grad_(), numbers(4, CHANNELS, seed=1)
    layer, fresh = twins(x)
    y = layer(x)
    graph = make_fx(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True))(dy)
    torch.testing.assert_close(graph(2 * dy), torch.autograd.grad(fresh(x), x, 2 * dy))


def test_a_layer_is_traced_with_sizes_left_open():
    layer = bn.BatchNorm1d(CHANNELS).eval()
    trace = make_fx(lambda values: layer(values), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph, x = trace(numbers(4, CHANNELS)), numbers(7, CHANNELS)
    torch.testing.assert_close(graph(x), layer(x))


def test_among_fake_tensors_a_planned_layer_moves_nothing():
    x = numbers(4, CHANNELS)
    layer, _ = twins(x)
    layer(x)
    before = [buffer.clone() for buffer in layer.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(x)
    same(before, layer.buffers())


def test_a_selective_checkpoint_keeps_the_output_of_a_planned_layer():
    x = numbers(4, CHANNELS)
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
    same(*([gradient] for gradient in gradients))
    same(layer.buffers(), fresh.buffers())


# Torch's own rules for dual numbers are written so.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_and_forward_mode_go_by_no_plan():
    x, tangent = numbers(4, CHANNELS), numbers(4, CHANNELS, seed=1)
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


def test_a_subclass_of_tensor_goes_by_no_plan():
    x = numbers(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    layer(x)
    assert type(layer(x.as_subclass(Logged))) is Logged


def test_inference_mode_leaves_no_plan_for_training():
    x = numbers(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    with torch.inference_mode():
        layer(x)
    fresh = copy.deepcopy(layer)
    same(step(layer, x, torch.ones_like(x)), step(fresh, x, torch.ones_like(x)))


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
            layer(numbers(4, CHANNELS))
    assert not layer.running_mean.any()


class Computed(bn.BatchNorm1d):
    share = 0.5

    @property
    def momentum(self):
        return self.share

    @momentum.setter
    def momentum(self, value):
        pass


def test_a_momentum_that_a_subclass_computes_is_asked_for_at_each_forward(monkeypatch):
    layer, x = Computed(CHANNELS), numbers(64, CHANNELS) + 10
    for _ in range(2):
        layer(x)
    monkeypatch.setattr(Computed, "share", 1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def test_a_check_of_a_subclass_is_asked_at_each_forward():
    asked = []

    class Checked(bn.BatchNorm1d):
        def _check_input_dim(self, values):
            asked.append(values.shape)

    layer = Checked(CHANNELS)
    for _ in range(3):
        layer(numbers(4, CHANNELS))
    assert len(asked) == 3


# Backward.


@pytest.mark.parametrize("training", [True, False])
def test_a_second_derivative_is_taken_of_a_planned_call(training):
    x = numbers(5, CHANNELS, 2, dtype=torch.float64)
    layer = bn.BatchNorm1d(CHANNELS, dtype=torch.float64, track_running_stats=not training)
    for _ in range(2):
        step(layer, x, torch.ones_like(x))
    assert torch.autograd.gradgradcheck(layer.train(training), (x.requires_grad_(),))


def test_batched_gradients_of_a_planned_call_equal_a_loop():
    x, directions = numbers(5, CHANNELS), numbers(3, 5, CHANNELS, seed=1)
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
def test_a_gradient_of_another_layout_is_read_right(what, first):
    x, dy = numbers(4, CHANNELS, 3, 2), numbers(4, CHANNELS, 3, 2, seed=1)
    layer = bn.BatchNorm2d(CHANNELS)
    other = GRADIENTS[what](dy)
    for given in (other, other, dy) if first else (dy, dy, other):
        fresh = copy.deepcopy(layer)
        same(step(layer, x, given), step(fresh, x, given.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_what_hooks_make_of_saved_tensors_is_read_right(layout):
    x, dy = numbers(4, CHANNELS, 3, 2), laid_out(numbers(4, CHANNELS, 3, 2, seed=1), layout)
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
    x, dy = numbers(*shape), numbers(*shape, seed=1)
    layer, fresh = twins(x)
    expected = step(fresh, x, dy)
    if not planned:
        by_questions(monkeypatch)
        layer = copy.deepcopy(layer)

    def unpack(values):
        return values.transpose(0, -1).contiguous().transpose(0, -1) if values.dim() > 1 else values

    with torch.autograd.graph.saved_tensors_hooks(lambda values: values.detach().clone(), unpack):
        found = step(layer, x, dy)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_tensor_changed_before_the_backward_is_noticed():
    x = numbers(4, CHANNELS)
    layer, _ = twins(x)
    y = layer(x.clone().requires_grad_())
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_nobody_wants_are_left_out():
    x = numbers(4, CHANNELS)
    layer, _ = twins(x)
    y = layer(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x), retain_graph=True)
    (dweight,) = torch.autograd.grad(y, layer.weight, torch.ones_like(x))
    assert dx.shape == x.shape
    assert dweight.shape == (CHANNELS,)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_moves_the_statistics_once(use_reentrant):
    x = numbers(4, CHANNELS)
    layer, fresh = twins(x)
    for each in (layer, fresh):
        checkpoint(each, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    same(layer.buffers(), fresh.buffers())
    assert layer.num_batches_tracked == 3


# What becomes of plans.


def test_plans_are_in_no_copy_and_no_pickle():
    layer, _ = twins(numbers(4, CHANNELS))
    written = io.BytesIO()
    torch.save(layer, written)
    written.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), torch.load(written, weights_only=False)):
        assert other.step_state.plans == {}
        other(numbers(4, CHANNELS))


def test_a_layer_keeps_so_many_plans_and_no_more():
    layer = bn.BatchNorm1d(CHANNELS)
    for samples in range(2, 100):
        layer(numbers(samples, CHANNELS))
    assert len(layer.step_state.plans) == 64


def test_a_plan_keeps_no_tensor_alive():
    layer = bn.BatchNorm1d(CHANNELS)
    died = []
    for values in (numbers(4, CHANNELS), numbers(4, CHANNELS).requires_grad_()):
        layer(values)
        weakref.finalize(values, died.append, True)
    del values
    assert died == [True, True]


def test_threads_that_share_a_layer_share_its_plans():
    layer, fresh = twins(numbers(64, CHANNELS))
    layer.eval()
    fresh.eval()
    batches = [numbers(64, CHANNELS, seed=i) for i in range(4)]
    expected = [step(fresh, x, x) for x in batches]
    wrong = []

    def work(x, right):
        for _ in range(50):
            if not all(torch.equal(a, b) for a, b in zip(step(layer, x, x), right, strict=True)):
                wrong.append(x)

    workers = [threading.Thread(target=work, args=given) for given in zip(batches, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
