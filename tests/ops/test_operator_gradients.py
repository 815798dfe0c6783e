"""The gradients of the operators: whoever records an operator gets them."""

import copy

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module, aot_module
from torch._functorch.compilers import nop
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm as bn
import batchnorm.ops  # registers the operators
from support import compiles, randn, with_layout

FORWARD, BACKWARD = torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default
MOMENTS = torch.ops.batchnorm.moments.default
ALL = [True] * 4
# float64 sums of a few dozen numbers of order 1, in another order
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def leaf(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def leaves(*shapes):
    return [leaf(*shape, seed=i) for i, shape in enumerate(shapes)]


CALLS = {
    "training": (None, None, None, None),
    "mask": (None, None, randn(5, 4, seed=9) > -0.5, None),
    "running statistics": (randn(3).double(), randn(3).double().abs() + 0.5, None, None),
    "residual": (None, None, None, "relu"),
}


@pytest.mark.parametrize(("mean", "var", "mask", "activation"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_forward_has_first_and_second_derivatives(check, mean, var, mask, activation):
    x, weight, bias, residual = leaves((5, 3, 4), (3,), (3,), (5, 3, 4))
    residual = residual if activation else None

    def run(x, weight, bias, *residual):
        return FORWARD(x, mean, var, weight, bias, *(residual or (None,)), mask, 1e-5, activation)[0]

    assert check(run, (x, weight, bias) if residual is None else (x, weight, bias, residual))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [ALL, [True, False, True, False]], ids=["all", "two"])
def test_backward_is_itself_differentiable_through_the_moments_of_x(wanted, training):
    dy, x, weight, bias = leaves((5, 3, 4), (5, 3, 4), (3,), (3,))
    moments = MOMENTS(x.detach(), None)

    def run(dy, x, weight, bias):
        # gradcheck moves x, and in training the moments with it
        given = MOMENTS(x, None).detach() if training else moments
        found = BACKWARD(dy, x, given, weight, bias, None, None, 1e-5, "leaky_relu", training, wanted)
        return tuple(values for values, wants in zip(found, wanted, strict=True) if wants)

    assert gradcheck(run, (dy, x, weight, bias))


def test_moments_have_the_derivatives_of_mean_and_variance():
    mask = randn(5, 4, seed=9) > -0.5
    assert gradcheck(lambda x: MOMENTS(x, mask), leaves((5, 3, 4)))
    assert gradcheck(lambda x: MOMENTS(x, None, 2, 3), leaves((5, 3, 4)))


def test_virtual_batches_and_corrections_have_derivatives():
    correction = randn(2, 2, 3, seed=3).double().abs()

    def run(x, weight, bias):
        return FORWARD(x, None, None, weight, bias, None, None, 1e-5, None, correction, 2, 3)[0]

    assert gradcheck(run, leaves((5, 3, 4), (3,), (3,)))


def test_operators_that_need_gradients_pass_torchs_own_check():
    x, weight, bias, residual = leaves((5, 3, 4), (3,), (3,), (5, 3, 4))
    moments = MOMENTS(x.detach(), None)
    torch.library.opcheck(FORWARD, (x, None, None, weight, bias, residual, None, 1e-5, "relu"))
    torch.library.opcheck(FORWARD, (x, bias.detach(), weight.detach().abs(), weight, bias, None, None, 1e-5, "relu"))
    torch.library.opcheck(MOMENTS, (x, None))
    dy = residual.detach()
    # torch's check of the operator's own derivative traces a backward within a backward, which it cannot do
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (dy, x, moments, weight, bias, None, None, 1e-5, None, True, ALL)
    torch.library.opcheck(BACKWARD, arguments, test_utils=tests)


def test_without_a_gradient_to_record_the_operator_saves_nothing():
    x = randn(5, 3)
    assert FORWARD(x, None, None, None, None, None, None, 1e-5, None)[0].grad_fn is None


# Recorders, against torch's layer.


def network(kind, **options):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), kind(4, **options), nn.ReLU(), nn.Conv2d(4, 5, 3), kind(5, **options)
    return nn.Sequential(*layers).double()


def step(model, run):
    """Return output, gradients and buffers of a step; ``run`` calls the model, or a graph of it."""
    x = leaf(4, 3, 5, 5)
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    return [y.detach(), *gradients, *(values for name, values in model.named_buffers() if "running" in name)]


def recorded(model, **options):
    def call(x):
        return model(x)

    return make_fx(call, _allow_non_fake_inputs=True, **options)(randn(4, 3, 5, 5).double())


@pytest.mark.parametrize("pre_dispatch", [False, True], ids=["after autograd", "before autograd"])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_graph_of_make_fx_has_the_gradients_of_torchs_layer(mode, pre_dispatch):
    found = []
    for kind in (bn.BatchNorm2d, nn.BatchNorm2d):
        model = network(kind)
        before = copy.deepcopy(model.state_dict())
        graph = recorded(model, tracing_mode=mode, pre_dispatch=pre_dispatch)
        model.load_state_dict(before)  # recording with real tensors has updated the statistics
        found.append(step(model, graph))
    torch.testing.assert_close(*found, **CLOSE)


def test_aot_autograd_has_the_gradients_of_torchs_layer():
    models = [network(kind) for kind in (bn.BatchNorm2d, nn.BatchNorm2d)]
    torch.testing.assert_close(*[step(model, aot_module(model, nop)) for model in models], **CLOSE)


def test_a_joint_graph_has_our_backward():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network(bn.BatchNorm2d)

        def forward(self, x):
            return (self.model(x).square().sum(),)

    graph, _ = aot_export_module(Loss(), [leaf(4, 3, 5, 5).detach()], trace_joint=True, output_loss_index=0)
    targets = [node.target for node in graph.graph.nodes]
    assert (targets.count(FORWARD), targets.count(BACKWARD)) == (2, 2)


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # compiled autograd reads it itself
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"activation": "relu"}], ids=str)
def test_compiled_autograd_has_the_gradients_of_eager(options):
    from torch._dynamo.compiled_autograd import _enable

    torch._dynamo.reset()
    model = network(bn.BatchNorm2d, **options)
    twin = copy.deepcopy(model)
    expected = step(twin, twin)
    model(leaf(4, 3, 5, 5))  # so that the step goes by a plan
    with _enable(torch.compile(backend="aot_eager")):
        y = model(x := leaf(4, 3, 5, 5))
        y.square().sum().backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in model.parameters())], expected[1:-4], **CLOSE)


@compiles
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_takes_its_input_as_its_residual_in_one_graph(dynamic):
    torch._dynamo.reset()
    eager = bn.BatchNorm1d(3, activation="relu").double()
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    mine, theirs = leaf(8, 3), leaf(8, 3)
    compiled(mine, residual=mine).square().sum().backward()
    eager(theirs, residual=theirs).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_recorded_layer_keeps_the_layout_of_its_input(layout):
    x = with_layout(randn(2, 3, 4, 5), layout)
    assert make_fx(bn.BatchNorm2d(3))(x)(x).stride() == x.stride()


def test_functionalize_updates_the_statistics_that_are_passed_in_and_no_others():
    layer, x = bn.BatchNorm1d(3), randn(8, 3)
    before = {name: values.clone() for name, values in layer.state_dict().items()}

    def call(state, x):
        return functional_call(layer, state, (x,))

    passed = {name: values.clone() for name, values in before.items()}
    functionalize(call)(passed, x)
    batchnorm.ops.running._warn_of_captured.cache_clear()
    with pytest.warns(UserWarning, match="functionalize"):
        functionalize(layer)(x)
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
    layer(x)
    torch.testing.assert_close(passed, dict(layer.state_dict()))
