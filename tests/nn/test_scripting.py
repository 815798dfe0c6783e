"""The layers in TorchScript: compiled where they stand, and folded by its optimizer."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import batchnorm as bn
from support import assert_same_state, copied_state, trained

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.\w+. is deprecated")

ACTIVATIONS = ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"]
# Torch's kernel and ours round differently: some 10 roundings of 6e-8 in values up to about 8.
CLOSE = {"rtol": 1e-6, "atol": 5e-6}


class Block(nn.Module):
    """Two convolutions with layers of ours, and a residual."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = bn.BatchNorm2d(4, activation="relu"), bn.BatchNorm2d(4, activation="silu")

    def forward(self, x):
        y = self.one(self.first(x))
        return self.other(self.second(y), residual=y)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_script_gives_the_layers_outputs_and_statistics(activation, mode):
    layer = trained(bn.BatchNorm2d(3, activation=activation), (4, 3, 5, 5)).train(mode)
    scripted = torch.jit.script(copy.deepcopy(layer))
    for residual in (None, torch.randn(4, 3, 5, 5)):
        x = torch.randn(4, 3, 5, 5) * 2 + 1
        torch.testing.assert_close(scripted(x, residual), layer(x, residual), **CLOSE)
    states = {name.removeprefix("norm."): value for name, value in scripted.state_dict().items()}
    torch.testing.assert_close(states, dict(layer.state_dict()), **CLOSE)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"momentum": None}, {"eps": 0.1}], ids=str)
def test_script_keeps_torchs_options(options):
    layer = bn.BatchNorm1d(3, **options)
    scripted, x = torch.jit.script(copy.deepcopy(layer)), torch.randn(8, 3) + 1
    for _ in range(2):
        torch.testing.assert_close(scripted(x), layer(x), **CLOSE)
    torch.testing.assert_close(scripted.eval()(x), layer.eval()(x), **CLOSE)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 5, 2, 2)], ids=str)
def test_script_of_the_layer_of_any_dimensions_takes_them_all(shape):
    layer, x = trained(bn.BatchNorm(3), shape), torch.randn(shape)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), **CLOSE)


def test_script_gives_the_models_gradients():
    model, x = trained(Block(), (4, 3, 5, 5)).double().train(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    scripted = torch.jit.script(copy.deepcopy(model))
    (model(x).tanh().sum() + scripted(x).tanh().sum()).backward()
    # the convolutions before the layer sum 100 positions' gradients, which cancel: 100 * 1e-16 * values near 100
    for one, other in zip(scripted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-11)


def test_a_saved_script_runs_where_it_is_loaded():
    model, x, buffer = trained(Block(), (4, 3, 5, 5)), torch.randn(4, 3, 5, 5), io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x), **CLOSE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("virtual_batch_size", 2),
        ("renorm", bn.Renorm(2.0, 1.0)),
        ("unbiased", False),
        ("small_batch", "running"),
        ("channel_dim", -1),
    ],
    ids=str,
)
def test_script_in_training_names_the_option_that_torch_has_not(name, value):
    with pytest.raises(bn.InputError, match=name):
        torch.jit.script(bn.BatchNorm1d(3, **{name: value}))


def test_script_in_eval_names_channel_dim_too():
    with pytest.raises(bn.InputError, match="channel_dim=-1"):
        torch.jit.script(bn.BatchNorm1d(3, channel_dim=-1).eval())


@pytest.mark.parametrize("options", [{"virtual_batch_size": 2}, {"renorm": bn.Renorm(2.0, 1.0)}], ids=str)
def test_script_in_eval_does_without_options_of_training(options):
    layer, x = trained(bn.BatchNorm1d(3, **options), (8, 3)), torch.randn(4, 3)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), **CLOSE)


def test_script_of_a_frozen_layer_in_training_uses_its_running_statistics():
    layer, x = bn.freeze(trained(bn.BatchNorm1d(3), (8, 3))).train(), torch.randn(4, 3)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), **CLOSE)


def test_script_of_a_frozen_layer_stays_frozen_through_train():
    layer = bn.freeze(trained(bn.BatchNorm1d(3), (8, 3)))
    before = layer.running_mean.clone()
    torch.jit.script(layer).train()(torch.randn(4, 3))
    assert torch.equal(layer.running_mean, before)


def test_script_within_a_domain_has_that_domains_statistics():
    layer, x = bn.add_domains(bn.BatchNorm1d(3), ["drawn"]), torch.randn(8, 3)
    with bn.use_domain(layer, "drawn"):
        trained(layer, (8, 3))
        torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), **CLOSE)


def test_script_of_a_bfloat16_layer_with_float32_statistics_equals_it():
    layer = trained(bn.BatchNorm1d(3, activation="relu"), (8, 3)).bfloat16()
    x = torch.randn(8, 3, dtype=torch.bfloat16)
    # bfloat16 has 8 bits: two roundings of the same number may fall on both sides of it, 2**-8 of it apart
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=2**-7, atol=1e-3)


def test_script_in_eval_takes_a_mask():
    layer, x = trained(bn.BatchNorm1d(3, activation="sigmoid"), (4, 3, 5)), torch.randn(4, 3, 5)
    mask = bn.lengths_to_mask(torch.tensor([5, 3, 1, 4]))
    torch.testing.assert_close(torch.jit.script(layer)(x, mask=mask), layer(x, mask=mask), **CLOSE)


def test_script_in_training_refuses_a_mask_when_it_runs():
    scripted, mask = torch.jit.script(bn.BatchNorm1d(3)), torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(torch.jit.Error, match="mask must be None"):
        scripted(torch.randn(4, 3, 5), mask=mask)


# The model that is scripted keeps its layers.


def test_scripting_leaves_the_layers_of_the_model_what_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"norm": bn.BatchNorm1d(3, activation="relu")})["norm"])
    layer, before, shown = model[1], copied_state(model), repr(model)
    torch.jit.script(model)
    assert model[1] is layer
    assert_same_state(model.state_dict(), before)
    assert repr(model) == shown


def test_a_model_that_was_scripted_still_has_all_that_our_layers_do():
    model = nn.Sequential(bn.BatchNorm1d(3, activation="relu"))
    torch.jit.script(model)
    bn.freeze(bn.unfreeze(bn.freeze(model)), statistics=False)
    bn.add_domains(model, ["drawn"])
    with bn.use_domain(model, "drawn"), bn.accumulate(model):
        model(torch.randn(4, 3))
    model(torch.full((4, 3), torch.inf))
    assert model[0].skipped_batches == 1
    assert torch.isfinite(model[0].running_mean).all()
    copy.deepcopy(model)(torch.randn(4, 3))


def test_script_shares_the_parameters_and_statistics_of_the_model():
    model = nn.Sequential(bn.BatchNorm1d(3))
    scripted = torch.jit.script(model)
    scripted(torch.randn(4, 3) + 1)
    assert_same_state(dict(scripted.state_dict()), dict(model.state_dict()))


# Its optimizer finds torch's batch normalization.


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_optimize_for_inference_folds_the_layers_into_convolutions(activation):
    layers = (nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation=activation), nn.Conv2d(4, 4, 3), bn.BatchNorm2d(4))
    model, x = trained(nn.Sequential(*layers), (4, 3, 9, 9)), torch.randn(2, 3, 9, 9)
    optimized = torch.jit.optimize_for_inference(torch.jit.script(model))
    assert "batch_norm" not in str(optimized.graph)
    # folding rounds gamma / sqrt(var + eps) into the weights: some 10 roundings of 6e-8 in sums of 36 values near 8
    torch.testing.assert_close(optimized(x), model(x), rtol=1e-5, atol=1e-4)


# Subclasses and hooks.


class Doubled(bn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class Tripled(bn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return self.in_torchscript(x, None, None) * 3 if torch.jit.is_scripting() else x


def test_script_names_the_super_that_torchscript_does_not_have():
    with pytest.raises(bn.UnsupportedError, match=r"no super\(\), which the forward of Doubled calls"):
        torch.jit.script(nn.Sequential(Doubled(3)))


def test_script_compiles_the_forward_of_a_subclass():
    layer, x = trained(bn.BatchNorm1d(3), (4, 3)), torch.randn(4, 3)
    tripled = Tripled(3).eval()
    tripled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(torch.jit.script(tripled)(x), layer(x) * 3, **CLOSE)


class Offset(bn.BatchNorm1d):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("offset", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def test_script_keeps_the_buffers_of_a_subclass():
    scripted = torch.jit.script(bn.add_domains(Offset(3), ["drawn"]))
    assert torch.equal(scripted(torch.zeros(2, 3)), torch.full((2, 3), 2.0))
    assert set(scripted.state_dict()) == {*bn.BatchNorm1d(3).state_dict(), "offset"}


def test_script_of_a_pruned_layer_says_how_pruning_ends():
    layer, x = trained(bn.BatchNorm1d(4), (6, 4)), torch.randn(6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(bn.UnsupportedError, match=r"got L1Unstructured.*prune\.remove"):
        torch.jit.script(layer)
    prune.remove(layer, "weight")
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), **CLOSE)
