"""Plans of forwards: they give the same bits without checks, and serve only calls like the first."""

import copy
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch._C._dynamo import guards
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm import torch_internals
from batchnorm.kernels import plan
from batchnorm.torch_internals import lookup, tensors
from planned import CHANNELS, assert_same, laid_out, refuse_checks, step, twins, without_plans
from support import randn

pytestmark = pytest.mark.usefixtures("native_kernels")


OPTIONS = {
    "plain": {},
    "activation": {"activation": "leaky_relu"},
    "activation of torch": {"activation": "silu"},
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
def test_a_plan_gives_the_same_bits_as_a_checked_call(monkeypatch, options, with_residual, training):
    shape = (5, CHANNELS, 3)
    batches = [randn(*shape, seed=i) + i for i in range(4)]
    batches[2][1, 2, 0] = torch.nan
    dy, residual = randn(*shape, seed=8), randn(*shape, seed=9) if with_residual else None
    layer = bn.BatchNorm1d(CHANNELS, **OPTIONS[options]).train(training)
    other = copy.deepcopy(layer)
    by_plan = [step(layer, x, dy, residual) for x in batches]
    assert layer.step_state.plans
    without_plans(monkeypatch)
    for mine, x in zip(by_plan, batches, strict=True):
        assert_same(mine, step(other, x, dy, residual))
    assert not other.step_state.plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(8, 6), (2, 6, 5), (3, 6, 4, 4), (2, 6, 1, 1), (2, 6, 2, 3, 2)], ids=str)
def test_further_calls_of_a_shape_check_nothing(monkeypatch, shape, layout, dtype):
    x, dy = (laid_out(randn(*shape, seed=i, dtype=dtype), layout) for i in (0, 1))
    layer, fresh = twins(x, activation="relu")
    expected = step(fresh, x, dy)
    with monkeypatch.context() as patch:
        refuse_checks(patch)
        assert_same(step(layer, x, dy), expected)
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
    found = lookup.find(torch_internals.PATHS["tensor_guards"], lookup.itself, tensors._compares)
    monkeypatch.setattr(torch_internals, "tensor_guards", lambda: found)
    assert not plan.can_plan()
    x = randn(8, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS)
    other = copy.deepcopy(layer)
    for _ in range(2):
        assert_same(step(layer, x, torch.ones_like(x)), step(other, x, torch.ones_like(x)))
    assert not layer.step_state.plans


# Calls that differ from the plan.


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
def test_a_changed_layer_uses_no_old_plan(change):
    x, dy = randn(5, CHANNELS, 3), randn(5, CHANNELS, 3, seed=1)
    layer, fresh = twins(x)
    for each in (layer, fresh):
        CHANGES[change](each)
    for seed in range(2):
        assert_same(step(layer, x + seed, dy), step(fresh, x + seed, dy))


def test_setting_an_attribute_to_its_old_value_keeps_the_plans():
    layer, _ = twins(randn(5, CHANNELS, 3))
    kept = layer.step_state.plans
    layer.train()  # as many training loops do before each step
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
def test_an_input_or_residual_unlike_the_planned_one_is_read_correctly(what, residual):
    x = randn(4, CHANNELS, 3, 2)
    layer, fresh = twins(x, randn(4, CHANNELS, 3, 2, seed=2) if residual else None)
    if residual and what != "size":
        given = (x, torch.ones_like(x), INPUTS[what](randn(4, CHANNELS, 3, 2, seed=2)))
    else:
        given = (INPUTS[what](x), torch.ones_like(INPUTS[what](x)))
    assert_same(step(layer, *given), step(fresh, *given))


def test_an_input_that_is_its_own_residual_is_added():
    x = randn(4, CHANNELS)
    layer = bn.BatchNorm1d(CHANNELS).eval()
    for _ in range(3):
        torch.testing.assert_close(layer(x, x), 2 * x, rtol=1e-4, atol=1e-5)
    assert not layer.step_state.plans


def test_a_mask_counts_after_calls_without_one():
    x = randn(4, CHANNELS, 3)
    layer, fresh = twins(x)
    x.requires_grad_()
    y = layer(x, None, torch.tensor([True, True, False, True]).reshape(4, 1))
    assert not y[2].any()
    torch.testing.assert_close(y[[0, 1, 3]], fresh(x[[0, 1, 3]]))


def test_a_shape_may_have_several_plans(monkeypatch):
    x, residual = randn(4, CHANNELS, 3, 2), randn(4, CHANNELS, 3, 2, seed=1)
    layer, _ = twins(x)
    given = [(x, None), (x, residual), (laid_out(x, "channels last"), None), (x.bfloat16(), None)]
    expected = [step(copy.deepcopy(layer).eval(), each, torch.ones_like(each), other) for each, other in given]
    layer.eval()
    for each, other in given * 2:
        step(layer, each, torch.ones_like(each), other)
    refuse_checks(monkeypatch)
    for (each, other), right in zip(given, expected, strict=True):
        assert_same(step(layer, each, torch.ones_like(each), other), right)


def test_planned_layers_obey_no_stat_updates_accumulate_and_domains():
    x = randn(4, CHANNELS)
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


# Lifetime of plans.


def test_plans_are_neither_copied_nor_pickled():
    layer, _ = twins(randn(4, CHANNELS))
    written = io.BytesIO()
    torch.save(layer, written)
    written.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), torch.load(written, weights_only=False)):
        assert other.step_state.plans == {}
        other(randn(4, CHANNELS))


def test_a_layer_keeps_plans_for_64_shapes_at_most():
    layer = bn.BatchNorm1d(CHANNELS)
    for samples in range(2, 100):
        layer(randn(samples, CHANNELS))
    assert len(layer.step_state.plans) == 64


def test_a_plan_keeps_no_tensor_alive():
    layer = bn.BatchNorm1d(CHANNELS)
    died = []
    for values in (randn(4, CHANNELS), randn(4, CHANNELS).requires_grad_()):
        layer(values)
        weakref.finalize(values, died.append, True)
    del values
    assert died == [True, True]


def test_threads_that_share_a_layer_share_its_plans():
    layer, fresh = twins(randn(64, CHANNELS))
    layer.eval()
    fresh.eval()
    batches = [randn(64, CHANNELS, seed=i) for i in range(4)]
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
