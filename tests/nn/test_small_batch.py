"""Training batches with too few values for statistics: errors, running statistics instead, and warnings."""

import copy
import re
import warnings

import pytest
import torch
import torch._dynamo
from torch import nn

import batchnorm as bn
from support import copied_state

# Torch itself uses deprecated functions.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Network(nn.Module):
    """A network whose batch norm layers have a path of several names."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Sequential(nn.Linear(4, 3), norm, nn.ReLU())})
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.body["first"](x))


def batches(rows=101, size=10):
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(2 * torch.randn(rows, 4) + 1, batch_size=size)


def epoch(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in loader:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def used(layer_class=bn.BatchNorm1d, shape=(8, 3), **options):
    """Return a layer whose running statistics are far from 0 and 1."""
    torch.manual_seed(0)
    layer = layer_class(shape[1], **options)
    for _ in range(5):
        layer(3 * torch.randn(shape) + 2)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    return layer


def unmoved(before, layer):
    return all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())


# A single value per channel.


def test_a_last_batch_of_one_row_raises_with_the_path_the_shape_and_the_ways_out():
    with pytest.raises(bn.InputError, match=r"^body\.first\.1: .*more than 1 value per channel") as caught:
        epoch(Network(bn.BatchNorm1d(3)), batches())
    for part in ("(1, 3)", "drop_last=True", "small_batch='running'"):
        assert part in str(caught.value)


@compiles
def test_a_compiled_model_raises_the_same():
    torch._dynamo.reset()
    model = torch.compile(Network(bn.BatchNorm1d(3)), backend="eager")
    with torch.no_grad():
        model(torch.randn(10, 4))
        with pytest.raises(bn.InputError, match=r"body\.first\.1: .*more than 1 value per channel.* shape \(1, 3\)"):
            model(torch.randn(1, 4))


@compiles
def test_a_model_compiled_in_one_graph_gives_torchs_error_with_the_words_in_it():
    torch._dynamo.reset()
    model = torch.compile(Network(bn.BatchNorm1d(3)), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"more than 1 value per channel.* shape \(1, 3\)"):
        model(torch.randn(1, 4))


def test_a_layer_by_itself_has_no_path_to_name():
    with pytest.raises(bn.InputError, match=r"^batch statistics need more than 1 value"):
        bn.BatchNorm1d(3)(torch.randn(1, 3))


def test_the_path_is_the_one_in_the_outermost_model():
    model = nn.Sequential(Network(bn.BatchNorm1d(3)))
    with pytest.raises(bn.InputError, match=r"^0\.body\.first\.1: "):
        model(torch.randn(1, 4))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (bn.BatchNorm1d(3), (1, 3)),
        (bn.BatchNorm1d(3), (1, 3, 1)),
        (bn.BatchNorm2d(3), (1, 3, 1, 1)),
        (bn.BatchNorm3d(3), (1, 3, 1, 1, 1)),
        (bn.BatchNorm1d(3, channel_dim=-1), (1, 1, 3)),
        (bn.BatchNorm1d(3, channel_dim=0), (3, 1)),
        (bn.BatchNorm1d(3, virtual_batch_size=4), (1, 3)),
    ],
    ids=str,
)
def test_one_value_a_channel_raises_in_every_shape(layer, shape):
    before = copied_state(layer)
    with pytest.raises(ValueError, match=re.escape(f"more than 1 value per channel; got input of shape {shape}")):
        layer(torch.randn(shape))
    assert unmoved(before, layer)


def test_one_value_in_eval_raises_without_offering_statistics_that_do_not_exist():
    layer = bn.BatchNorm1d(3, track_running_stats=False).eval()
    with pytest.raises(bn.InputError, match="drop_last=True") as caught:
        layer(torch.randn(1, 3))
    assert "small_batch" not in str(caught.value)


def test_with_running_an_epoch_of_101_rows_in_tens_ends_and_counts_10_batches():
    model = Network(bn.BatchNorm1d(3, small_batch="running"))
    epoch(model, batches())
    assert int(model.body["first"][1].num_batches_tracked) == 10


def test_with_running_the_statistics_are_those_of_the_epoch_without_its_last_row():
    torch.manual_seed(1)
    model = Network(bn.BatchNorm1d(3, small_batch="running"))
    twin = copy.deepcopy(model)
    whole = torch.cat(list(batches()))
    with torch.no_grad():
        for x in whole.split(10):
            model(x)
        for x in whole[:100].split(10):
            twin(x)
    assert unmoved(copied_state(twin), model)


OPTIONS = {
    "plain": {},
    "momentum=None": {"momentum": None},
    "virtual batches": {"virtual_batch_size": 2},
    "renorm": {"renorm": bn.Renorm(3.0, 5.0)},
    "activation": {"activation": "relu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_running_the_small_batch_moves_no_bit(options):
    layer = used(small_batch="running", **options)
    before, skipped = copied_state(layer), int(layer.skipped_batches)
    layer(torch.randn(1, 3))
    assert unmoved(before, layer)
    assert int(layer.skipped_batches) == skipped


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_with_running_output_and_gradients_of_the_small_batch_are_those_of_eval(options, shape):
    layer = used(small_batch="running", **options)
    x = torch.randn(shape, requires_grad=True)
    wanted = (x, layer.weight, layer.bias)
    y = layer.train()(x)
    gradients = torch.autograd.grad(y.square().sum(), wanted)
    expected = layer.eval()(x)
    assert torch.equal(y, expected)
    for gradient, of_eval in zip(gradients, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert torch.equal(gradient, of_eval)


def test_with_running_the_small_batch_is_the_formula_with_the_running_statistics():
    layer, x = used(small_batch="running"), torch.randn(1, 3, dtype=torch.float64)
    mean, var, weight, bias = (
        values.detach().double() for values in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    expected = weight * (x - mean) / torch.sqrt(var + layer.eps) + bias
    # A difference, a product and a sum in float32 of numbers below 8: a few roundings of 6e-8 times 8.
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=0, atol=2e-6)


def test_with_running_larger_batches_still_use_their_own_statistics():
    layer, x = used(small_batch="running"), torch.randn(8, 3)
    y = layer(x)
    # The mean of 8 numbers below 3 by float32 arithmetic: a rounding of 6e-8 times 3 each.
    torch.testing.assert_close(y.mean(0), layer.bias, rtol=0, atol=1e-6)
    assert int(layer.num_batches_tracked) == 6


@pytest.mark.parametrize("small_batch", ["raise", "running"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 4)], ids=str)
def test_eval_takes_one_sample(shape, small_batch):
    layer = used(small_batch=small_batch).eval()
    before = copied_state(layer)
    x = torch.randn(shape)
    y = layer(x).double()
    for i in range(3):
        mean, var, weight, bias = (
            values[i].item() for values in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        expected = weight * (x[0, i].double() - mean) / (var + layer.eps) ** 0.5 + bias
        # As above: a few roundings of 6e-8 times 8.
        torch.testing.assert_close(y[0, i], expected, rtol=0, atol=2e-6)
    assert unmoved(before, layer)


def test_a_frozen_layer_in_training_takes_one_sample():
    layer = bn.freeze(used())
    x = torch.randn(1, 3)
    assert torch.equal(layer(x), layer.eval()(x))


def test_a_layer_frozen_in_gamma_and_beta_alone_still_refuses_one_value():
    layer = bn.freeze(used(), statistics=False, affine=True)
    with pytest.raises(bn.InputError, match="more than 1 value per channel"):
        layer(torch.randn(1, 3))


def test_two_rows_and_no_rows_are_not_small():
    layer = bn.BatchNorm1d(3)
    assert layer(torch.randn(2, 3)).shape == (2, 3)
    assert layer(torch.empty(0, 3)).shape == (0, 3)


# One sample of many positions.


@pytest.mark.filterwarnings("ignore:.*a training batch of one sample")
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (bn.BatchNorm1d, nn.BatchNorm1d, (1, 3, 7)),
        (bn.BatchNorm2d, nn.BatchNorm2d, (1, 3, 4, 5)),
        (bn.BatchNorm3d, nn.BatchNorm3d, (1, 3, 2, 4, 5)),
    ],
)
@pytest.mark.parametrize("small_batch", ["raise", "running"])
def test_one_sample_with_positions_counts_them_as_torch_does(ours, theirs, shape, small_batch):
    layer, stock = ours(3, small_batch=small_batch), theirs(3)
    x = torch.randn(shape)
    # Both work in float32 on values below 4: a few roundings of 6e-8 times 4.
    torch.testing.assert_close(layer(x), stock(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.running_var, stock.running_var, rtol=0, atol=1e-6)
    assert int(layer.num_batches_tracked) == 1


def said_by(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: bn.BatchNorm1d(3), (1, 3, 7)),
        (lambda: bn.BatchNorm2d(3, small_batch="running"), (1, 3, 4, 5)),
        (lambda: bn.BatchNorm1d(3, channel_dim=-1), (1, 7, 3)),
        (lambda: bn.BatchNorm1d(3, channel_dim=0), (3, 1, 7)),
    ],
    ids=["(N, C, L)", "(N, C, H, W)", "(N, L, C)", "(C, N, L)"],
)
def test_a_batch_of_one_sample_warns_once_of_its_shape_and_the_way_out(layer, shape):
    layer = layer()
    (message,) = said_by(lambda: [layer(torch.randn(shape)) for _ in range(3)])
    assert re.search(r"batch of one sample.*drop_last=True", message)
    assert str(shape) in message


def test_the_warning_is_of_the_line_that_called_the_model():
    model = nn.Sequential(nn.Identity(), bn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="one sample") as said:
        model(torch.randn(1, 3, 4))
    assert said[0].filename == __file__


def test_each_layer_warns_once_and_names_its_path():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), bn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm1d(3)))
    messages = said_by(lambda: [model(torch.randn(1, 2, 7)) for _ in range(3)])
    assert [message.split(":")[0] for message in messages] == ["1", "2.0"]


def test_eval_frozen_layers_and_ordinary_batches_do_not_warn():
    layer, one = bn.BatchNorm1d(3), torch.randn(1, 3, 7)
    assert said_by(lambda: layer(torch.randn(2, 3, 7))) == []
    assert said_by(lambda: layer.eval()(one)) == []
    assert said_by(lambda: bn.freeze(layer).train()(one)) == []
    assert len(said_by(lambda: bn.unfreeze(layer)(one))) == 1


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"channel_dim": 0}, (3, 4)), ({"channel_dim": -1}, (2, 1, 3)), ({"virtual_batch_size": 2}, (3, 3, 7))],
    ids=str,
)
def test_several_samples_do_not_warn_wherever_the_channels_stand(options, shape):
    layer = bn.BatchNorm1d(3, **options)
    assert said_by(lambda: layer(torch.randn(shape))) == []
