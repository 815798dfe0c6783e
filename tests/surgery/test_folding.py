"""The arithmetic of folding, against the layers run one after the other in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from batchnorm.surgery.folding import arithmetic
from batchnorm.surgery.norms.formula import read_norm
from support import randn

# Each makes a float64 layer of awkward sizes, with the shape of its input.
LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear to one feature": (lambda: nn.Linear(5, 1), (3, 5)),
    "linear without bias": (lambda: nn.Linear(1, 7, bias=False), (3, 1)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 8)),
    "conv1d, dilated": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=3, groups=2), (2, 4, 11)),
    "conv1d, causal": (lambda: nn.Conv1d(3, 3, 2, dilation=4, bias=False), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(0, 1), bias=False), (2, 3, 7, 6)),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (1, 6, 5, 4)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 5, groups=4, padding="same"), (2, 4, 6, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "conv2d, replicate": (lambda: nn.Conv2d(4, 2, 2, padding="same", padding_mode="replicate", groups=2), (2, 4, 5, 6)),
    "conv2d, pointwise": (lambda: nn.Conv2d(5, 3, 1, stride=2), (2, 5, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), groups=2, stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 5, 4, stride=2, padding=1), (2, 3, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2), (2, 6, 4, 5)),
    "transposed 2d, pointwise": (lambda: nn.ConvTranspose2d(6, 9, 1, groups=3, bias=False), (2, 6, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 6, 2, stride=2, groups=2, dilation=2, bias=False), (1, 2, 3, 2, 3)),
}
# Where a shift of the input is no shift of the output.
PADDED = {"conv1d", "conv1d, dilated", "conv2d", "conv2d, grouped", "conv2d, depthwise"}
PADDED |= {"transposed 1d", "transposed 2d", "transposed 3d"}

NORMS = {
    "affine": {},
    "without affine": {"affine": False},
    "without bias": {"bias": False},
    "wide eps": {"eps": 0.5},
}


def made(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return make().double(), randn(*shape, seed=1, dtype=torch.float64)


def norm_of(channels, dims, **options):
    """A layer of ours in eval mode with statistics, gamma and beta of its own; one channel has a gamma of 0."""
    norm = bn.BatchNorm(channels, **options).double().eval()
    with torch.no_grad():
        norm.running_mean.copy_(randn(channels, seed=2) * 3)
        norm.running_var.copy_(randn(channels, seed=3).abs() + 0.01)
        for i, values in enumerate(norm.parameters()):
            values.copy_(randn(channels, seed=4 + i))
    if norm.weight is not None:
        norm.weight.data[0] = 0
    return norm


def channels_of(layer, x, side):
    if side == "before":
        return x.shape[1]
    return layer(x).shape[1]


def folded(layer, affine, fold):
    twin = copy.deepcopy(layer)
    arithmetic.set_weights(twin, fold(layer, arithmetic.weights_of(layer), affine), trains=False)
    return twin


# Ten roundings of 1.1e-16 in sums of some 50 values up to about 50.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_batch_norm_behind_it_become_one_layer(name, options):
    layer, x = made(name)
    norm = norm_of(channels_of(layer, x, "after"), x.dim(), **NORMS[options])
    affine = arithmetic.affine_of(read_norm(norm))
    torch.testing.assert_close(folded(layer, affine, arithmetic.then)(x), norm(layer(x)), **CLOSE)


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("name", sorted(LAYERS.keys() - PADDED))
def test_batch_norm_before_a_layer_becomes_part_of_it(name, options):
    layer, x = made(name)
    norm = norm_of(x.shape[1], x.dim(), **NORMS[options])
    affine = arithmetic.affine_of(read_norm(norm))
    assert arithmetic.pads_otherwise(layer, affine.shift) == ""
    torch.testing.assert_close(folded(layer, affine, arithmetic.with_input)(x), layer(norm(x)), **CLOSE)


@pytest.mark.parametrize("name", sorted(PADDED))
def test_a_shift_does_not_go_through_zeros_around_the_input(name):
    layer, x = made(name)
    norm = norm_of(x.shape[1], x.dim())
    affine = arithmetic.affine_of(read_norm(norm))
    assert arithmetic.pads_otherwise(layer, affine.shift)
    assert not torch.allclose(folded(layer, affine, arithmetic.with_input)(x), layer(norm(x)), atol=0.1)


@pytest.mark.parametrize("name", LAYERS)
def test_a_scale_without_shift_goes_through_every_layer(name):
    layer, x = made(name)
    affine = arithmetic.Affine(randn(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64))
    assert arithmetic.pads_otherwise(layer, affine.shift) == ""
    scaled = x * affine.scale.view(1, -1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(folded(layer, affine, arithmetic.with_input)(x), layer(scaled), **CLOSE)


@pytest.mark.parametrize("padding", [0, "valid", "same"])
def test_a_pointwise_convolution_pads_nothing(padding):
    shift = torch.ones(2)
    assert arithmetic.pads_otherwise(nn.Conv2d(2, 3, 1, padding=padding), shift) == ""
    assert arithmetic.pads_otherwise(nn.Conv2d(2, 3, 1, padding=1), shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_rounded_once(dtype):
    layer = nn.Conv2d(3, 5, 3).to(dtype)
    norm = norm_of(5, 4)
    exact = copy.deepcopy(layer).double()
    affine = arithmetic.affine_of(read_norm(norm))
    narrow, wide = folded(layer, affine, arithmetic.then), folded(exact, affine, arithmetic.then)
    assert torch.equal(narrow.weight, wide.weight.to(dtype))
    assert torch.equal(narrow.bias, wide.bias.to(dtype))


def test_statistics_in_float32_beside_bfloat16_parameters_are_used_as_they_are():
    norm = norm_of(5, 4).float()
    expected = arithmetic.affine_of(read_norm(norm))
    norm.weight.data = norm.weight.data.bfloat16().float()
    narrow = copy.deepcopy(norm).bfloat16()
    assert narrow.running_mean.dtype == torch.float32
    scale, shift = arithmetic.affine_of(read_norm(narrow))
    torch.testing.assert_close(scale, norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt())
    assert not torch.equal(scale, expected.scale)
    assert torch.equal(shift, narrow.bias.double() - narrow.running_mean.double() * scale)


# What is written.


def test_the_parameters_stay_the_same_objects_in_their_layout():
    layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    weight, bias, strides = layer.weight, layer.bias, layer.weight.stride()
    weight.requires_grad_(False)
    affine = arithmetic.affine_of(read_norm(norm_of(5, 4)))
    arithmetic.set_weights(layer, arithmetic.then(layer, arithmetic.weights_of(layer), affine), trains=True)
    assert layer.weight is weight
    assert layer.bias is bias
    assert layer.weight.stride() == strides
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


@pytest.mark.parametrize("trains", [True, False])
def test_a_new_bias_has_the_dtype_of_the_weight(trains):
    layer = nn.Linear(3, 5, bias=False).half()
    affine = arithmetic.affine_of(read_norm(norm_of(5, 2)))
    arithmetic.set_weights(layer, arithmetic.then(layer, arithmetic.weights_of(layer), affine), trains=trains)
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.bias.dtype == torch.float16
    assert layer.bias.requires_grad is trains


def test_memory_that_another_tensor_shares_is_not_written():
    layer = nn.Linear(3, 5)
    view = layer.weight.detach()
    before = view.clone()
    affine = arithmetic.affine_of(read_norm(norm_of(5, 2)))
    arithmetic.set_weights(layer, arithmetic.then(layer, arithmetic.weights_of(layer), affine), trains=True)
    assert torch.equal(view, before)


def test_weights_made_in_inference_mode_are_folded():
    with torch.inference_mode():
        layer, x = nn.Linear(3, 5), randn(2, 3)
    norm = norm_of(5, 2).float()
    affine = arithmetic.affine_of(read_norm(norm))
    with torch.no_grad():
        expected = norm(layer(x))
        arithmetic.set_weights(layer, arithmetic.then(layer, arithmetic.weights_of(layer), affine), trains=True)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "holds"), [(torch.float16, False), (torch.bfloat16, True)])
def test_a_dtype_that_cannot_hold_the_values_is_named(dtype, holds):
    layer = nn.Linear(3, 2).to(dtype)
    affine = arithmetic.Affine(torch.full((2,), 1e6).double(), torch.zeros(2).double())
    reason = arithmetic.misfit_of_values(layer, arithmetic.then(layer, arithmetic.weights_of(layer), affine))
    assert reason == ("" if holds else "the folded weight or bias is not finite in torch.float16")


# Layers with a forward of their own.


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, depending on the size of the input; so does timm's Conv2dSame."""

    def forward(self, x):
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        x = F.pad(x, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Standardizes its weight; so does timm's StdConv2d."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Unbiased(nn.Linear):
    """Uses no bias, whether it has one or not."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Activated(nn.Linear):
    """A layer with its activation."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Masked(nn.Conv2d):
    """Uses a part of its weight; so do autoregressive networks."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[..., 2:, :] = 0

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Plain(nn.Conv2d):
    """A convolution under another name."""


class Broken(nn.Linear):
    """Cannot be run by itself."""

    def forward(self, x):
        raise RuntimeError("no server")


@pytest.mark.parametrize(
    ("make", "behind", "before"),
    [
        (lambda: Plain(4, 6, 3), True, True),
        (lambda: SamePadding(4, 6, 3, stride=2, bias=False), True, False),
        (lambda: Standardized(4, 6, 3), False, False),
        (lambda: Unbiased(4, 6), False, False),
        (lambda: Activated(4, 6), False, True),
        (lambda: Masked(4, 6, 3), True, False),
        (lambda: Broken(4, 6), False, False),
    ],
)
def test_a_layer_with_a_forward_of_its_own_is_probed(make, behind, before):
    layer = make()
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    for fold, channels, exact in ((arithmetic.then, 6, behind), (arithmetic.with_input, 4, before)):
        affine = arithmetic.affine_of(read_norm(norm_of(channels, 4)))
        assert (arithmetic.misfit(layer, affine, fold) == "") is exact
    assert torch.equal(torch.get_rng_state(), random)
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(values, state[name]) for name, values in layer.state_dict().items())


def test_the_reason_names_the_class_and_the_error():
    affine = arithmetic.affine_of(read_norm(norm_of(6, 4)))
    assert "the forward of Standardized is its own" in arithmetic.misfit(Standardized(4, 6, 3), affine, arithmetic.then)
    assert "RuntimeError: no server" in arithmetic.misfit(Broken(4, 6), affine, arithmetic.then)


# Layers into which nothing is folded.


def old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def with_another_forward():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.LazyLinear(3), "has seen no batch yet"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "is parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "is parametrized"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 1), "computed before each forward"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 3), "bias", 1), "computed before each forward"),
        (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "computed before each forward"),
        (old_weight_norm, "computed before each forward"),
        (lambda: nn.Linear(3, 3, device="meta"), "is on the meta device"),
        (lambda: nn.Conv1d(3, 3, 1, dtype=torch.complex64), "has values of torch.complex64"),
        (with_another_forward, "the forward of Linear was replaced by an assignment"),
        (lambda: nn.Linear(3, 3), ""),
    ],
)
def test_a_layer_that_cannot_take_it_says_why(make, reason):
    found = arithmetic.why_not(make())
    assert reason in found
    assert bool(reason) is bool(found)
