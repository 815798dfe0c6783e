"""The operators in torch: its own checks, compilation, autocast, transforms and tracing."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
import batchnorm.ops  # registers the operators
from support import compiles, randn, with_layout

FORWARD, BACKWARD = torch.ops.batchnorm.forward.default, torch.ops.batchnorm.backward.default
MOMENTS = torch.ops.batchnorm.moments.default
pytestmark = pytest.mark.usefixtures("native_kernels")


# torch.library.opcheck: schema, fake tensors, dispatch, AOT.


@pytest.mark.parametrize(
    ("options", "training", "layout", "dtype"),
    [
        ("none", True, "contiguous", torch.float32),
        ("none", False, "channels last", torch.bfloat16),
        ("affine", True, "channels last", torch.float32),
        ("residual", True, "expanded", torch.float32),
        ("residual", False, "channels last", torch.bfloat16),
        ("mask", True, "contiguous", torch.float64),
        ("mixed dtypes", True, "channels last", torch.float32),
    ],
)
def test_forward_passes_torchs_own_check_of_operators(options, training, layout, dtype):
    x = with_layout(randn(3, 5, 4, 2, dtype=dtype), layout)
    mean, var = (None, None) if training else (torch.zeros(5), torch.ones(5))
    weight, bias = (None, None) if options == "none" else (torch.ones(5), torch.zeros(5))
    residual = with_layout(randn(3, 5, 4, 2, seed=1, dtype=dtype), layout) if options == "residual" else None
    if options == "mixed dtypes":
        residual, weight = randn(3, 5, 4, 2, seed=1, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    mask = randn(3, 4, 2, seed=2) > 0 if options == "mask" else None
    torch.library.opcheck(FORWARD, (x, mean, var, weight, bias, residual, mask, 1e-5, "relu"))


@pytest.mark.parametrize(
    ("with_y", "wanted", "training", "layout", "dtype"),
    [
        (True, [True] * 4, True, "contiguous", torch.float32),
        (False, [True, False, True, False], True, "channels last", torch.bfloat16),
        (False, [True] * 4, False, "expanded", torch.float32),
        (True, [False] * 4, True, "channels last", torch.float32),
    ],
)
def test_backward_passes_torchs_own_check_of_operators(with_y, wanted, training, layout, dtype):
    x = with_layout(randn(3, 5, 4, 2, dtype=dtype), layout)
    dy = randn(3, 5, 4, 2, seed=1, dtype=dtype)
    y = randn(3, 5, 4, 2, seed=2, dtype=dtype) if with_y else None
    moments = torch.stack((torch.zeros(5), torch.ones(5))).double()
    weight, bias = torch.ones(5), torch.zeros(5, dtype=torch.float64)
    arguments = (dy, x, moments, weight, bias, y, None, 1e-5, "relu", training, wanted)
    torch.library.opcheck(BACKWARD, arguments)


def test_operators_of_virtual_batches_pass_torchs_own_check():
    x, dy, mask = randn(5, 3, 4), randn(5, 3, 4, seed=1), randn(5, 4, seed=2) < 1
    moments, correction = MOMENTS(x, mask, 2, 3), randn(2, 2, 3, seed=3, dtype=torch.float64)
    torch.library.opcheck(MOMENTS, (x, mask, 2, 3))
    torch.library.opcheck(FORWARD, (x, None, None, None, None, None, mask, 1e-5, "relu", correction, 2, 3))
    wanted = [True, False, False, False]
    arguments = (dy, x, moments, None, None, None, mask, 1e-5, "relu", True, wanted, correction, 2, 3)
    torch.library.opcheck(BACKWARD, arguments)


def test_operators_of_virtual_batches_agree_with_the_reference():
    x, dy, mask = (randn(5, 3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    mask, correction = mask[:, 0] < 1, randn(2, 2, 3, seed=3, dtype=torch.float64).abs()
    weight, bias = (randn(3, seed=seed, dtype=torch.float64) for seed in (4, 5))
    found = []
    for other in (torch.float64, torch.float32):  # the native kernels take no residual of another dtype
        residual = randn(5, 3, 4, seed=6).to(other)
        chunks = (correction, 2, 3)
        y, moments = FORWARD(x, None, None, weight, bias, residual, mask, 1e-5, "relu", *chunks)
        sign = y.to(other)
        found.append([y, *BACKWARD(dy, x, moments, weight, bias, sign, mask, 1e-5, "relu", True, [True] * 4, *chunks)])
    # float64 sums of 20 numbers of order 1
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunks", "chunk"), [(3, 3), (2, 0), (2, 5), (0, 2)])
def test_chunks_that_do_not_use_up_the_samples_are_refused(chunks, chunk):
    with pytest.raises(bn.InputError, match="must divide the samples of x"):
        MOMENTS(randn(5, 3), None, chunks, chunk)


def test_moments_of_another_shape_are_refused():
    x = randn(5, 3)
    with pytest.raises(bn.InputError, match=r"moments must be of shape \(2, 3\); got \(2, 2\)"):
        BACKWARD(x, x, torch.ones(2, 2), None, None, None, None, 1e-5, None, True, [True] * 4)


# torch.compile.


class Block(torch.nn.Module):
    """A layer among other operations."""

    def __init__(self, activation=None):
        super().__init__()
        self.layer = bn.BatchNorm2d(5, activation=activation)

    def forward(self, x, residual=None):
        return self.layer(x * 2, residual).sin()


def step(block, x, residual=None):
    """Return the output, gradients and buffers of a training step."""
    leaves = [values.clone().requires_grad_() for values in (x, residual) if values is not None]
    y = block(*leaves)
    gradients = torch.autograd.grad(y.square().sum(), [*leaves, *block.parameters()])
    return [y.detach(), *gradients, *(buffer.clone() for buffer in block.buffers())]


@compiles
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [(None, False), ("relu", False), ("relu", True), ("gelu", True)]
)
def test_a_compiled_layer_is_one_node_forward_and_one_backward_and_equals_eager(activation, with_residual, layout):
    graphs = {"forward": [], "backward": []}

    def keep(kind):
        def compiler(graph, _):
            graphs[kind].append([node.target for node in graph.graph.nodes if node.op == "call_function"])
            return make_boxed_func(graph.forward)

        return compiler

    def backend(module, inputs):
        return aot_module_simplified(module, inputs, fw_compiler=keep("forward"), bw_compiler=keep("backward"))

    torch._dynamo.reset()
    x = with_layout(randn(4, 5, 6, 7), layout)
    residual = with_layout(randn(4, 5, 6, 7, seed=1), layout) if with_residual else None
    eager, compiled = Block(activation), Block(activation)
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    expected = step(eager, x, residual)
    leaves = [values.clone().requires_grad_() for values in (x, residual) if values is not None]
    y = run(*leaves)
    gradients = torch.autograd.grad(y.square().sum(), [*leaves, *compiled.parameters()])
    for mine, theirs in zip([y, *gradients, *compiled.buffers()], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # float32 steps in another order
    for kind, node in (("forward", FORWARD), ("backward", BACKWARD)):
        assert len(graphs[kind]) == 1
        ours = [target for target in graphs[kind][0] if getattr(target, "namespace", "") == "batchnorm"]
        assert ours == [node]


@compiles
def test_a_layer_between_others_breaks_no_graph_and_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block = Block("relu")
    run = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for samples in (3, 4, 7):
        run(randn(samples, 5, 6, 7))
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
    assert block.layer.num_batches_tracked == 3


@compiles
def test_eval_compiles_in_one_graph_and_equals_eager():
    torch._dynamo.reset()
    block = Block("relu").eval()
    x = randn(4, 5, 6, 7)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


# autocast.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_dtypes_as_it_does_for_torchs_own_layer(dtype):
    ours, theirs = bn.BatchNorm1d(5), torch.nn.BatchNorm1d(5)
    x = randn(6, 5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(x), theirs(x)
    assert mine.dtype == other.dtype == dtype
    assert ours.weight.dtype == torch.float32
    mine.float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_a_layer_after_a_cast_one_gives_what_autocast_chose():
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), bn.BatchNorm1d(5, activation="relu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = network(randn(6, 3))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


# torch.func.


def normalize(x, weight, bias):
    return bn.batch_norm(x, None, None, weight, bias, True, activation="leaky_relu")


def test_grad_of_torch_func_equals_backward():
    x, weight, bias = randn(6, 5, 3), randn(5, seed=1), randn(5, seed=2)
    found = grad(lambda *leaves: normalize(*leaves).square().sum(), argnums=(0, 1, 2))(x, weight, bias)
    leaves = [values.clone().requires_grad_() for values in (x, weight, bias)]
    for mine, theirs in zip(found, torch.autograd.grad(normalize(*leaves).square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)  # sums of 18 values in another order


@compiles
def test_jvp_equals_the_difference_quotient():
    x, weight, bias, v = (
        randn(6, 5, 3, seed=s).double() if s in (0, 3) else randn(5, seed=s).double() for s in range(4)
    )
    y, tangent = jvp(lambda x: normalize(x, weight, bias), (x,), (v,))
    h = 1e-6  # error of a central difference: h^2 of the third derivative, and 1e-16 / h
    quotient = (normalize(x + h * v, weight, bias) - normalize(x - h * v, weight, bias)) / (2 * h)
    torch.testing.assert_close(y, normalize(x, weight, bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, quotient, rtol=1e-6, atol=1e-7)


def test_vmap_equals_a_loop():
    x, weight, bias = randn(4, 6, 5, 3), randn(4, 5, seed=1), randn(4, 5, seed=2)
    looped = torch.stack([normalize(*each) for each in zip(x, weight, bias, strict=True)])
    torch.testing.assert_close(vmap(normalize)(x, weight, bias), looped, rtol=1e-5, atol=1e-5)
    per_sample = vmap(grad(lambda *leaves: normalize(*leaves).square().sum()), in_dims=(0, None, None))
    looped = torch.stack(
        [grad(lambda *leaves: normalize(*leaves).square().sum())(each, weight[0], bias[0]) for each in x]
    )
    torch.testing.assert_close(per_sample(x, weight[0], bias[0]), looped, rtol=1e-4, atol=1e-5)


def test_functional_call_updates_the_buffers_passed_in():
    layer = bn.BatchNorm1d(5)
    state = {name: values.clone() for name, values in layer.state_dict().items()}
    functional_call(layer, state, (randn(6, 5),))
    assert state["num_batches_tracked"] == 1
    assert state["running_mean"].any()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("with_residual", [True, False])
def test_batched_gradients_equal_a_loop(with_residual):
    x, residual = randn(6, 5, 3).requires_grad_(), randn(6, 5, 3, seed=4).requires_grad_()
    leaves = [x, residual] if with_residual else [x]
    y = bn.batch_norm(x, None, None, None, None, True, activation="relu", residual=residual if with_residual else None)
    directions = randn(4, 6, 5, 3, seed=3)
    batched = torch.autograd.grad(y, leaves, directions, is_grads_batched=True, retain_graph=True)
    looped = [torch.autograd.grad(y, leaves, each, retain_graph=True) for each in directions]
    for mine, theirs in zip(batched, map(torch.stack, zip(*looped, strict=True)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_second_derivative_runs_through_an_input_that_the_kernels_read_a_copy_of(training):
    apart = randn(5, 3, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()
    weight, bias = (randn(4, seed=i, dtype=torch.float64).requires_grad_() for i in (1, 2))
    statistics = torch.zeros(4), torch.ones(4)

    def run(x, weight, bias):
        return bn.batch_norm(x, *([None, None] if training else statistics), weight, bias, training)

    assert torch.autograd.gradgradcheck(run, (apart, weight, bias))


# Fake tensors, meta tensors, dispatch modes.


def test_a_default_device_changes_nothing_for_tensors_on_the_cpu():
    x, layer = randn(6, 5), bn.BatchNorm1d(5)
    with torch.device("meta"):
        layer(x, None, torch.ones(6, dtype=torch.bool, device="cpu"))
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_meta_and_fake_tensors_get_the_shapes_dtypes_and_strides_of_real_ones(layout, dtype):
    def run(x, weight, bias):
        y = bn.batch_norm(x, None, None, weight, bias, True, activation="relu")
        return [y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))]

    def leaves(device="cpu"):
        x = with_layout(randn(3, 5, 4, 2, dtype=dtype), layout).to(device)
        return [values.requires_grad_() for values in (x, torch.ones(5, device=device), torch.zeros(5, device=device))]

    real = run(*leaves())
    with FakeTensorMode() as mode:
        fake = run(*[mode.from_tensor(values).requires_grad_() for values in leaves()])
    for others in (fake, run(*leaves("meta"))):
        for mine, theirs in zip(others, real, strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_a_dispatch_mode_sees_the_operators():
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = randn(6, 5).requires_grad_()
    expected = bn.batch_norm(x, None, None, training=True)
    (wanted,) = torch.autograd.grad(expected, x, torch.ones_like(x))
    with Log():
        y = bn.batch_norm(x, None, None, training=True)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert FORWARD in seen
    assert BACKWARD in seen
    assert torch.equal(y, expected)
    assert torch.equal(dx, wanted)
