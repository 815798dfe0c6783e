"""Bad input of every operation: one plain sentence each, and the model as it was."""

import functools
import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from support import compiles, copied_state, randn

OPERATIONS = {
    "convert": bn.convert,
    "to_torch": bn.to_torch,
    "replace": functools.partial(bn.replace, with_="instance"),
    "insert": functools.partial(bn.insert, placement="before"),
    "accelerate": bn.accelerate,
    "fold": bn.fold,
    "tune": bn.tune,
}
NEED_BATCH_NORM = ["convert", "replace", "accelerate", "fold", "tune"]
TAKE_EXAMPLES = [name for name, operate in OPERATIONS.items() if "example" in inspect.signature(operate).parameters]
X = randn(2, 3, 8, 8)

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.\w+. is deprecated")


def network():
    """Return a network with layers of torch's and of ours, hooks, and values other than those of a new one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), bn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 2)),
    )
    model[0][0].register_forward_hook(lambda *arguments: None)
    with torch.no_grad():
        model(2 * X + 1)
    model[1].eval()
    return model


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def structure(model):
    """Return what makes up the modules of a model: names, objects, classes, modes, hooks and tensors."""
    return [
        (
            *(path, id(module), type(module), module.training, vars(module).keys()),
            {name: len(getattr(module, name, ())) for name in HOOKS},
            {name: (id(values), getattr(values, "requires_grad", None)) for name, values in module._parameters.items()},
            {name: id(values) for name, values in module._buffers.items()},
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def bits(model):
    return {name: values.numpy().tobytes() for name, values in copied_state(model).items()}


def assert_refused(operate, model, kind, *words, **keywords):
    """Call an operation on a model, and check its error: its class, words in it, one sentence, and the model."""
    whole = model if isinstance(model, nn.Module) else nn.Module()
    before, state, drawn = structure(whole), bits(whole), torch.get_rng_state()
    for inplace in (False, True):
        with pytest.raises(kind) as raised:
            operate(model, inplace=inplace, **keywords)
        text = str(raised.value)
        assert type(raised.value) is kind
        assert all(word in text for word in words), text
        assert "\n" not in text
        assert len(text) < 500
        assert structure(whole) == before
        assert bits(whole) == state
        assert torch.equal(torch.get_rng_state(), drawn)


def outcome(name, model, word):
    """Return what an operation makes of a model, or (None, None) where it refuses with a word in the message."""
    try:
        return OPERATIONS[name](model)
    except bn.BatchNormError as error:
        if word not in str(error):
            raise
        return None, None


operations = pytest.mark.parametrize("name", OPERATIONS)
with_examples = pytest.mark.parametrize("name", TAKE_EXAMPLES)


# Models that are none, or that are no plain ones.


@operations
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "NoneType"),
        ("resnet50", "str"),
        (nn.BatchNorm2d, "the class BatchNorm2d"),
        ([nn.BatchNorm2d(3)], "list"),
        (nn.BatchNorm2d(3).state_dict(), "state dict"),
    ],
    ids=["None", "a name", "a class", "a list", "a state dict"],
)
def test_what_is_no_model_is_a_type_error(name, given, words):
    assert_refused(OPERATIONS[name], given, bn.InputTypeError, f"{name} takes a torch.nn.Module; got ", words)


@compiles
@operations
def test_a_compiled_model_is_refused_also_within_another(name):
    compiled = torch.compile(network())
    assert_refused(OPERATIONS[name], compiled, bn.UnsupportedError, "Pass model._orig_mod")
    assert_refused(OPERATIONS[name], nn.Sequential(compiled), bn.UnsupportedError, "at 0. Pass model.0._orig_mod")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@operations
def test_a_model_in_distributed_data_parallel_is_refused_also_within_another(name, process_group):
    wrapped = nn.parallel.DistributedDataParallel(network())
    assert_refused(OPERATIONS[name], wrapped, bn.UnsupportedError, "Pass model.module, and wrap the result")
    assert_refused(OPERATIONS[name], nn.Sequential(wrapped), bn.UnsupportedError, "at 0. Pass model.0.module")


@operations
def test_a_scripted_model_is_refused_also_within_another(name):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(nn.BatchNorm1d(3), scripted)
    for each in (scripted, model):
        with pytest.raises(bn.UnsupportedError, match="TorchScript has compiled"):
            OPERATIONS[name](each)
    assert type(model[0]) is nn.BatchNorm1d


@operations
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules_are_refused(name):
    model = nn.Sequential(torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8), network())
    before = structure(model)
    with pytest.raises(bn.UnsupportedError, match="before quantization; got quantized Quantize at 0"):
        OPERATIONS[name](model, inplace=True)
    assert structure(model) == before


# Models without the layers that are needed.


@pytest.mark.parametrize("name", NEED_BATCH_NORM)
def test_without_batch_norm_the_error_says_which_layers_there_are(name):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    words = f"{name} needs a model with batch normalization layers", "has 2 LayerNorm and 1 GroupNorm"
    assert_refused(OPERATIONS[name], model, bn.InputError, *words)
    assert_refused(OPERATIONS[name], nn.Linear(2, 2), bn.InputError, "Linear has no normalization layer")


class FrozenBatchNorm2d(nn.Module):
    """The layer of torchvision and detectron2, whose four tensors are buffers."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@pytest.mark.parametrize("name", NEED_BATCH_NORM)
def test_a_model_of_frozen_layers_alone_is_no_model_without_batch_norm(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU())
    result, report = OPERATIONS[name](model)
    assert len(report.layers) + len(report.left) == 1
    if name != "replace":
        torch.testing.assert_close(result(X), model(X))


@operations
def test_a_model_that_is_ours_already_is_taken(name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu")).eval()
    result, report = OPERATIONS[name](model)
    # accelerate names no layer that is ours and has its activation: there is nothing to do.
    assert name in ("insert", "accelerate") or len(report.layers) + len(report.left) == 1
    if name != "replace":
        torch.testing.assert_close(result.eval()(X), model(X), rtol=1e-5, atol=1e-5)


@operations
def test_a_lazy_model_is_taken_or_refused_as_it_is(name):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    before = [type(module) for module in model]
    result, report = outcome(name, model, "lazy")
    assert [type(module) for module in model] == before
    if result is not None:
        assert {each.path for each in (*report.layers, *report.left)} == {"1"}
        assert result(X).shape == (2, 4, 6, 6)


@operations
def test_a_model_on_the_meta_device_stays_there_or_is_refused(name):
    model = network().to("meta")
    before = structure(model)
    result, _ = outcome(name, model, "meta device")
    assert structure(model) == before
    assert result is None or {each.device.type for each in (*result.parameters(), *result.buffers())} == {"meta"}


# Examples.


@with_examples
@pytest.mark.parametrize(
    ("example", "kind", "words"),
    [
        (randn(2, 5, 8, 8), bn.InputError, "shape (2, 5, 8, 8)"),
        (randn(2, 3, 9, 9), bn.InputError, "shape (2, 3, 9, 9)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), bn.InputError, "int64"),
        (torch.empty(2, 3, 8, 8, device="meta"), bn.InputError, "meta"),
        ((X, X), bn.InputError, "shape (2, 3, 8, 8)"),
        ({"images": X}, bn.InputError, "images"),
        ((), bn.InputError, "got ()"),
        (3, bn.InputTypeError, "got int"),
        ("image", bn.InputTypeError, "got str"),
    ],
    ids=["channels", "size", "integers", "another device", "two", "name", "nothing", "a number", "a text"],
)
def test_an_example_that_the_model_does_not_take_is_named(name, example, kind, words):
    assert_refused(OPERATIONS[name], network(), kind, "example must be", words, example=example)


class Failing(nn.Module):
    """A model whose forward raises an error of several lines."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() < 1e9:
            raise ValueError("first line\nsecond line")
        return self.norm(self.conv(x))


@with_examples
def test_a_model_whose_forward_raises_is_named_with_its_error(name):
    words = "Failing raised ValueError: first line second line"
    assert_refused(OPERATIONS[name], Failing(), bn.InputError, words, example=X)


@with_examples
def test_a_lazy_model_cannot_be_run_on_an_example(name):
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    before = [type(module) for module in model]
    for inplace in (False, True):
        with pytest.raises(bn.InputError, match=r"got a lazy LazyConv2d at 0\. Run the model on a batch first"):
            OPERATIONS[name](model, example=X, inplace=inplace)
    assert [type(module) for module in model] == before


# Options.


@pytest.mark.parametrize("name", ["convert", "insert"])
@pytest.mark.parametrize(
    ("options", "kind"),
    [({"activate": "relu"}, bn.InputTypeError), ({"activation": "swish"}, bn.InputError), ({"eps": -1}, bn.InputError)],
    ids=["unknown", "another value", "out of range"],
)
def test_options_that_no_layer_has_are_named(name, options, kind):
    assert_refused(OPERATIONS[name], nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), kind, "got", **options)


def test_names_that_there_are_none_of_are_named_with_those_that_there_are():
    model = network()
    assert_refused(functools.partial(bn.replace, with_="weight"), model, bn.InputError, "got 'weight'")
    assert_refused(functools.partial(bn.insert, placement="between"), model, bn.InputError, "got 'between'")


# Values.


@operations
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("tensor", ["0.0.weight", "0.1.weight", "0.1.running_var"])
def test_values_that_are_not_finite_are_kept_or_named(name, tensor, value):
    model = network().eval()
    model.state_dict()[tensor].view(-1)[0] = value
    state, before = bits(model), structure(model)
    result, report = outcome(name, model, "finite")
    assert bits(model) == state
    assert structure(model) == before
    if result is not None and name not in ("replace", "insert"):
        named = any("finite" in left.reason for left in report.left)
        assert named or torch.equal(result.eval()(X).isfinite(), model(X).isfinite())
