"""The formula of batch normalization in float64, to which the tests of the native kernels compare."""

import torch

from batchnorm import ops
from batchnorm.kernels import native
from batchnorm.kernels.records import Operands, Rule, Running
from support import by_channel, full_mask, largest_excess, randn, reduced_dims, with_layout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS = {None: lambda z: z, "relu": torch.relu, "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.01)}
# Two threads share the work from 196608 values on. Outputs are streamed past the cache from 8 MB on.
LARGE = [
    ((1, 1, 200_003), "contiguous"),  # a channel divided
    ((5, 3, 211, 67), "contiguous"),
    ((67, 61, 7, 7), "contiguous"),
    ((8, 4096, 7), "contiguous"),
    ((29, 7_001), "contiguous"),
    ((2503, 97), "contiguous"),
    ((509, 640), "contiguous"),
    ((5, 3, 211, 67), "channels last"),
    ((67, 61, 7, 7), "channels last"),
    ((2, 1, 331, 331), "channels last"),
    ((3, 130, 29, 23), "channels last"),
    ((2, 7, 11, 31, 47), "channels last"),
]
# Options of a case: affine, residual, mask, activation, training.
OPTIONS = {
    "plain": (False, False, False, None, True),
    "affine": (True, False, False, None, True),
    "relu": (True, False, False, "relu", True),
    "leaky": (True, False, False, "leaky_relu", True),
    "residual": (True, True, False, None, True),
    "residual, relu": (True, True, False, "relu", True),
    "mask": (True, False, True, None, True),
    "mask, residual, relu": (True, True, True, "relu", True),
    "mask, leaky, eval": (True, False, True, "leaky_relu", False),
    "eval": (False, False, False, None, False),
    "residual, relu, eval": (True, True, False, "relu", False),
}


def formula(x, weight, bias, residual, mask, activation, eps, given):
    """Return y, the activation's argument z, x_hat, mean and biased variance by the formulas."""
    dims = reduced_dims(x)
    inside = full_mask(x, mask)
    x = torch.where(inside, x, 0.0)
    if given is None:
        m = inside[:, :1].sum().clamp(min=1)
        mean = x.sum(dims, keepdim=True) / m
        var = torch.where(inside, (x - mean) ** 2, 0.0).sum(dims, keepdim=True) / m
    else:
        mean, var = (by_channel(values.double(), x) for values in given)
    x_hat = (x - mean) / torch.sqrt(var + eps)
    z = x_hat if weight is None else x_hat * by_channel(weight, x)
    z = z if bias is None else z + by_channel(bias, x)
    z = z if residual is None else z + torch.where(inside, residual, 0.0)
    return torch.where(inside, FUNCTIONS[activation](z), 0.0), z, x_hat, mean.flatten(), var.flatten()


def assert_matches_formula(
    x, weight=None, bias=None, residual=None, mask=None, activation=None, given=None, eps=1e-5, dy=None
):
    """Compare y, the running statistics, the moments and all gradients with the formula in float64.

    Float sums take at most 4096 values of a channel before they are added up in double: 256 additions in the narrowest
    vectors (4 lanes, 4 sums), whose error is at most 256 x 2**-24 = 1.5e-5 of the sum of magnitudes if all roundings
    have one sign; so t = 1e-5, which is also the error of y that the library promises. In double the same error is
    256 x 2**-53 = 3e-14. Each result may be off by t of the magnitudes that go into it, and by its own rounding to the
    dtype in which it is stored.
    """
    t = 1e-13 if x.dtype == torch.float64 else 1e-5
    dims = reduced_dims(x)
    given_ones = [values for values in (x, weight, bias, residual) if values is not None]
    exact = [
        None if values is None else values.detach().double().requires_grad_() for values in (x, weight, bias, residual)
    ]
    expected, z, x_hat, mean, var = formula(*exact, mask, activation, eps, given)

    ours = [None if values is None else values.detach().requires_grad_() for values in (x, weight, bias, residual)]
    training = given is None
    running_mean, running_var = (torch.zeros(x.shape[1]), torch.ones(x.shape[1])) if training else given
    running = Running(running_mean, running_var, torch.tensor(0), 0.25)
    y = ops.batch_norm(Operands(*ours, mask), running, Rule(eps, activation, training))
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(native.ready(x)).stride()

    size = 1 + x_hat.detach().abs()
    w = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else weight.double().abs()
    scale = by_channel(w, x) * size
    scale = scale if bias is None else scale + by_channel(bias.double().abs(), x)
    scale = scale if residual is None else scale + residual.double().abs()
    scale = scale if mask is None else torch.where(mask.unsqueeze(1), scale, 0.0)
    assert largest_excess(y.detach(), expected.detach(), t * scale) <= 1

    m = x.numel() // x.shape[1] if mask is None else int(mask.expand(x.shape[0], *x.shape[2:]).sum())
    mean, var = mean.detach(), var.detach()
    if training and m > 1:
        # The shift that is subtracted before squaring is at most sqrt(8) deviations from the mean: 9 variances.
        assert largest_excess(running_mean, 0.25 * mean, t * var.sqrt()) <= 1
        assert largest_excess(running_var, 0.75 + 0.25 * var * m / (m - 1), 9 * t * var) <= 1

    # Gradients are compared away from the kink: where the bound of y leaves the sign of z open, dy is 0.
    dy = randn(*x.shape, seed=99, dtype=x.dtype) if dy is None else dy
    if activation is not None:
        unsure = z.detach().abs() <= t * scale + torch.finfo(x.dtype).smallest_normal
        dy = torch.where(unsure, torch.zeros_like(dy), dy) if unsure.any() else dy
    gradients = torch.autograd.grad(y, [values for values in ours if values is not None], dy)
    wanted = torch.autograd.grad(expected, [values for values in exact if values is not None], dy.double())
    size_of_dz = dy.double().abs() if mask is None else torch.where(mask.unsqueeze(1), dy.double().abs(), 0.0)
    total, products = size_of_dz.sum(dims), (size_of_dz * size).sum(dims)
    inverse = (w / torch.sqrt(var + eps)).abs()
    of_x = size_of_dz
    if training:
        of_x = of_x + by_channel(total / max(m, 1), x) + size * by_channel(products / max(m, 1), x)
    bounds = [by_channel(inverse, x) * of_x]
    bounds += [] if weight is None else [products]
    bounds += [] if bias is None else [total]
    bounds += [] if residual is None else [size_of_dz]
    for values, mine, theirs, bound in zip(given_ones, gradients, wanted, bounds, strict=True):
        assert mine.dtype == values.dtype
        assert mine.shape == values.shape
        assert largest_excess(mine, theirs, t * bound) <= 1


def case(shape, layout, dtype, options, *, ratio=0.0):
    """Return the arguments of `assert_matches_formula` for a case."""
    affine, with_residual, masked, activation, training = options
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = with_layout(randn(*shape, dtype=dtype) + ratio, layout)
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    if masked:
        mask.view(-1)[:2] = True
    return {
        "x": x,
        "weight": randn(shape[1], seed=1, dtype=parameters) + 2 if affine else None,
        "bias": randn(shape[1], seed=2, dtype=parameters) if affine else None,
        "residual": with_layout(randn(*shape, seed=3, dtype=dtype), layout) if with_residual else None,
        "mask": mask,
        "activation": activation,
        "given": None if training else (randn(shape[1], seed=5), randn(shape[1], seed=6).square() + 0.1),
    }
