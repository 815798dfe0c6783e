"""A Hypothesis strategy of small networks: the source of a class each, so that a failing example reads as code.

The networks do what people write: chains in nn.Sequential and blocks with a forward of their own, modules that are
called twice, activations as modules, functions, methods and in place, residuals and concatenations, several consumers,
layers of torch's and ours and classes like timm's and torchvision's, and code that no tracer reads.
"""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from support import randn

__all__ = ["Network", "input_of", "networks", "trained"]

SIZES = {0: (), 1: (7,), 2: (6, 5), 3: (4, 3, 4)}
ACTIVATIONS = [
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.SiLU()",
    "nn.GELU()",
    "nn.LeakyReLU(0.01)",
    "nn.LeakyReLU(0.2)",
]
ACTIVATIONS += ["nn.Hardswish()", "nn.ReLU6()", "nn.Tanh()", "nn.Sigmoid()", "nn.ELU()", "nn.Identity()"]
FUNCTIONS = ["F.relu({})", "F.relu({}, inplace=True)", "torch.relu({})", "{}.relu()", "F.silu({})", "torch.tanh({})"]
FUNCTIONS += ["F.hardswish({})", "F.relu6({})", "F.leaky_relu({}, 0.2)", "F.gelu({})", "{}.sigmoid()", "F.relu_({})"]
OURS = ["", ", activation='relu'", ", activation='silu'", ", unbiased=False", ", small_batch='running'"]
SHARED = ["{0} + {1}", "torch.add({0}, {1})", "{0}.add({1})", "{1} + {0}", "torch.add({0}, {1}, alpha=2)"]


class NormAct(nn.BatchNorm2d):
    """Batch normalization and an activation, as timm's BatchNormAct2d."""

    def __init__(self, num_features, act_layer=nn.ReLU, **options):
        super().__init__(num_features, **options)
        self.drop, self.act = nn.Identity(), act_layer()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization with constants alone, as torchvision's class of this name."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)]:
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        w, b, rv, rm = (v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


@dataclass(frozen=True)
class Network:
    """The source of a class `Network`, and its input: channels, and sizes of the other dimensions."""

    source: str
    channels: int
    size: tuple

    def __repr__(self):
        return f"input (N, {', '.join(map(str, (self.channels, *self.size)))})\n{self.source}"

    def build(self):
        """Return a new model in float64, with trained statistics and other parameters than those of a new one."""
        namespace = {"nn": nn, "F": F, "torch": torch, "bn": bn, "NormAct": NormAct}
        namespace["FrozenBatchNorm2d"] = FrozenBatchNorm2d
        exec(self.source, namespace)
        torch.manual_seed(0)
        return trained(namespace["Network"]().double(), self)


def input_of(network, seed, samples=4):
    """Return a batch for a network, in float64."""
    return randn(samples, network.channels, *network.size, seed=seed, dtype=torch.float64)


@torch.no_grad()
def trained(model, network):
    """Return the model with gamma, beta and statistics that differ by channel; some gammas are negative."""
    for seed, values in enumerate([*model.parameters(), *model.buffers()]):
        if values.is_floating_point() and values.dim() == 1:
            values += 0.4 * randn(*values.shape, seed=seed, dtype=values.dtype)
    for name, values in model.named_buffers():
        if name.endswith("running_var"):
            values.abs_().add_(0.2)
    for seed in range(2):
        model(input_of(network, seed) * 1.5 + 0.5)
    return model


@dataclass(frozen=True)
class Value:
    """A variable of forward."""

    name: str
    channels: int
    size: tuple


@dataclass
class Writer:
    """A class that is being written: the modules in its constructor, and the lines of its forward."""

    modules: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    values: list = field(default_factory=list)
    layers: list = field(default_factory=list)
    """Modules that may be called again, each with the value it was called with and the one it gave."""

    def module(self, expression):
        name = f"m{len(self.modules)}"
        self.modules.append(f"self.{name} = {expression}")
        return name

    def let(self, expression, channels, size):
        """Add a line, and return its variable."""
        value = Value(f"v{len(self.values)}", channels, tuple(size))
        self.lines.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def text(self, name, output):
        modules, lines = ("".join(f"        {line}\n" for line in part) for part in (self.modules, self.lines))
        return (
            f"class {name}(nn.Module):\n    def __init__(self):\n        super().__init__()\n{modules}\n"
            f"    def forward(self, v0):\n{lines}        return {output}\n"
        )


@st.composite
def convolution(draw, value, channels=None):
    """A convolution or linear layer for a value: its constructor, channels and size."""
    dims, inputs = len(value.size), value.channels
    outputs = channels or draw(st.integers(1, 4))
    bias = draw(st.sampled_from(["", ", bias=False"]))
    if dims == 0:
        return f"nn.Linear({inputs}, {outputs}{bias})", outputs, ()
    groups = draw(st.sampled_from([1, 1, 1, inputs]))
    if outputs % groups:
        outputs = groups
    shared = f"groups={groups}{bias}" if groups > 1 else bias.removeprefix(", ")
    ending = f", {shared})" if shared else ")"
    kind = draw(st.sampled_from(["1x1", "padded", "valid", "same", "strided", "transposed", "mode"]))
    start = f"nn.Conv{dims}d({inputs}, {outputs}, "
    if kind == "padded":
        return f"{start}3, padding=1{ending}", outputs, value.size
    if kind == "mode" and min(value.size) > 1:
        mode = draw(st.sampled_from(["reflect", "circular", "replicate"]))
        return f"{start}3, padding=1, padding_mode='{mode}'{ending}", outputs, value.size
    if kind == "same":
        return f"{start}3, padding='same'{ending}", outputs, value.size
    if kind == "valid" and min(value.size) > 2:
        return f"{start}2{ending}", outputs, [n - 1 for n in value.size]
    if kind == "strided" and min(value.size) > 2:
        return f"{start}3, stride=2, padding=1{ending}", outputs, [(n - 1) // 2 + 1 for n in value.size]
    if kind == "transposed" and max(value.size) < 9:
        start = f"nn.ConvTranspose{dims}d({inputs}, {outputs}, "
        return f"{start}2{ending}", outputs, [n + 1 for n in value.size]
    return f"{start}1{ending}", outputs, value.size


@st.composite
def normalization(draw, value):
    """A batch normalization layer for a value."""
    dims, channels = max(len(value.size), 1), value.channels
    kinds = [f"nn.BatchNorm{dims}d", f"nn.BatchNorm{dims}d", f"bn.BatchNorm{dims}d"]
    if dims == 2:
        kinds += ["NormAct", "FrozenBatchNorm2d"]
    kind = draw(st.sampled_from(kinds))
    if kind == "FrozenBatchNorm2d":
        return f"{kind}({channels}, eps=0.01)"
    options = draw(st.sampled_from(["", "", "", ", affine=False", ", momentum=None", ", track_running_stats=False"]))
    if kind == "NormAct":
        options += draw(
            st.sampled_from(["", ", act_layer=nn.SiLU", ", act_layer=nn.Hardswish", ", act_layer=nn.Identity"])
        )
    if kind.startswith("bn.") and "track" not in options:
        options += draw(st.sampled_from(OURS))
    layer = f"{kind}({channels}, eps=0.01{options})"
    if kind.startswith("bn.") and "track" not in options and draw(st.sampled_from([False, False, False, True])):
        return f"bn.freeze({layer})"
    return layer


@st.composite
def chain(draw, value):
    """The modules of an nn.Sequential, its channels and size."""
    found, current = [], value
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.sampled_from(["cba", "bac", "cb", "cab", "c", "bc"]))
        for letter in order:
            if letter == "c":
                layer, channels, size = draw(convolution(current))
                current = Value("", channels, tuple(size))
            elif letter == "b":
                layer = draw(normalization(current))
            else:
                layer = draw(st.sampled_from([*ACTIVATIONS, "nn.Dropout(0.3)"]))
            found.append(layer)
    return found, current.channels, current.size


def _same(writer, value):
    return [other for other in writer.values if other is not value and other.size == value.size]


def _statement(draw, writer, blocks):
    """Add a statement to a writer."""
    # the last value mostly, so that networks are deep
    value = draw(st.sampled_from([writer.values[-1]] * 4 + writer.values))
    kinds = ["conv", "conv norm", "conv norm", "conv norm act", "norm", "norm", "act", "act", "chain", "chain", "add"]
    kinds += ["add", "cat", "again", "again", "function", "odd", "block" if blocks else "chain", "residual"]
    kind = draw(st.sampled_from(kinds))
    if kind in ("conv", "conv norm", "conv norm act", "residual"):
        layer, channels, size = draw(convolution(value, value.channels if kind == "residual" else None))
        name = writer.module(layer)
        made = writer.let(f"self.{name}({value.name})", channels, size)
        writer.layers.append((name, value, made))
        if kind == "conv":
            return
        name = writer.module(draw(normalization(made)))
        normed = writer.let(f"self.{name}({made.name})", channels, size)
        writer.layers.append((name, made, normed))
        if kind == "residual" and normed.channels == value.channels and normed.size == value.size:
            form = draw(st.sampled_from([*SHARED, "F.relu({0} + {1})", "torch.relu({1} + {0})"]))
            writer.let(form.format(normed.name, value.name), channels, size)
        elif kind == "conv norm act":
            writer.let(draw(st.sampled_from(FUNCTIONS)).format(normed.name), channels, size)
    elif kind == "norm":
        name = writer.module(draw(normalization(value)))
        writer.layers.append((name, value, writer.let(f"self.{name}({value.name})", value.channels, value.size)))
    elif kind == "act":
        name = writer.module(draw(st.sampled_from(ACTIVATIONS)))
        writer.layers.append((name, None, writer.let(f"self.{name}({value.name})", value.channels, value.size)))
    elif kind == "function":
        writer.let(draw(st.sampled_from(FUNCTIONS)).format(value.name), value.channels, value.size)
    elif kind == "chain":
        modules, channels, size = draw(chain(value))
        name = writer.module(f"nn.Sequential({', '.join(modules)})")
        writer.layers.append((name, value, writer.let(f"self.{name}({value.name})", channels, size)))
    elif kind == "block":
        index = len(blocks) - 1
        blocks[index] = draw(_class(f"Block{index}", value, blocks=None))
        name = writer.module(f"Block{index}()")
        writer.layers.append((name, value, writer.let(f"self.{name}({value.name})", value.channels, blocks[index][1])))
        blocks.append(None)
    elif kind == "add":
        others = [other for other in _same(writer, value) if other.channels == value.channels] or [value]
        form = draw(st.sampled_from(SHARED)).format(value.name, draw(st.sampled_from(others)).name)
        writer.let(form, value.channels, value.size)
    elif kind == "cat":
        other = draw(st.sampled_from(_same(writer, value) or [value]))
        writer.let(f"torch.cat(({value.name}, {other.name}), 1)", value.channels + other.channels, value.size)
    elif kind == "again":
        fitting = [
            (name, given, made)
            for name, given, made in writer.layers
            if given is None or (given.channels == value.channels and given.size == value.size)
        ]
        if fitting:
            name, given, made = draw(st.sampled_from(fitting))
            made = value if given is None else made
            writer.let(f"self.{name}({value.name})", made.channels, made.size)
    else:
        form = draw(st.sampled_from(ODD))
        writer.let(form.format(value.name), value.channels, value.size)


ODD = ["{0} * 1.5", "{0} if float({0}.detach().sum()) > -1e9 else -{0}", "{0} * 2 if self.training else {0} * 0.5"]
ODD += ["{0}[:, list(range({0}.shape[1]))]", "F.dropout({0}, 0.3, self.training)", "{0}.clone()", "{0}.flip(1)"]


@st.composite
def _class(draw, name, value, blocks):
    """The source of a class, and the size and channels of its output."""
    writer = Writer(values=[Value("v0", value.channels, value.size)])
    for _ in range(draw(st.integers(*((2, 7) if blocks else (1, 3))))):
        _statement(draw, writer, blocks)
    last = writer.values[-1]
    if blocks is None and last.channels != value.channels:  # a block keeps its channels, so that it can be added
        layer = f"nn.Conv{len(last.size)}d" if last.size else "nn.Linear"
        end = ", 1)" if last.size else ")"
        writer.let(
            f"self.{writer.module(f'{layer}({last.channels}, {value.channels}{end}')}({last.name})",
            value.channels,
            last.size,
        )
        last = writer.values[-1]
    output = last.name
    if blocks and draw(st.booleans()):
        output = f"{last.name}, {draw(st.sampled_from(writer.values)).name}"
    return writer.text(name, output), last.size


@st.composite
def networks(draw):
    """Draw a network with at least one batch normalization layer."""
    dims = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    value = Value("v0", draw(st.integers(1, 3)), SIZES[dims])
    blocks = [None]
    source, _ = draw(_class("Network", value, blocks))
    text = "\n\n".join([*(block[0] for block in blocks if block), source])
    return Network(text, value.channels, value.size)
