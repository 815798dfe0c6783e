"""Cases of other libraries' tests of folding, in our words; each test names the file that it comes from.

- torchao: test/quantization/pt2e/test_quantize_pt2e.py and test_quantize_pt2e_qat.py
- torch inductor: test/inductor/test_efficient_conv_bn_eval.py and test_inductor_freezing.py
- AIMET: TrainingExtensions/torch/test/python/test_bn_fold.py, with the models of its models/test_models.py
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from support import randn

# float64: a few sums of some hundred products, each rounded by 1e-16
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@torch.no_grad()
def trained(model):
    """Return the model in float64 and eval mode, with random statistics, gamma of both signs and beta."""
    for seed, module in enumerate(model.double().modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for i, name in enumerate(("weight", "bias", "running_mean")):
                getattr(module, name).copy_(randn(module.num_features, seed=10 * seed + i, dtype=torch.float64))
            module.running_var.copy_(randn(module.num_features, seed=10 * seed + 5, dtype=torch.float64).abs() + 0.1)
    return model.eval()


def folded(model, *shapes):
    """Fold a model, compare the outputs, and return the paths of the layers that were folded and of those left."""
    example = tuple(randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate(shapes))
    state = copy.deepcopy(model.state_dict())
    made, report = bn.fold(model, example)
    torch.testing.assert_close(made(*example), model(*example), **CLOSE)
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    return {row.path for row in report.layers}, {row.path: row.reason for row in report.left}, made


# torchao


class InChunks(nn.Module):
    """The same convolution and batch norm for each chunk of the channels."""

    def __init__(self, chunks, bias):
        super().__init__()
        self.chunks = chunks
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.cat([self.bn(self.conv(chunk)) for chunk in torch.chunk(x, self.chunks, dim=1)], dim=1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_that_runs_on_each_chunk_computes_the_same(bias):
    """From test_quantize_pt2e.py, test_chunked_bn_fusion."""
    model = trained(InChunks(3, bias))
    with torch.no_grad():
        model.bn.running_var.mul_(1e-2)  # where a fold that is done once per chunk is far off
    _, left, _ = folded(model, (1, 3, 6, 6))
    assert not left or "3 times" in left["bn"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(8, 16), (8, 32), (5, 5)], ids=str)
def test_a_linear_layer_takes_its_batch_norm_on_rows(bias, sizes):
    """From test_quantize_pt2e.py, test_linear_bn_fusion and test_linear_bn_fusion_correct_for_2d_input."""
    model = trained(nn.Sequential(nn.Linear(*sizes, bias=bias), nn.BatchNorm1d(sizes[1])))
    done, left, made = folded(model, (4, sizes[0]))
    assert done == {"1"}
    assert not left
    assert not any("BatchNorm" in type(module).__name__ for module in made.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_on_three_dimensions_keeps_its_batch_norm(bias):
    """From test_quantize_pt2e.py, test_linear_bn_fusion_skipped_for_3d_input: channels are in dimension 1 there."""
    done, left, _ = folded(trained(nn.Sequential(nn.Linear(3, 5, bias=bias), nn.BatchNorm1d(5))), (2, 5, 3))
    assert done == set()
    assert "1" in left


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["conv", "transposed"])
def test_a_convolution_its_batch_norm_and_relu(kinds, dims, bias):
    """From test_quantize_pt2e.py: test_conv_transpose_bn_relu, test_conv3d_bn_relu, test_conv_transpose3d_bn_relu."""
    model = trained(nn.Sequential(kinds[dims](2, 4, 3, bias=bias), NORMS[dims](4), nn.ReLU()))
    done, left, _ = folded(model, (2, 2, *[5] * dims))
    assert (done, left) == ({"1"}, {})


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolution_whose_padding_is_a_word(dims, padding):
    """From test_quantize_pt2e.py, test_conv_padding_bn_relu."""
    model = trained(nn.Sequential(CONVOLUTIONS[dims](2, 4, 3, padding=padding), NORMS[dims](4), nn.ReLU()))
    assert folded(model, (2, 2, *[5] * dims))[:2] == ({"1"}, {})


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_and_strides_fold_too(transposed):
    """From test_quantize_pt2e_qat.py, test_qat_conv_bn_fusion_literal_args and test_qat_conv_transpose_bn."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = trained(nn.Sequential(kind(4, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8)))
    assert folded(model, (2, 4, 5, 5))[:2] == ({"1"}, {})


# torch inductor: tuning with frozen statistics, and freezing


class Pair(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.conv, self.bn = layer, norm

    def forward(self, x):
        return self.bn(self.conv(x))


class SeveralUsers(nn.Module):
    """Three pairs: one alone, one whose convolution runs twice, one whose batch norm runs twice."""

    def __init__(self, layer, norm):
        super().__init__()
        self.conv1, self.bn1 = layer(3, 4), norm(4)
        self.conv2, self.bn2 = layer(4, 4), norm(4)
        self.conv3, self.bn3 = layer(4, 4), norm(4)

    def forward(self, x):
        x = self.bn1(self.conv1(input=x))
        x = self.bn2(input=self.conv2(self.conv2(x)))
        x = self.bn3(input=self.conv3(input=x))
        return self.bn3(x) + x


LAYERS = {f"conv{dims}d": (CONVOLUTIONS[dims], NORMS[dims], dims) for dims in (1, 2, 3)}
LAYERS |= {f"transposed{dims}d": (TRANSPOSED[dims], NORMS[dims], dims) for dims in (1, 2, 3)}


def step(model, x, shift):
    """Return the outputs before and after a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = model(x)
    first.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [first, model(x + shift)]


def assert_tuned(model, x):
    """Compare a step of the tuned model with one of the model with frozen statistics, and return the report."""
    tuned, report = bn.tune(model)
    frozen = copy.deepcopy(model).eval()
    torch.testing.assert_close(step(tuned.train(), x, 0.1), step(frozen, x, 0.1), **CLOSE)
    return report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", *LAYERS])
def test_a_tuned_pair_trains_as_with_frozen_statistics(kind, bias):
    """From test_efficient_conv_bn_eval.py, ConvOp."""
    if kind == "linear":
        model, x = Pair(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4)), randn(4, 3, dtype=torch.float64)
    else:
        layer, norm, dims = LAYERS[kind]
        model = Pair(layer(3, 4, 3, stride=2, bias=bias), norm(4))
        x = randn(4, 3, *[5] * dims, dtype=torch.float64)
    report = assert_tuned(trained(model), x)
    assert [row.path for row in report.layers] == ["bn"]
    assert not report.left


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", *LAYERS])
def test_only_pairs_that_run_once_are_tuned(kind, bias):
    """From test_efficient_conv_bn_eval.py, MultiUserConvOp; there one of the two calls of bn3 is optimized as well."""
    if kind == "linear":
        model = SeveralUsers(lambda i, o: nn.Linear(i, o, bias=bias), nn.BatchNorm1d)
        x = randn(4, 3, dtype=torch.float64)
    else:
        layer, norm, dims = LAYERS[kind]
        model = SeveralUsers(lambda i, o: layer(i, o, 2, bias=bias), norm)
        x = randn(2, 3, *[6] * dims, dtype=torch.float64)
    report = assert_tuned(trained(model), x)
    assert [row.path for row in report.layers] == ["bn1"]
    assert {row.path for row in report.left} == {"bn2", "bn3"}


class Twice(nn.Module):
    """The same pair of modules, called twice in a row."""

    def __init__(self):
        super().__init__()
        self.pair = Pair(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.pair(F.relu(self.pair(x)))


def test_a_shared_pair_computes_the_same():
    """From test_inductor_freezing.py, test_folded_conv_bn_with_module_sharing."""
    done, left, _ = folded(trained(Twice()), (2, 4, 5, 5))
    assert done | left.keys() == {"pair.bn"}


class TwoNorms(nn.Module):
    """Two batch norms on two calls of one convolution, and on one call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn1(y) + self.bn2(self.conv(x) if self.calls == 2 else y)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_convolution_of_two_batch_norms_keeps_them(calls):
    """From test_inductor_freezing.py, test_folded_conv_bn_with_multi_bn_share_conv."""
    done, left, _ = folded(trained(TwoNorms(calls)), (2, 3, 5, 5))
    assert done == set()
    assert left.keys() == {"bn1", "bn2"}


class Functional(nn.Module):
    """Batch norm as a function on buffers of its own, beside a layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("var", torch.full((4,), 2.0))

    def forward(self, x):
        return F.batch_norm(self.last(self.bn(self.conv(x))), self.mean, self.var)


def test_functional_batch_norm_is_left_where_it_is():
    """From test_inductor_freezing.py, test_folded_conv_functional_bn_with_module_sharing."""
    assert folded(trained(Functional()), (2, 3, 5, 5))[:2] == ({"bn"}, {})


# AIMET


class Mixed(nn.Module):
    """A pair, a batch norm behind an activation, one that feeds a convolution, and two behind one convolution."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 5, 3), nn.ReLU()
        self.bn2, self.conv3 = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        self.conv4, self.bn3, self.bn4 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(16, 3)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.conv3(self.bn2(self.relu2(self.conv2(x))))
        x = self.conv4(x)
        x = self.bn3(x) + self.bn4(x)
        return self.fc1(x.view(x.size(0), -1))


def test_a_network_with_four_cases():
    """From test_bn_fold.py, test_find_batch_norms_to_fold and test_bn_fold_auto_mode."""
    done, left, _ = folded(trained(Mixed()), (2, 3, 10, 10))
    assert done == {"bn1", "bn2"}
    assert left.keys() == {"bn3", "bn4"}


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 2, stride=2, padding=2, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, stride=2, padding=2), nn.BatchNorm2d(4)
        self.conv3, self.ada = nn.Conv2d(4, 6, 3, stride=2, padding=2), nn.AdaptiveAvgPool2d(10)
        self.relu1, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, padding=1)
        self.fc = nn.Linear(216, 3)

    def forward(self, *inputs):
        x1 = self.bn1(self.conv1(inputs[0]))
        x2 = self.ada(self.conv3(self.bn2(self.conv2(inputs[1]))))
        x = self.maxpool(self.relu1(x1 + x2))
        return self.fc(x.view(x.size(0), -1))


def test_a_network_of_two_inputs_given_as_arguments():
    """From test_bn_fold.py, test_find_batch_norms_to_fold_multi_input; its forward takes ``*inputs``."""
    done, left, _ = folded(trained(TwoInputs()), (1, 3, 16, 16), (1, 3, 10, 10))
    assert (done, left) == ({"bn1", "bn2"}, {})


def behind_relu(conv2, channels=5):
    """A convolution, ReLU, batch norm and the layer given."""
    dims = 1 if isinstance(conv2, nn.Conv1d) else 2
    return trained(nn.Sequential(CONVOLUTIONS[dims](3, channels, 2), nn.ReLU(), NORMS[dims](channels), conv2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_goes_into_the_next_convolution(bias):
    """From test_bn_fold.py, test_fold_bn_before_conv_no_bias and test_fold_bn_before_conv_with_bias."""
    done, left, made = folded(behind_relu(nn.Conv2d(5, 4, 2, bias=bias)), (2, 3, 6, 6))
    assert (done, left) == ({"2"}, {})
    weight, shift = made[3].weight, made[3].bias
    assert (shift.requires_grad, shift.device, shift.dtype) == (weight.requires_grad, weight.device, weight.dtype)


def test_a_batch_norm_before_padding_stays():
    """From test_bn_fold.py, test_fold_bn_before_conv_with_padding: the padding of zeros comes after it."""
    done, left, _ = folded(behind_relu(nn.Conv2d(5, 4, 3, padding=1, bias=False)), (2, 3, 6, 6))
    assert done == set()
    assert "pad" in left["2"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 2, groups=6),
        nn.Conv2d(6, 4, 2, groups=2),
        nn.Conv1d(6, 6, 2, groups=6),
        nn.Conv1d(6, 4, 2, groups=2),
        nn.ConvTranspose2d(6, 4, 3),
    ],
    ids=str,
)
def test_what_aimet_leaves_is_exact_or_left_here(layer):
    """From test_bn_fold.py, test_filter_conv_bn_pair and test_fold_bn_before_conv_transpose."""
    done, left, _ = folded(behind_relu(layer, channels=6), (2, 3, *[6] * (layer.weight.dim() - 2)))
    assert done | left.keys() == {"2"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 2),
        nn.Conv2d(4, 6, 2, padding=1),
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Conv2d(4, 4, 2, groups=4),
        nn.Conv1d(4, 6, 2),
        nn.Conv1d(4, 6, 2, padding=1),
        nn.Conv1d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(4, 6, 2),
        nn.ConvTranspose2d(4, 6, 2, padding=1),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.ConvTranspose2d(4, 4, 2, groups=4),
    ],
    ids=str,
)
def test_every_layer_before_takes_its_batch_norm(layer):
    """From test_bn_fold.py, test_filter_conv_bn_pair and the depthwise tests; AIMET leaves grouped transposed ones."""
    dims = layer.weight.dim() - 2
    model = trained(nn.Sequential(layer, NORMS[dims](layer.out_channels), nn.ReLU()))
    assert folded(model, (2, 4, *[6] * dims))[:2] == ({"1"}, {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", ["linear", "conv1d"])
@pytest.mark.parametrize("first", ["norm", "layer"])
def test_linear_and_one_dimensional_layers_on_both_sides(first, layer, bias):
    """From test_bn_fold.py: the tests of Linear and Conv1d, before and after."""
    made = nn.Linear(4, 6, bias=bias) if layer == "linear" else nn.Conv1d(4, 6, 2, bias=bias)
    model = [nn.BatchNorm1d(4), made] if first == "norm" else [made, nn.BatchNorm1d(6)]
    done, left, _ = folded(trained(nn.Sequential(*model)), (3, 4) if layer == "linear" else (3, 4, 7))
    assert (done, left) == ({"0" if first == "norm" else "1"}, {})


def test_a_batch_norm_behind_an_activation_and_at_the_end_stays():
    """From test_bn_fold.py, test_bn_conversion."""
    done, left, _ = folded(trained(nn.Sequential(nn.Conv1d(3, 4, 2), nn.ReLU(), nn.BatchNorm1d(4))), (2, 3, 8))
    assert done == set()
    assert left.keys() == {"2"}


def test_two_transposed_convolutions():
    """From test_bn_fold.py, test_bn_fold_auto_mode_transposed_conv2d."""
    first, second = nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))
    assert folded(trained(model), (2, 4, 4, 4))[:2] == ({"1", "4"}, {})


@pytest.mark.parametrize("forward", [False, True])
def test_three_dimensions_both_ways(forward):
    """From test_bn_fold.py, test_bn_fold_conv3d_fold_backward and test_bn_fold_conv3d_fold_forward."""
    pair = [nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)]
    model = [nn.BatchNorm3d(3), nn.Conv3d(3, 4, 2), nn.ReLU(), nn.BatchNorm3d(4)] if forward else [*pair, nn.ReLU()]
    done, left, _ = folded(trained(nn.Sequential(*model)), (1, 3, 4, 4, 4))
    assert (done, left.keys()) == (({"0"}, {"3"}) if forward else ({"1"}, set()))
