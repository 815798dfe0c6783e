"""`fold`: batch normalization becomes part of the weights of the layers beside it."""

import copy
import io

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.surgery.folding.folded import Folded
from support import assert_same_state, compiles, copied_state, randn, saved_and_loaded

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.\w+. is deprecated")

# Some hundred roundings of 1.1e-16 in values up to about 100.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def prepared(*modules, shape):
    """A float64 network in eval mode with statistics, gamma and beta of its own, and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(*modules).double()
    x = randn(*shape, dtype=torch.float64)
    settle(model, x)
    return model, x


def settle(model, x):
    """Give a model in training statistics of random batches, and gamma and beta other than 1 and 0."""
    with torch.no_grad():
        for i, values in enumerate(model.parameters()):
            if values.dim() == 1:
                values += 0.5 * randn(*values.shape, seed=i)
        model.train()
        for seed in range(3):
            model(x + randn(*x.shape, seed=seed, dtype=x.dtype) * 2 + 1)
    model.eval()


def folds(model, x, *, left=0, example=True):
    """Fold a copy of a model, check its outputs, and return it with the report."""
    folded, report = bn.fold(model, x if example else None)
    torch.testing.assert_close(folded(x), model(x), **CLOSE)
    assert len(report.left) == left, str(report)
    assert sum(isinstance(module, Folded) for module in folded.modules()) == len(report.layers)
    return folded, report


# Into the layer before.


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], (5, 4)),
        (lambda: [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False)], (5, 4)),
        (lambda: [nn.Conv1d(4, 6, 3, dilation=2, padding="same"), nn.BatchNorm1d(6)], (3, 4, 7)),
        (lambda: [nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect"), nn.BatchNorm2d(6)], (3, 4, 5, 6)),
        (lambda: [nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6, eps=0.1)], (3, 2, 3, 4, 3)),
        (lambda: [nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)], (3, 4, 5)),
        (lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), nn.BatchNorm2d(6)], (3, 4, 5, 6)),
        (lambda: [nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6, affine=False)], (3, 4, 2, 2, 3)),
        (lambda: [nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)], None),
        (lambda: [nn.Conv2d(4, 6, 1), bn.BatchNorm2d(6, bias=False)], (3, 4, 5, 6)),
        (lambda: [nn.Conv2d(4, 6, 1), bn.BatchNorm(6, virtual_batch_size=2, renorm=bn.Renorm(3, 5))], (4, 4, 5, 6)),
        (lambda: [nn.Linear(4, 6), bn.BatchNorm1d(6, channel_dim=-1)], (3, 7, 4)),
        (lambda: [nn.Conv2d(4, 6, 1), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(6)], (3, 4, 5, 6)),
        (lambda: [nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Identity(), nn.BatchNorm2d(6)], (3, 4, 5, 6)),
    ],
)
def test_a_layer_takes_the_batch_norm_behind_it(make, shape):
    if shape is None:  # SyncBatchNorm trains on several processes alone
        model, x = nn.Sequential(*make()).double().eval(), randn(3, 4, 5, 6, dtype=torch.float64)
        model[1].running_mean.fill_(0.3)
    else:
        model, x = prepared(*make(), shape=shape)
    state = copied_state(model)
    folded, report = folds(model, x)
    assert report.max_difference < 1e-10
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert_same_state(copied_state(model), state)
    folds(model, x, example=False)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_an_activation_of_ours_stays_as_a_module(activation):
    model, x = prepared(
        nn.Conv2d(3, 5, 3), bn.BatchNorm2d(5, activation=activation), nn.Conv2d(5, 2, 1), shape=(3, 3, 5, 5)
    )
    folded, report = folds(model, x)
    assert [row.after for row in report.layers] == [f"Folded, {type(folded[1].activation).__name__}"]


def test_the_activation_of_a_subclass_keeps_its_name_and_its_parameters():
    class NormAct(nn.BatchNorm2d):
        """As timm's BatchNormAct2d."""

        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.PReLU(channels)

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    model, x = prepared(nn.Conv2d(3, 5, 3), NormAct(5), shape=(3, 3, 5, 5))
    folded, _ = folds(model, x)
    assert set(folded.state_dict()) == {"0.weight", "0.bias", "1.act.weight"}
    assert torch.equal(folded[1].act.weight, model[1].act.weight)


def test_the_children_and_the_function_behind_a_normalization_all_stay():
    class Both(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.none, self.act = nn.Identity(), nn.Softsign()

        def forward(self, x):
            return self.act(self.none(super().forward(x))).relu()

    model, x = prepared(nn.Conv2d(3, 5, 3), Both(5), shape=(3, 3, 5, 5))
    _, report = folds(model, x)
    assert report.layers[0].after == "Folded, Softsign, ReLU"


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers alone."""

    def __init__(self, channels):
        super().__init__()
        for name, values in zip(
            ("weight", "bias", "running_mean", "running_var"), torch.rand(4, channels), strict=True
        ):
            self.register_buffer(name, values)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def test_a_frozen_batch_norm_of_buffers_is_folded():
    model, x = prepared(nn.Conv2d(3, 5, 3, bias=False), Frozen(5), nn.ReLU(), shape=(2, 3, 5, 5))
    folds(model, x)


def test_a_residual_of_ours_is_added_by_the_place_of_the_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), bn.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), x)

    model, x = prepared(Block(), Block(), shape=(2, 3, 5, 5))
    folds(model, x)


def test_a_network_that_is_prepared_for_quantization_is_folded():
    class Block(nn.Module):
        """As in torchvision.models.quantization, before its layers are quantized."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.skip = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            return self.skip.add_relu(self.norm(self.conv(x)), x)

    model, x = prepared(Block(), Block(), shape=(2, 3, 5, 5))
    folds(model, x)


def test_the_functional_dropout_of_an_eval_forward_is_passed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(F.dropout(self.fc(x), 0.5, self.training)).relu()

    model, x = prepared(Net(), shape=(6, 3))
    folds(model, x)


def test_a_linear_layer_takes_the_batch_norm_of_its_flattened_rows():
    class LinearNorm(nn.Module):
        """As in LeViT."""

        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)

        def forward(self, x):
            x = self.linear(x)
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    model, x = prepared(LinearNorm(), nn.Hardswish(), shape=(2, 4, 3))
    folded, _ = folds(model, x)
    with pytest.raises(bn.InputError, match="folded for inputs of 2 dimensions"):
        folded(x[None])


# Into the next layer.


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: [nn.BatchNorm1d(4), nn.Linear(4, 6)], (5, 4)),
        (lambda: [bn.BatchNorm1d(4, affine=False), nn.Dropout(), nn.Linear(4, 6, bias=False)], (5, 4)),
        (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (3, 4, 5, 6)),
        (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")], (3, 4, 5, 6)),
        (lambda: [nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)], (3, 4, 5, 6)),
        (lambda: [nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (3, 4, 7)),
    ],
)
def test_a_batch_norm_becomes_part_of_the_next_layer(make, shape):
    model, x = prepared(*make(), shape=shape)
    folded, _ = folds(model, x)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())


def test_a_convolution_that_pads_takes_a_scale_without_shift():
    model = nn.Sequential(bn.BatchNorm2d(3, bias=False), nn.Conv2d(3, 4, 3, padding=1)).double().eval()
    with torch.no_grad():
        model[0].running_var.uniform_(0.5, 2)
    folds(model, randn(2, 3, 5, 5, dtype=torch.float64))
    model[0].running_mean.fill_(0.1)
    _, report = folds(model, randn(2, 3, 5, 5, dtype=torch.float64), left=1)
    assert report.left[0].reason == (
        "its input is the input of the model, and its output goes to a convolution that pads its input with zeros"
    )


class PreActivation(nn.Module):
    """A residual block with batch norm and ReLU before each convolution (He et al. 2016)."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


def test_a_pre_activation_network_is_folded_where_nothing_else_uses_the_convolution():
    model, x = prepared(nn.Conv2d(3, 4, 1), PreActivation(4), PreActivation(4), shape=(2, 3, 5, 5))
    _, report = folds(model, x, left=2)
    assert [row.path for row in report.layers] == ["1.norm2", "2.norm2"]
    reasons = [row.reason for row in report.left]
    assert reasons == [
        "the output of Conv2d also goes to add, and its output goes to relu",
        "its input comes from add, and its output goes to relu",
    ]


def test_a_batch_norm_in_another_block_than_its_convolution_is_folded():
    model, x = prepared(
        nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Identity(), nn.BatchNorm2d(4)), shape=(2, 3, 5, 5)
    )
    folds(model, x)


# The model returned.


def small(**options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), bn.BatchNorm2d(4, activation="relu"), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)]
    model = nn.Sequential(nn.Sequential(*layers), nn.BatchNorm2d(2))
    x = randn(2, 3, 6, 6)
    settle(model, x)
    return model, x


def test_the_names_of_the_state_dict_are_those_of_before():
    model, _ = small()
    folded, _ = bn.fold(model)
    assert list(folded.state_dict()) == ["0.0.weight", "0.0.bias", "0.3.weight", "0.3.bias"]


def test_requires_grad_and_the_layout_are_kept():
    model, _ = small()
    model = model.to(memory_format=torch.channels_last)
    model[0][0].weight.requires_grad_(False)
    folded, _ = bn.fold(model)
    assert {name: p.requires_grad for name, p in folded.named_parameters()} == {
        "0.0.weight": False,
        "0.0.bias": True,
        "0.3.weight": True,
        "0.3.bias": True,
    }
    assert folded[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_in_place_the_parameters_are_the_same_objects():
    model, x = small()
    y = model(x)
    conv, parameters = model[0][0], dict(model.named_parameters())
    folded, _ = bn.fold(model, inplace=True)
    assert folded is model
    assert model[0][0] is conv
    assert model[0][0].weight is parameters["0.0.weight"]
    assert model[0][3].bias is parameters["0.3.bias"]
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_model_in_training_mode_is_folded_as_at_inference_and_returned_in_eval_mode():
    model, x = small()
    y = model(x)
    folded, report = bn.fold(model.train())
    assert model.training
    assert not any(module.training for module in folded.modules())
    torch.testing.assert_close(folded(x), y, rtol=1e-5, atol=1e-5)
    assert "The model was in training mode." in str(report)
    assert "training mode" not in str(bn.fold(model.eval())[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_low_precision_is_rounded_once(dtype):
    model, x = prepared(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), shape=(2, 3, 6, 6))
    narrow = model.to(dtype)
    wide = copy.deepcopy(narrow).double()
    folded, _ = bn.fold(narrow, x.to(dtype))
    exact, _ = bn.fold(wide)
    assert torch.equal(folded[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(folded[0].bias, exact[0].bias.to(dtype))


def test_every_reference_to_a_folded_layer_follows():
    class Listed(nn.Module):
        """Keeps its layers in a list beside the names that torch knows."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.steps = [self.conv, self.norm]

        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    model, x = prepared(Listed(), shape=(2, 3, 5, 5))
    folds(model, x)


def test_a_block_that_runs_several_times_is_folded_as_one():
    class Head(nn.Module):
        """One tower on the maps of several levels, as in RetinaNet."""

        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return self.tower(x), self.tower(x[..., :2, :2])

    model, x = Head().double(), randn(2, 3, 5, 5, dtype=torch.float64)
    settle(model, x)
    folded, report = bn.fold(model)
    assert len(report.layers) == 1
    for found, expected in zip(folded(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_block_that_cannot_be_traced_is_read_on_the_example():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y if y.sum() > 1e9 else y.relu()

    model, x = prepared(Branching(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), shape=(2, 3, 5, 5))
    folds(model, x)
    _, report = folds(model, x, example=False, left=1)
    assert report.left[0].path == "0.norm"
    assert report.left[0].reason.startswith("0 cannot be read: torch.fx cannot trace Branching")


# Training.


@pytest.mark.parametrize("path", ["", "0", "0.1"])
@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: saved_and_loaded(m, weights_only=False)],
    ids=["itself", "deepcopy", "saved"],
)
def test_a_folded_model_refuses_to_train_before_any_mode_is_changed(copied, path):
    model, _ = small()
    folded = copied(bn.fold(model)[0])
    with pytest.raises(bn.UnsupportedError, match="a folded model is for inference"):
        folded.get_submodule(path).train()
    assert not any(module.training for module in folded.modules())
    for module in folded.modules():
        assert module.eval() is module
        assert module.train(False) is module


def test_the_model_that_was_folded_goes_on_training():
    model, x = small()
    bn.fold(model)
    model.train()(x).sum().backward()
    assert type(model) is nn.Sequential


def test_folding_twice_says_that_nothing_is_left():
    model, x = small()
    folded, _ = bn.fold(model)
    again, report = bn.fold(folded, x)
    assert report.layers == report.left == ()
    assert str(report).endswith("Nothing is left to fold: all 2 layers have been folded before.")
    torch.testing.assert_close(again(x), folded(x), rtol=0, atol=0)
    with pytest.raises(bn.UnsupportedError):
        again.train()


# Tools.


def test_a_folded_model_is_copied_saved_traced_and_exported():
    model, x = small()
    folded, _ = bn.fold(model)
    y = folded(x)
    assert torch.equal(copy.deepcopy(folded)(x), y)
    assert torch.equal(saved_and_loaded(folded, weights_only=False)(x), y)
    assert torch.equal(torch.jit.trace(folded, x)(x), y)
    assert torch.equal(torch.jit.script(folded)(x), y)
    assert torch.equal(fx.symbolic_trace(folded)(x), y)
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_onnx_file_of_a_folded_model_has_no_batch_normalization():
    pytest.importorskip("onnx")
    import onnx

    model, x = small()
    file = io.BytesIO()
    torch.onnx.export(bn.fold(model)[0], (x,), file, dynamo=False)
    operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert operators == ["Conv", "Relu", "Conv"]


@compiles
def test_a_folded_model_compiles_without_graph_breaks():
    model, x = small()
    folded, _ = bn.fold(model)
    torch.testing.assert_close(torch.compile(folded, fullgraph=True)(x), folded(x), rtol=1e-5, atol=1e-5)


def test_a_graph_module_is_folded_and_refuses_to_train():
    model, x = small()
    folded, report = bn.fold(fx.symbolic_trace(model))
    assert len(report.layers) == 2
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(bn.UnsupportedError):
        folded.train()
