import math

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, InputError, InputTypeError, UnsupportedError
from batchnorm.diagnostics.explain import explain
from batchnorm.text import WIDTH

Z = torch.tensor([[2.9], [-0.9], [2.2], [-0.7]], dtype=torch.float64)

# Sums of at most a few hundred float64 numbers near 1, each rounded to 1.1e-16.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def trained(layer, *, seed=0):
    """The layer with numbers that are all different from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.fill_(3)
    return layer


def batch_of(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def test_the_training_path_agrees_with_arithmetic_by_hand():
    layer = trained(BatchNorm1d(1, dtype=torch.float64, eps=0.5, activation="tanh"))
    z = Z.flatten().tolist()
    mean = sum(z) / 4
    var = sum((v - mean) ** 2 for v in z) / 4
    z_hat = [(v - mean) / math.sqrt(var + 0.5) for v in z]
    y = [layer.weight.item() * v + layer.bias.item() for v in z_hat]

    explanation = explain(layer, Z)

    training = explanation.training
    assert training.mean.item() == pytest.approx(mean, rel=1e-12)
    assert training.var.item() == pytest.approx(var, rel=1e-12)
    assert training.sd.item() == pytest.approx(math.sqrt(var), rel=1e-12)
    assert training.z_hat.flatten().tolist() == pytest.approx(z_hat, rel=1e-12)
    assert training.y.flatten().tolist() == pytest.approx(y, rel=1e-12)
    assert training.output.flatten().tolist() == pytest.approx([math.tanh(v) for v in y], rel=1e-12)
    assert explanation.unbiased_var.item() == pytest.approx(var * 4 / 3, rel=1e-12)
    assert (explanation.count, explanation.eps, explanation.activation) == (4, 0.5, "tanh")
    assert explanation.bound == math.sqrt(3)


def test_the_inference_path_agrees_with_arithmetic_by_hand():
    layer = trained(BatchNorm1d(1, dtype=torch.float64, activation="relu"))
    mean, var = layer.running_mean.item(), layer.running_var.item()
    z_hat = [(v - mean) / math.sqrt(var + 1e-5) for v in Z.flatten().tolist()]
    y = [layer.weight.item() * v + layer.bias.item() for v in z_hat]

    inference = explain(layer, Z).inference

    assert (inference.mean.item(), inference.var.item(), inference.sd.item()) == (mean, var, math.sqrt(var))
    assert inference.z_hat.flatten().tolist() == pytest.approx(z_hat, rel=1e-12)
    assert inference.y.flatten().tolist() == pytest.approx(y, rel=1e-12)
    assert inference.output.flatten().tolist() == pytest.approx([max(v, 0.0) for v in y], rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.BatchNorm1d, (5, 3)),
        (nn.BatchNorm1d, (5, 3, 7)),
        (nn.BatchNorm2d, (5, 3, 2, 7)),
        (BatchNorm, (2, 3, 2, 3, 2)),
    ],
)
def test_outputs_and_new_statistics_are_what_the_layer_gives_in_any_shape(kind, shape, training):
    layer, x = trained(kind(3, dtype=torch.float64)).train(training), batch_of(*shape)

    explanation = explain(layer, x)

    assert explanation.count == x.numel() // 3
    torch.testing.assert_close(explanation.inference.output, layer.eval()(x), **EXACT)
    torch.testing.assert_close(explanation.training.output, layer.train()(x), **EXACT)
    torch.testing.assert_close(explanation.new_running_mean, layer.running_mean, **EXACT)
    torch.testing.assert_close(explanation.new_running_var, layer.running_var, **EXACT)
    torch.testing.assert_close(explanation.training.y, explanation.training.output, **EXACT)
    torch.testing.assert_close(explanation.inference.y, explanation.inference.output, **EXACT)


@pytest.mark.parametrize("kind", [BatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_the_batch_and_the_random_state_are_left_as_they_are(kind, training):
    layer, x = trained(kind(3)).train(training), batch_of(4, 3, 2, 2).float().requires_grad_()
    layer.weight.grad = torch.ones(3)
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    batch, random = x.detach().clone(), torch.get_rng_state()

    explanation = explain(layer, x)
    explanation.gamma.zero_()
    explanation.inference.mean.fill_(7)
    explanation.z.zero_()

    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert layer.training is training
    assert torch.equal(layer.weight.grad, torch.ones(3))
    assert layer.bias.grad is None
    assert x.grad is None
    assert torch.equal(x, batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert called == []
    assert not explanation.training.output.requires_grad


def test_momentum_none_gives_the_cumulative_mean():
    layer = trained(BatchNorm1d(1, momentum=None, dtype=torch.float64))  # three batches seen
    mean, var = layer.running_mean.item(), layer.running_var.item()

    explanation = explain(layer, Z)

    assert explanation.momentum == 1 / 4
    assert explanation.new_running_mean.item() == pytest.approx((3 * mean + 0.875) / 4, rel=1e-12)
    assert explanation.new_running_var.item() == pytest.approx((3 * var + 11.4875 / 3) / 4, rel=1e-12)


def test_momentum_is_the_weight_of_the_new_value():
    explanation = explain(nn.BatchNorm1d(1, momentum=0.2, dtype=torch.float64), Z)

    assert explanation.momentum == 0.2
    assert explanation.new_running_mean.item() == pytest.approx(0.2 * 0.875, rel=1e-12)
    assert explanation.new_running_var.item() == pytest.approx(0.8 + 0.2 * 11.4875 / 3, rel=1e-12)


@pytest.mark.parametrize("kind", [BatchNorm1d, nn.BatchNorm1d])
def test_a_layer_without_gamma_and_beta_has_none(kind):
    explanation = explain(kind(1, affine=False), Z.float())

    assert explanation.gamma is None
    assert explanation.beta is None
    assert torch.equal(explanation.training.y, explanation.training.z_hat)
    assert "gamma = 1, not learned   beta = 0, not learned" in str(explanation)


@pytest.mark.parametrize("kind", [BatchNorm1d, nn.BatchNorm1d])
def test_a_layer_without_running_statistics_has_no_inference_path(kind):
    explanation = explain(kind(1, track_running_stats=False).eval(), Z.float())

    assert explanation.inference is None
    assert explanation.momentum is None
    assert explanation.new_running_mean is None
    assert explanation.new_running_var is None
    assert "inference uses the batch's own too" in str(explanation)


def test_running_statistics_that_are_kept_but_not_tracked_stay_as_they_are():
    layer = trained(BatchNorm1d(1))
    layer.track_running_stats = False

    explanation = explain(layer, Z.float())

    assert explanation.momentum is None
    assert torch.equal(explanation.new_running_mean, layer.running_mean)
    assert "not updated" in str(explanation)


def test_one_outlier_reaches_the_bound_and_does_not_pass_it():
    explanation = explain(BatchNorm1d(1, eps=1e-30, dtype=torch.float64), torch.tensor([[0.0]] * 9 + [[1e6]]).double())

    assert explanation.bound == 3.0
    assert explanation.training.z_hat.abs().max().item() == pytest.approx(3.0, rel=1e-12)


def test_a_half_precision_batch_has_its_statistics_in_float32():
    explanation = explain(BatchNorm1d(1), Z.bfloat16())

    assert explanation.training.mean.dtype == torch.float32
    assert explanation.training.output.dtype == torch.bfloat16


def test_the_table_shows_every_figure_of_a_small_batch():
    table = str(explain(BatchNorm1d(1, activation="sigmoid", dtype=torch.float64), Z))

    assert [line.split() for line in table.splitlines()[-12:]] == [
        ["channel", "0", "gamma", "=", "1", "beta", "=", "0"],
        ["mean", "var", "sd", "unbiased", "var"],
        ["batch", "0.8750", "2.8719", "1.6947", "3.8292"],
        ["running", "0.0000", "1.0000", "1.0000"],
        ["new", "running", "0.0875", "1.2829", "1.1327"],
        [],
        ["batch", "running"],
        ["row", "z", "z_hat", "y", "g(y)", "z_hat", "y", "g(y)"],
        ["0", "2.9", "1.1949", "1.1949", "0.76762", "2.9", "2.9", "0.94785"],
        ["1", "-0.9", "-1.0474", "-1.0474", "0.25972", "-0.9", "-0.9", "0.28905"],
        ["2", "2.2", "0.7819", "0.7819", "0.68608", "2.2", "2.2", "0.90025"],
        ["3", "-0.7", "-0.9294", "-0.9294", "0.28305", "-0.7", "-0.7", "0.33181"],
    ]


def test_the_table_shows_the_first_channels_and_values_and_counts_the_rest():
    table = str(explain(BatchNorm2d(5), batch_of(3, 5, 2, 2).float()))

    assert "channel 2 " in table
    assert "channel 3 " not in table
    assert table.endswith("... and 2 more channels")
    assert table.count("  ... and 4 more values") == 3
    assert "\n  1,1,1 " in table
    assert "\n  2,0,0 " not in table


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e5, 1e6, 1e30])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_no_line_of_the_table_is_wider_than_80_columns(scale, activation):
    layer = trained(BatchNorm(4, eps=1e-300, dtype=torch.float64, activation=activation))
    table = str(explain(layer, -scale * batch_of(3, 4, 2, 2, 2)))

    assert max(map(len, table.splitlines())) <= WIDTH == 80


def test_the_repr_is_one_short_line():
    assert repr(explain(nn.BatchNorm1d(2), batch_of(4, 2).float())) == (
        "Explanation(BatchNorm1d, channels=2, values per channel=4)"
    )


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (nn.Linear(1, 1), Z, InputTypeError, "layer must be a batch normalization layer, ours or torch's; got Linear"),
        (nn.InstanceNorm1d(1), Z, InputTypeError, "got InstanceNorm1d"),
        (nn.SyncBatchNorm(1), Z, UnsupportedError, "one process's batch; got SyncBatchNorm"),
        (nn.LazyBatchNorm1d(), Z, InputError, "layer must have seen a first batch.*got LazyBatchNorm1d"),
        (BatchNorm1d(1), [[1.0], [2.0]], InputTypeError, "x must be a tensor of a floating dtype; got list"),
        (
            BatchNorm1d(1),
            torch.tensor([[1], [2]]),
            InputError,
            "floating dtype; got torch.int64",
        ),
        (BatchNorm2d(1), Z, InputError, "x must have the dimensions that the layer takes; .*2D"),
        (nn.BatchNorm2d(1), Z, InputError, "x must have the dimensions that the layer takes; .*2D"),
        (BatchNorm1d(2), Z, InputError, r"the layer's 2 channels in dimension 1; got shape \(4, 1\)"),
        (nn.BatchNorm1d(2), Z, InputError, r"the layer's 2 channels in dimension 1; got shape \(4, 1\)"),
        (BatchNorm1d(1), Z[:1], InputError, r"x must have at least 2 values per channel; got shape \(1, 1\)"),
        (nn.BatchNorm1d(1).eval(), Z[:0], InputError, r"x must have at least 2 values per channel; got shape \(0, 1\)"),
    ],
)
def test_an_error_names_why_a_layer_cannot_be_explained(layer, x, error, message):
    with pytest.raises(error, match=message):
        explain(layer, x)
