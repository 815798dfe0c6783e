"""`tune`: batch norm with frozen statistics that the layer before it computes, against torch's layers in eval mode."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import ROOT, benchmark_results, benchmark_script, changed_names, copied_state, randn

# Outputs and gradients are sums of at most some hundred float64 products, so that they differ by roundings of 1e-16
# times their number and size.
SAME = {"rtol": 1e-12, "atol": 1e-12}
SAME_GRADIENT = {"rtol": 1e-10, "atol": 1e-10}


def with_values(model, seed=0):
    """Return a float64 model whose parameters and statistics are those of no new layer."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for values in model.parameters():
            drawn = torch.randn(values.shape, generator=draw, dtype=values.dtype)
            values.copy_(drawn if values.dim() == 1 else 0.3 * drawn)
        for name, values in model.named_buffers():
            if name.endswith("running_mean"):
                values.copy_(torch.randn(values.shape, generator=draw, dtype=values.dtype))
            elif name.endswith("running_var"):
                values.copy_(torch.rand(values.shape, generator=draw, dtype=values.dtype) + 0.5)
    return model


def results(model, x):
    """Return the output of a model and the gradients of its input and parameters, by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    dy = randn(*y.shape, seed=9, dtype=y.dtype)
    wanted = {"input": x, **{name: each for name, each in model.named_parameters() if each.requires_grad}}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
    return y.detach(), dict(zip(wanted, gradients, strict=True))


def assert_same_results(model, stock, x):
    """Compare a model in training mode with one of torch's layers in eval mode."""
    (y, gradients), (expected, its) = results(model.train(), x), results(stock.eval(), x)
    torch.testing.assert_close(y, expected, **SAME)
    assert gradients.keys() == its.keys()
    torch.testing.assert_close(gradients, its, **SAME_GRADIENT)


def tuned(stock, example=None):
    """Tune a model, whose batch norms must all be folded."""
    model, report = bn.tune(stock, example)
    assert report.left == ()
    return model


def block(**options):
    """Return a convolution, batch norm and ReLU, of 4 to 6 channels."""
    return with_values(nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU()))


# Outputs and gradients.

PAIRS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), nn.BatchNorm1d, (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d, (3, 4, 5, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), nn.BatchNorm3d, (2, 4, 3, 4, 5)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), nn.BatchNorm2d, (1, 4, 1, 1)),
    "one channel": (lambda: nn.Conv2d(1, 1, 3), nn.BatchNorm2d, (2, 1, 5, 5)),
    "no sample": (lambda: nn.Conv2d(4, 6, 3), nn.BatchNorm2d, (0, 4, 5, 5)),
    "no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d, (3, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d, (3, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d, (3, 4, 5, 5)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding="same"), nn.BatchNorm2d, (3, 4, 5, 5)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (3, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (3, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d, (3, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d, (3, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (1, 4)),
    "synchronized": (lambda: nn.Conv2d(4, 6, 3), nn.SyncBatchNorm, (3, 4, 5, 5)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("pair", PAIRS)
def test_outputs_and_gradients_are_those_of_torch_in_eval_mode(pair, affine):
    layer, norm, shape = PAIRS[pair]
    layer = layer()
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    stock = with_values(nn.Sequential(layer, norm(channels, affine=affine), nn.SiLU()))
    assert_same_results(tuned(stock), stock, randn(*shape, dtype=torch.float64))


def test_a_layer_without_bias_of_ours_with_its_activation_is_folded():
    model = with_values(nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6, bias=False, activation="gelu", eps=0.1)))
    assert_same_results(tuned(model), model, randn(5, 4, dtype=torch.float64))


def test_gradients_are_right_where_gamma_is_zero():
    stock = block()
    with torch.no_grad():
        stock[1].weight[:3] = 0
    model, x = tuned(stock), randn(3, 4, 5, 5, dtype=torch.float64)
    assert_same_results(model, stock, x)
    assert results(model, x)[1]["1.weight"][:3].abs().min() > 0
    assert results(model, x)[1]["0.weight"][:3].abs().max() == 0


def test_second_derivatives_are_right():
    stock = with_values(nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh()))
    model, x = tuned(stock), randn(2, 1, 3, dtype=torch.float64).requires_grad_()
    parameters = tuple(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "1.weight", "1.bias"])
def test_a_parameter_that_needs_no_gradient_gets_none_and_the_others_theirs(frozen):
    stock = block()
    stock.get_parameter(frozen).requires_grad = False
    model = tuned(stock)
    assert not model.get_parameter(frozen).requires_grad
    assert_same_results(model, stock, randn(3, 4, 5, 5, dtype=torch.float64))


def test_frozen_gamma_and_beta_stay_frozen():
    model = tuned(block())
    bn.freeze(model, affine=True)
    model.requires_grad_(True)
    model(randn(3, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert model[1].weight.grad is None
    assert model[0].weight.grad is not None


def test_training_and_eval_mode_compute_the_same_and_move_no_statistics():
    model, x = tuned(block()), randn(3, 4, 5, 5, dtype=torch.float64)
    before = copied_state(model)
    in_training = model.train()(x)
    assert torch.equal(model.eval()(x), in_training)
    assert changed_names(before, model) == []
    assert before["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 4)], ids=["rows", "(N, C, L)"])
def test_the_channels_of_a_linear_layer_are_those_of_the_input_at_hand(shape):
    """torch.fx's fuse takes the last dimension of (N, C, L) for the channels, and is silently wrong."""
    stock = with_values(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    assert_same_results(tuned(stock), stock, randn(*shape, dtype=torch.float64))


def test_a_linear_layer_before_channels_in_the_last_dimension_is_folded():
    model = with_values(nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6, channel_dim=-1)))
    assert_same_results(tuned(model), model, randn(3, 5, 4, dtype=torch.float64))


class Residual(nn.Module):
    """Adds its input by the batch norm of ours, over the rows of a mask."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), bn.BatchNorm1d(4, activation="sigmoid")

    def forward(self, x):
        """Return (N, 4, 6) for (N, 4, 6)."""
        mask = torch.arange(6) < torch.tensor([[2], [6], [0]])
        return self.norm(self.conv(x), residual=x, mask=mask)


def test_a_residual_and_a_mask_work_as_before():
    model = with_values(Residual())
    assert_same_results(tuned(model), model, randn(3, 4, 6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_that_of_frozen_layers(dtype):
    model, x = block(), randn(3, 4, 5, 5)
    expected = model.eval()(x.double())
    frozen = bn.freeze(nn.Sequential(nn.Conv2d(4, 6, 3), bn.BatchNorm2d(6), nn.ReLU())).to(dtype)
    frozen.load_state_dict(model.state_dict())
    errors = [(each(x.to(dtype)).double() - expected).abs().max() for each in (tuned(frozen), frozen)]
    assert errors[0] < 2 * errors[1]
    assert tuned(frozen)[1].running_mean.dtype == torch.float32


def test_autocast_folds_in_float32_and_convolves_in_bfloat16():
    stock = block().float()
    model, x = tuned(stock), randn(3, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    # Input, weight and output are rounded to 8 bits, and an output sums 36 products of up to 5.
    torch.testing.assert_close(y.float(), stock.eval()(x), rtol=0.02, atol=0.05)


# Training.

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def network():
    """Return a network of two convolutions and a linear layer with a batch norm each, of torch's."""
    return with_values(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Flatten()),
            *(nn.Linear(32, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)),
        )
    )


def train(model, optimizer, steps, first=0):
    """Train a model to give the mean of its input, and return the losses."""
    losses = []
    for seed in range(first, first + steps):
        x = randn(8, 3, 6, 6, seed=seed, dtype=torch.float64)
        loss = (model(x) - x.mean((1, 2, 3)).unsqueeze(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_20_steps_are_those_of_torchs_layers_in_eval_mode(name):
    stock = network().eval()
    model = tuned(stock).train()
    losses = [train(each, OPTIMIZERS[name](each.parameters()), 20) for each in (model, stock)]
    assert losses[1][-1] < losses[1][0] / 2
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    for (path, values), expected in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-8, msg=path)


def test_in_place_the_optimizer_goes_on_with_the_same_parameters():
    model = network()
    stock = copy.deepcopy(model)
    optimizer, other = (OPTIMIZERS["SGD"](each.parameters()) for each in (model, stock))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    losses = [train(model.eval(), optimizer, 3)]
    same, report = bn.tune(model, inplace=True)
    assert same is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    now = dict(model.named_buffers())
    assert all(now[name] is buffer for name, buffer in buffers.items())
    assert "copies" not in str(report)
    losses = [losses[0] + train(model.train(), optimizer, 10, first=3), train(stock.eval(), other, 13)]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)


def saved_bytes(model, x):
    """Return the bytes that a forward keeps for the backward, without parameters and buffers."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def pack(values):
        storage = values.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return values

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


def test_the_backward_keeps_one_tensor_less_for_each_convolution():
    stages = [[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)] for _ in range(4)]
    stock = nn.Sequential(*(layer for stage in stages for layer in stage)).eval()
    x = randn(4, 8, 16, 16)
    model = tuned(stock)
    plane = 4 * x.numel()
    assert saved_bytes(stock, x) == 8 * plane
    assert saved_bytes(model, x) - 4 * plane < 1024  # the statistics, and nothing of the size of the weights


def test_the_table_of_the_page_is_that_of_the_committed_results():
    page = (ROOT / "docs/surgery.md").read_text()
    results = benchmark_results("tune")["results"]
    assert benchmark_script("tune").table(results) in page
    saved = [row["saved_bytes"] for row in results]
    fewer = {row["network"]: 1 - each["tuned"] / each["torch"] for row, each in zip(results, saved, strict=True)}
    assert round(100 * fewer["resnet50"]) == 52
    assert "52% fewer bytes for a ResNet-50, 32% for a MobileNetV2" in page
