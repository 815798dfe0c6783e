"""The kinds of steps in a forward, as far as they tell where a network has nonlinearities."""

from __future__ import annotations

import copy
import math
from enum import Enum, auto
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from batchnorm.surgery.graph import Dataflow, Step, Unknown
from batchnorm.surgery.graph.metadata import is_metadata
from batchnorm.surgery.norms.formula import is_batch_norm

__all__ = [
    "HIDDEN_LAYERS",
    "Kind",
    "is_bounded",
    "is_constant",
    "is_in_place",
    "keeps_channels",
    "kind_of",
    "name_of",
    "operands",
]


class Kind(Enum):
    """What a step does with the values of a layer."""

    PASSES = auto()
    """It drops, pools, moves, scales or concatenates them."""
    ADDS = auto()
    MULTIPLIES = auto()
    ARITHMETIC = auto()
    """It is part of a nonlinearity that is written as a formula, as erf in GELU."""
    NONLINEARITY = auto()
    NORMALIZES = auto()
    SOFTMAX = auto()
    PRODUCT = auto()
    """It multiplies them with another tensor as matrices, as attention does."""
    GATE = auto()
    """It multiplies one half of them with a function of the other."""
    LAYER = auto()
    OUTPUT = auto()
    OTHER = auto()


Classes = tuple[type[nn.Module], ...]

HIDDEN_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
OTHER_LAYERS: Classes = (
    *(nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.MultiheadAttention, nn.Transformer),
    *(nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
NORMS: Classes = (*(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),)

KEEP_CHANNELS = """
    identity dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout
    maxpool1d maxpool2d maxpool3d avgpool1d avgpool2d avgpool3d lppool1d lppool2d lppool3d
    fractionalmaxpool2d fractionalmaxpool3d adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d
    adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d maxunpool1d maxunpool2d maxunpool3d
    local_response_norm contiguous clone to float double half bfloat16 type_as neg
    interpolate upsample upsamplingnearest2d upsamplingbilinear2d constantpad1d constantpad2d constantpad3d
    zeropad1d zeropad2d zeropad3d reflectionpad1d reflectionpad2d reflectionpad3d
    replicationpad1d replicationpad2d replicationpad3d
"""
MOVE_CHANNELS = """
    flatten unflatten view view_as reshape reshape_as squeeze unsqueeze permute transpose t movedim moveaxis swapaxes
    swapdims type pad pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle roll flip rot90 chunk split
    tensor_split unsafe_chunk unbind getitem narrow select index_select gather expand expand_as repeat
    repeat_interleave tile fold unfold mean sum amax amin max min cat stack concat concatenate hstack vstack dstack
    cumsum checkpoint getattr
"""


def _named(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.replace("_", "").split(), kind)


KINDS: dict[str, Kind] = {
    **_named(Kind.PASSES, KEEP_CHANNELS + MOVE_CHANNELS),
    **_named(
        Kind.NONLINEARITY,
        """
        relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh tanh sigmoid
        softplus softsign log_sigmoid tanhshrink softshrink hardshrink threshold clamp clamp_min clamp_max clip expit
        sin cos
        """,
    ),
    **_named(
        Kind.ARITHMETIC,
        "erf pow square abs exp exp2 expm1 log log1p log2 sqrt rsqrt reciprocal logaddexp maximum minimum where",
    ),
    **_named(Kind.ADDS, "add iadd radd sub isub rsub subtract addcmul addcdiv lerp"),
    **_named(Kind.MULTIPLIES, "mul imul rmul multiply div divide truediv itruediv rtruediv"),
    **_named(Kind.GATE, "glu"),
    **_named(Kind.NORMALIZES, "layer_norm group_norm batch_norm instance_norm rms_norm normalize"),
    **_named(Kind.SOFTMAX, "softmax softmax2d log_softmax softmin gumbel_softmax logsumexp argmax"),
    **_named(
        Kind.PRODUCT,
        "scaled_dot_product_attention multi_head_attention_forward matmul rmatmul bmm baddbmm mm einsum tensordot",
    ),
    **_named(
        Kind.LAYER,
        """
        linear conv1d conv2d conv3d convtranspose1d convtranspose2d convtranspose3d bilinear embedding embedding_bag
        addmm rnn_tanh rnn_relu lstm gru deform_conv2d
        """,
    ),
}
"""By the name of the function, method or class of torch, in lower case and without underscores."""

BOUNDED = frozenset({"sigmoid", "hardsigmoid", "expit", "hardtanh"})
KEEPING = frozenset(KEEP_CHANNELS.replace("_", "").split())

_FOUND: WeakKeyDictionary[Dataflow, dict[Step, Kind]] = WeakKeyDictionary()


def kind_of(flow: Dataflow, step: Step) -> Kind:
    """Return the kind of a step; `Kind.OTHER` where it is not known."""
    found = _FOUND.setdefault(flow, {})
    if step not in found:
        found[step] = _kind_of(flow, step)
    return found[step]


def operands(flow: Dataflow, step: Step) -> list[Step | Unknown]:
    """Return the steps whose outputs a step takes."""
    return [flow.origin(Step(step.block, node)) for node in step.node.all_input_nodes]


def is_constant(flow: Dataflow, value: Step | Unknown) -> bool:
    """Return whether a value is a parameter, a buffer, a size, or computed of such alone."""
    if isinstance(value, Unknown) or value.node.op in ("call_module", "placeholder"):
        return False
    if value.node.op == "get_attr" or is_metadata(value.node):
        return True
    return all(is_constant(flow, operand) for operand in operands(flow, value))


def name_of(flow: Dataflow, step: Step) -> str:
    """Return the class of a module, or the name of a function or method."""
    module = flow.module(step)
    if module is not None:
        return type(module).__name__
    target = step.node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def is_bounded(flow: Dataflow, step: Step) -> bool:
    """Return whether a step is a nonlinearity that opens and closes a gate, as Sigmoid."""
    module = flow.module(step)
    if module is None or _is_torchs(module):
        return _key(name_of(flow, step)) in BOUNDED
    return kind_of(flow, step) is Kind.NONLINEARITY and _stays_between_0_and_1(module)


def keeps_channels(flow: Dataflow, step: Step) -> bool:
    """Return whether the channels of a step's output are known to be those of its input, in the same dimension."""
    return kind_of(flow, step) is not Kind.PASSES or _key(name_of(flow, step)) in KEEPING


def is_in_place(flow: Dataflow, step: Step) -> bool:
    """Return whether a step writes its output over its input."""
    module = flow.module(step)
    if module is not None:
        return getattr(module, "inplace", False) is True
    name = name_of(flow, step)
    return (name.endswith("_") and not name.endswith("__")) or step.node.kwargs.get("inplace", False) is not False


def _kind_of(flow: Dataflow, step: Step) -> Kind:
    module = flow.module(step)
    if module is not None:
        return _kind_of_module(module)
    if step.node.op == "output":
        return Kind.OUTPUT
    kind = KINDS.get(_key(name_of(flow, step)), Kind.OTHER)
    if kind is Kind.PRODUCT and any(is_constant(flow, operand) for operand in operands(flow, step)):
        return Kind.LAYER  # its weight is a parameter of the block
    return kind


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _kind_of_module(module: nn.Module) -> Kind:
    if is_batch_norm(module) or isinstance(module, NORMS):
        return Kind.NORMALIZES
    if isinstance(module, HIDDEN_LAYERS + OTHER_LAYERS):
        return Kind.LAYER
    if _is_torchs(module):
        return KINDS.get(_key(type(module).__name__), Kind.OTHER)
    if any(parameter.dim() > 1 for parameter in module.parameters()):
        return Kind.LAYER
    return _probed(module)


def _probed(module: nn.Module) -> Kind:
    """Return the kind of a module of an unknown class, from its outputs for a few inputs in eval mode.

    It may return its input, move or scale its values, or be a nonlinearity, which takes each value by itself.
    """
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = (x, -x, 2 * x, torch.zeros_like(x))
    outputs = [y for y in (_output(module, each) for each in inputs) if y is not None]
    if len(outputs) < len(inputs):
        return Kind.OTHER
    y, of_opposite, of_double, of_zero = outputs
    if y.numel() == x.numel() and torch.equal(y.flatten().sort().values, x.flatten().sort().values):
        return Kind.PASSES
    if y.shape != x.shape:
        return Kind.OTHER
    other = x.clone()
    other[0, 0, 0, 0] += 1
    changed = _output(module, other)
    if changed is None or not torch.equal(changed.flatten()[1:], y.flatten()[1:]):
        return Kind.OTHER
    is_linear = torch.allclose(y + of_opposite, 2 * of_zero) and torch.allclose(y + y, of_double + of_zero)
    return Kind.PASSES if is_linear else Kind.NONLINEARITY


def _stays_between_0_and_1(module: nn.Module) -> bool:
    y = _output(module, torch.linspace(-60, 60, 121, dtype=torch.float64).reshape(1, 1, 11, 11))
    return y is not None and float(y.min()) >= -1e-6 and math.isclose(float(y.max()), 1, abs_tol=1e-3)


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return the output of a copy of the module in float64; None if it takes no such input."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            twin = copy.deepcopy(module).to("cpu", torch.float64).eval()
            y = twin.forward(x.clone())  # without the hooks of the user's
        except Exception:  # noqa: BLE001 (a module of the user's may raise anything)
            return None
    return y if isinstance(y, Tensor) else None
