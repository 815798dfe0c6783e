"""The layers through exporters: ONNX, torch.export, torch.jit.trace."""

import copy
import io
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.nn.buffers import COUNTS
from support import trained

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")  # torch's warning about the functions tested here
    for message in (
        r".*torch\.jit\.\w+. is deprecated:DeprecationWarning",
        "You are using the legacy TorchScript-based ONNX export:DeprecationWarning",
        "The feature will be removed:DeprecationWarning",
        ".*LeafSpec:FutureWarning",
        "Converting a tensor:torch.jit.TracerWarning",
    )
]
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
        y = self.one(
            self.first(x).tanh()
        )  # straight after a convolution ONNX's optimizers would fold the layer into it
        return self.other(self.second(y).tanh(), residual=y)


class EveryActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(bn.BatchNorm1d(3, activation=activation) for activation in ACTIVATIONS)

    def forward(self, x):
        return torch.stack([norm(x, x) for norm in self.norms])


CASES = {
    "1d (N, C)": (lambda: bn.BatchNorm1d(3, activation="relu"), (4, 3), 1),
    "1d (N, C, L)": (lambda: bn.BatchNorm1d(3, eps=0.1, bias=False), (4, 3, 5), 1),
    "3d": (lambda: bn.BatchNorm3d(3, activation="tanh", affine=False), (4, 3, 2, 3, 2), 1),
    "any": (lambda: bn.BatchNorm(3, activation="sigmoid"), (4, 3, 2, 3), 1),
    "channel_dim=-1": (lambda: bn.BatchNorm(3, channel_dim=-1, activation="relu"), (4, 5, 3), 1),
    "channel_dim=2": (lambda: bn.BatchNorm(3, channel_dim=2), (4, 5, 3, 2), 1),
    "block": (Block, (4, 3, 5, 5), 2),
    "every activation": (EveryActivation, (4, 3, 5), 6),
}


def to_onnx(model, x, dynamo):
    buffer = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(buffer)
    else:
        torch.onnx.export(model, (x,), buffer, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def run_onnx(exported, x):
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# ONNX.


@pytest.mark.parametrize("dynamo", [False, True], ids=["dynamo=False", "dynamo=True"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_onnx_has_plain_batch_normalization_and_gives_the_models_outputs(case, dynamo):
    made, shape, layers = case
    model, x = trained(made(), shape), torch.randn(shape) * 2 + 1
    exported = to_onnx(model, x, dynamo)
    assert [node.op_type for node in exported.graph.node].count("BatchNormalization") == layers
    assert {node.domain for node in exported.graph.node} <= {"", "ai.onnx"}
    torch.testing.assert_close(run_onnx(exported, x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_onnx_of_a_layer_is_what_torchs_layer_gives():
    ours, x = trained(bn.BatchNorm2d(3), (4, 3, 5, 5)), torch.randn(4, 3, 5, 5)
    theirs = nn.BatchNorm2d(3).eval()
    theirs.load_state_dict(ours.state_dict())
    one, other = (to_onnx(layer, x, dynamo=True) for layer in (ours, theirs))
    assert [node.op_type for node in one.graph.node] == [node.op_type for node in other.graph.node]


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_onnx_with_a_batch_size_left_open_takes_another(channel_dim):
    shape = (4, 3, 3)
    model = trained(bn.BatchNorm(3, channel_dim=channel_dim, activation="relu"), shape)
    program = torch.onnx.export(
        model, (torch.randn(shape),), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    buffer, x = io.BytesIO(), torch.randn(7, 3, 3)
    program.save(buffer)
    y = run_onnx(onnx.load_from_string(buffer.getvalue()), x)
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-5)


# torch.export.


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["strict=False", "strict=True"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_export_in_eval_equals_the_model_in_torchs_own_operators(case, strict):
    made, shape, layers = case
    model, x = trained(made(), shape), torch.randn(shape)
    program = torch.export.export(model, (x,), strict=strict)
    assert targets(program).count(torch.ops.aten.batch_norm.default) == layers
    assert {target.namespace for target in targets(program)} == {"aten"}
    torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


def test_export_in_eval_with_a_mask_gives_0_at_padding():
    model, x = trained(bn.BatchNorm1d(3, activation="sigmoid"), (4, 3, 5)), torch.randn(4, 3, 5)
    mask = bn.lengths_to_mask(torch.tensor([5, 2, 0, 3]), 5)
    program = torch.export.export(model, (x,), {"mask": mask})
    y = program.module()(x, mask=mask)
    torch.testing.assert_close(y, model(x, mask=mask), **CLOSE)
    assert not y.masked_select(~mask.unsqueeze(1)).any()


def test_export_with_a_batch_size_left_open_takes_another():
    model, x = trained(Block(), (4, 3, 5, 5)), torch.randn(7, 3, 5, 5)
    program = torch.export.export(model, (torch.randn(4, 3, 5, 5),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


def test_export_of_a_bfloat16_layer_with_float32_statistics_equals_it():
    model = trained(bn.BatchNorm2d(3, activation="relu"), (4, 3, 5, 5)).bfloat16()
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)
    program = torch.export.export(model, (x,))
    # bfloat16 has 8 bits: two roundings of the same number may fall on both sides of it, 2**-8 of it apart
    torch.testing.assert_close(program.module()(x), model(x), rtol=2**-7, atol=1e-3)


def test_a_saved_program_runs_where_it_is_loaded():
    model, x, buffer = trained(Block(), (4, 3, 5, 5)), torch.randn(4, 3, 5, 5), io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x), **CLOSE)


# torch.jit.trace.


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_trace_in_eval_gives_the_models_outputs_for_another_batch_size(channel_dim):
    layer = trained(bn.BatchNorm(3, channel_dim=channel_dim, activation="gelu"), (4, 3, 3))
    traced = torch.jit.trace(layer, torch.randn(4, 3, 3))
    x = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)


def test_trace_in_training_gives_the_layers_outputs_and_statistics():
    layer = trained(bn.BatchNorm2d(3, activation="relu"), (4, 3, 5, 5)).train()
    twin, before = copy.deepcopy(layer), copy.deepcopy(layer.state_dict())
    traced = torch.jit.trace(twin, torch.randn(4, 3, 5, 5))
    traced.load_state_dict(before, strict=False)
    x = torch.randn(6, 3, 5, 2) * 3 + 1
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)
    found = {name: values for name, values in traced.state_dict().items() if name not in COUNTS}
    torch.testing.assert_close(found, dict(layer.state_dict()), **CLOSE)  # to a trace every buffer is persistent


@pytest.mark.parametrize(
    "layer", [bn.BatchNorm1d(3), bn.BatchNorm1d(3, track_running_stats=False).eval()], ids=["train", "eval"]
)
def test_trace_refuses_a_mask_that_would_not_keep_padding_out_of_the_statistics(layer):
    x, mask = torch.randn(4, 3), torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match=r"takes no mask; got a mask"):
        torch.jit.trace(layer, (x, x, mask))


@pytest.mark.filterwarnings("ignore:Setting `:DeprecationWarning")
def test_onnx_in_training_refuses_a_mask():
    x, mask = torch.randn(4, 3), torch.tensor([True, True, True, False])
    training = torch.onnx.TrainingMode.TRAINING
    with pytest.raises(ValueError, match="takes no mask"):
        torch.onnx.export(
            bn.BatchNorm1d(3), (x, x, mask), io.BytesIO(), dynamo=False, training=training, do_constant_folding=False
        )


def test_trace_in_eval_warns_of_nothing_that_torchs_layer_does_not():
    def warned(layer, *inputs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.trace(layer.eval(), inputs)
        return [str(warning.message) for warning in caught if warning.category is torch.jit.TracerWarning]

    x = torch.randn(4, 3, 5, 5)
    assert warned(bn.BatchNorm2d(3), x) == warned(nn.BatchNorm2d(3), x) == []
    assert warned(bn.BatchNorm2d(3, activation="relu"), x, x) == []


def test_exporters_leave_the_model_as_it_was():
    model, x = trained(Block(), (4, 3, 5, 5)), torch.randn(4, 3, 5, 5)
    before = copy.deepcopy(model.state_dict())
    torch.export.export(model, (x,))
    to_onnx(model, x, dynamo=False)
    torch.jit.trace(model, x)
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
