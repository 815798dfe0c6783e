"""Batch renormalization: r and d, their schedule, and the disagreement of training and eval."""

import statistics

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import batchnorm as bn
from support import PassThroughMode, benchmark_results, benchmark_script, compiles, randn

EPS = 1e-5
LAST = torch.channels_last
# Class, shape, memory format, dimension of the channels.
CASES = {
    "(N, C)": (bn.BatchNorm1d, (9, 5), None, 1),
    "(N, C, L)": (bn.BatchNorm1d, (6, 5, 3), None, 1),
    "(N, C, H, W)": (bn.BatchNorm2d, (5, 5, 2, 3), None, 1),
    "(N, C, H, W) channels last": (bn.BatchNorm2d, (5, 5, 2, 3), LAST, 1),
    "(N, L, C)": (bn.BatchNorm1d, (6, 3, 5), None, -1),
}
ACTIVATIONS = {None: lambda z: z, "relu": torch.relu, "gelu": nn.functional.gelu}
# Channel by channel: r within its limits, then beyond either; d within, beyond either.
RUNNING_MEAN = (0.3, 5.0, -6.0, 0.0, 0.1)
RUNNING_VAR = (4.5, 3.0, 5.0, 100.0, 0.05)
LIMITS = (1.5, 0.75)
MODES = [True, False]


def normal(shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float64)


def batch(shape, seed, layout=None, dtype=torch.float64):
    x = (normal(shape, seed) * 2).to(dtype)
    return (x if layout is None else x.contiguous(memory_format=layout)).requires_grad_()


def ready(kind, limits=LIMITS, dtype=torch.float64, **options):
    """Return a layer of five channels with statistics, gamma and beta other than the initial ones."""
    layer = kind(5, renorm=limits if limits is None else bn.Renorm(*limits), **options)
    layer = layer.double() if dtype == torch.float64 else layer
    with torch.no_grad():
        layer.running_mean.copy_(torch.tensor(RUNNING_MEAN))
        layer.running_var.copy_(torch.tensor(RUNNING_VAR))
        for parameter, values in zip(layer.parameters(), ((0.5, 1.5), (-0.3, 0.4)), strict=False):
            parameter.copy_(torch.linspace(*values, 5))
    return layer


def r_and_d(x, mean, var, r_max, d_max, mask=None):
    """Return r, d, the batch's mean and deviation for x (N, C, *) and mask (N, *); Ioffe (2017), algorithm 1."""
    counts = torch.ones_like(x) if mask is None else mask.unsqueeze(1).expand_as(x).to(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    batch_mean = (x * counts).sum(dims) / counts.sum(dims)
    shape = [1, -1] + [1] * (x.dim() - 2)
    centered = (x - batch_mean.view(shape)) * counts
    deviation = torch.sqrt((centered**2).sum(dims) / counts.sum(dims) + EPS)
    running = torch.sqrt(var + EPS)
    r = (deviation / running).clamp(1 / r_max, r_max).detach()
    d = ((batch_mean - mean) / running).clamp(-d_max, d_max).detach()
    return r, d, centered / deviation.view(shape), counts


def formula(x, weight, bias, mean, var, limits, *, residual=None, mask=None, activation=None):
    r, d, x_hat, counts = r_and_d(x, mean, var, *limits, mask)
    shape = [1, -1] + [1] * (x.dim() - 2)
    z = (r.view(shape) * x_hat + d.view(shape)) * weight.view(shape) + bias.view(shape)
    return ACTIVATIONS[activation](z if residual is None else z + residual) * counts


def run(layer, x, **given):
    """Return y, then the gradients of a weighted sum of it for x, gamma, beta and the residual."""
    y = layer(x, **given)
    wanted = [x, *layer.parameters(), *([given["residual"]] if given.get("residual") is not None else [])]
    return [y, *torch.autograd.grad(y, wanted, normal(y.shape, 9).to(y.dtype))]


def expected(layer, x, chunks, *, residual=None, mask=None):
    """Return the same in float64 by the formula, chunk by chunk, with the layer's current statistics."""
    dim, samples = layer.channel_dim, x.movedim(layer.channel_dim, 1).shape[0]
    leaves = [v.detach().double().requires_grad_() for v in (x, *layer.parameters(), residual) if v is not None]
    held = layer.running_mean.double().clone(), layer.running_var.double().clone()
    limits = layer.renorm.limits(layer.num_batches_tracked)
    outputs = []
    for at in torch.arange(samples).split(chunks or samples):
        options = {
            "residual": None if residual is None else leaves[3].movedim(dim, 1)[at],
            "mask": mask if mask is None or len(mask) == 1 else mask[at],
            "activation": layer.activation,
        }
        outputs.append(formula(leaves[0].movedim(dim, 1)[at], *leaves[1:3], *held, limits, **options))
    y = torch.cat(outputs).movedim(1, dim)
    return [y, *torch.autograd.grad(y, leaves, normal(y.shape, 9).to(x.dtype).double())]


def assert_equal(found, wanted, dtype):
    """Compare within some roundings of the largest number.

    A sum of M <= 30 terms errs by up to sqrt(M) < 6 roundings; float32's scale, the mean and gamma round too. In
    bfloat16 y, and with gelu its argument, are rounded before dz is made of them: 8 again.
    """
    for one, other in zip(found, wanted, strict=True):
        limit = 16 * torch.finfo(dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=limit)


def test_the_cases_reach_every_limit_and_the_range_between_them():
    for _, shape, _, dim in CASES.values():
        r, d, *_ = r_and_d(
            batch(shape, 1).movedim(dim, 1), torch.tensor(RUNNING_MEAN), torch.tensor(RUNNING_VAR), *LIMITS
        )
        assert {(1 / LIMITS[0]), LIMITS[0]} < set(r.tolist())
        assert {-LIMITS[1], LIMITS[1]} < set(d.tolist())


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_outputs_and_gradients_are_those_of_the_formula_with_r_and_d_held(
    case, dtype, activation, with_residual, chunk
):
    kind, shape, layout, dim = case
    layer = ready(kind, dtype=dtype, activation=activation, channel_dim=dim, virtual_batch_size=chunk)
    x, residual = batch(shape, 1, layout, dtype), batch(shape, 2, layout, dtype) if with_residual else None
    wanted = expected(layer, x, chunk, residual=residual)
    assert_equal(run(layer, x, residual=residual), wanted, dtype)


@pytest.mark.parametrize("samples", ["each its own", "one for all"])
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_a_mask_counts(case, samples, chunk):
    kind, shape, layout, dim = case
    layer = ready(kind, activation="relu", channel_dim=dim, virtual_batch_size=chunk)
    x, residual = batch(shape, 1, layout), batch(shape, 2, layout)
    size = x.movedim(dim, 1)[:, 0].shape
    mask = normal((1, *size[1:]) if samples == "one for all" else size, 3) < 0.6
    mask.view(-1)[:2] = True
    mask.view(len(mask), -1)[::3, 0] = True  # something in every chunk
    wanted = expected(layer, x, chunk, residual=residual, mask=mask)
    assert_equal(run(layer, x, residual=residual, mask=mask), wanted, torch.float64)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_without_gamma_or_beta_they_are_1_and_0(options):
    layer, x = ready(bn.BatchNorm1d, **options), batch((6, 5, 3), 1)
    held = layer.running_mean.clone(), layer.running_var.clone()
    weight = torch.ones(5).double() if layer.weight is None else layer.weight
    assert_equal([layer(x)], [formula(x, weight, torch.zeros(5).double(), *held, LIMITS)], torch.float64)


@pytest.mark.parametrize("chunk", [None, 2], ids=["", "virtual"])
def test_within_wide_limits_training_computes_what_eval_does(chunk):
    layer, x = ready(bn.BatchNorm1d, (1e6, 1e6), activation="relu", virtual_batch_size=chunk), batch((6, 5, 3), 1)
    of_eval = layer.eval()(x)
    assert_equal([layer.train()(x)], [of_eval], torch.float64)


@pytest.mark.parametrize("path", [None, PassThroughMode], ids=["native", "operators"])
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_limits_of_1_and_0_are_plain_batch_normalization(case, chunk, path):
    kind, shape, layout, dim = case
    found = []
    for limits in ((1.0, 0.0), None):
        layer = ready(kind, limits, activation="relu", channel_dim=dim, virtual_batch_size=chunk)
        if path is None:
            found.append(run(layer, batch(shape, 1, layout)))
        else:
            with path():
                found.append(run(layer, batch(shape, 1, layout)))
    assert_equal(*found, torch.float64)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"unbiased": False}], ids=str)
@pytest.mark.parametrize("path", [None, PassThroughMode], ids=["native", "operators"])
def test_statistics_are_updated_as_without_renormalization(options, path):
    layer, plain = (ready(bn.BatchNorm1d, limits, **options) for limits in (LIMITS, None))
    for seed in range(3):
        for one in (layer, plain):
            if path is None:
                one(batch((6, 5, 3), seed))
            else:
                with path():
                    one(batch((6, 5, 3), seed))
    for name, value in plain.named_buffers():
        # the same float64 moments, maybe by another order of additions
        torch.testing.assert_close(layer.get_buffer(name), value, rtol=1e-14, atol=1e-14)


def test_a_batch_that_is_not_finite_updates_nothing():
    layer, x = ready(bn.BatchNorm1d), batch((6, 5), 1).detach()
    before = layer.running_mean.clone()
    x[2, 3] = torch.inf
    layer(x)
    assert torch.equal(layer.running_mean, before)
    assert (int(layer.num_batches_tracked), int(layer.skipped_batches)) == (0, 1)


def test_under_no_stat_updates_r_and_d_are_computed_and_nothing_is_updated():
    layer, x = ready(bn.BatchNorm1d), batch((6, 5), 1)
    wanted, before = expected(layer, x, None), layer.running_mean.clone()
    with bn.no_stat_updates(layer):
        assert_equal(run(layer, x), wanted, torch.float64)
    assert torch.equal(layer.running_mean, before)


def test_eval_is_the_same_without_renormalization():
    layer, plain, x = ready(bn.BatchNorm1d), ready(bn.BatchNorm1d, None), batch((6, 5), 1)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_second_derivatives_are_those_of_the_formula(chunk):
    layer, x = ready(bn.BatchNorm1d, activation="gelu", virtual_batch_size=chunk), batch((6, 5, 3), 1)
    held = layer.running_mean.clone(), layer.running_var.clone()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())
    parts = x.split(chunk or len(x))
    other = torch.cat([formula(part, weight, bias, *held, LIMITS, activation="gelu") for part in parts])

    def second(y, leaves):
        first = torch.autograd.grad(y, leaves, normal(y.shape, 9), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), leaves)

    wanted = second(other, [x, weight, bias])
    # twice as many sums as a first derivative has, of squares
    assert_equal(second(layer(x), [x, *layer.parameters()]), wanted, torch.float64)


# Limits.


def test_the_schedule_is_the_published_one():
    schedule = bn.RenormSchedule()
    published = {0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5)}
    for batches, limits in (published | {10**7: (3, 5)}).items():
        assert tuple(schedule.limits(torch.tensor(batches))) == pytest.approx(limits, rel=1e-12)


def test_the_schedules_ramps_go_up_in_a_straight_line_to_their_own_ends():
    schedule = bn.RenormSchedule(2.0, 4.0, start=10, r_end=20, d_end=30)
    r_maxs, d_maxs = zip(*(schedule.limits(torch.tensor(n)) for n in (0, 10, 11, 15, 20, 25, 30, 99)), strict=True)
    assert r_maxs == pytest.approx((1, 1, 1.1, 1.5, 2, 2, 2, 2), rel=1e-12)
    assert d_maxs == pytest.approx((0, 0, 0.2, 1, 2, 3, 4, 4), rel=1e-12)


@pytest.mark.parametrize("path", [None, PassThroughMode], ids=["native", "operators"])
def test_a_layer_uses_its_own_count_of_batches(path):
    layer = ready(bn.BatchNorm1d, None)
    layer.renorm = bn.RenormSchedule(3.0, 5.0, start=2, r_end=6, d_end=4)
    for batches in range(8):
        share_r, share_d = min(max((batches - 2) / 4, 0), 1), min(max((batches - 2) / 2, 0), 1)
        limits = 1 + 2 * share_r, 5 * share_d
        held = layer.running_mean.clone(), layer.running_var.clone()
        x = batch((6, 5), batches)
        wanted = formula(x, *layer.parameters(), *held, limits)
        if path is None:
            y = layer(x)
        else:
            with path():
                y = layer(x)
        assert_equal([y], [wanted], torch.float64)


def test_the_schedule_continues_at_a_loaded_count():
    schedule = bn.RenormSchedule(3.0, 5.0, start=0, r_end=4, d_end=4)
    trained, fresh = (bn.BatchNorm1d(5, renorm=schedule).double() for _ in range(2))
    for seed in range(2):
        trained(batch((6, 5), seed))
    fresh.load_state_dict(trained.state_dict())
    x = batch((6, 5), 7)
    held = trained.running_mean.clone(), trained.running_var.clone()
    assert_equal([fresh(x)], [formula(x, *fresh.parameters(), *held, (2.0, 2.5))], torch.float64)


@pytest.mark.parametrize(
    ("r_max", "d_max", "said"),
    [
        ("3", 1.0, "r_max must be finite and at least 1; got '3'"),
        (1.0, None, "d_max must be finite and at least 0; got None"),
        (0.99, 1.0, "r_max must be finite and at least 1; got 0.99"),
        (float("inf"), 1.0, "r_max must be finite and at least 1; got inf"),
        (float("nan"), 1.0, "r_max must be finite and at least 1; got nan"),
        (1.0, -0.1, "d_max must be finite and at least 0; got -0.1"),
        (1.0, float("inf"), "d_max must be finite and at least 0; got inf"),
        (1.0, float("nan"), "d_max must be finite and at least 0; got nan"),
    ],
)
@pytest.mark.parametrize("kind", [bn.Renorm, bn.RenormSchedule])
def test_limits_out_of_range_raise(kind, r_max, d_max, said):
    with pytest.raises(bn.InputError, match=said):
        kind(r_max, d_max)


@pytest.mark.parametrize("ends", [(-1, 5, 5), (5, 5, 9), (5, 9, 5), (6, 5, 9)], ids=str)
def test_a_schedule_that_ends_before_it_starts_raises(ends):
    start, r_end, d_end = ends
    with pytest.raises(bn.InputError, match=f"got start={start}, r_end={r_end}, d_end={d_end}"):
        bn.RenormSchedule(start=start, r_end=r_end, d_end=d_end)


@pytest.mark.parametrize("name", ["start", "r_end", "d_end"])
def test_a_schedule_with_fractional_batches_raises(name):
    given = {"start": 1, "r_end": 5, "d_end": 6} | {name: 2.5}
    with pytest.raises(bn.InputError, match=rf"{name} must be a whole number of batches; got 2\.5"):
        bn.RenormSchedule(**given)


def test_renorm_without_running_statistics_raises():
    with pytest.raises(bn.InputError, match="track_running_stats=False, which keeps none"):
        bn.BatchNorm1d(3, renorm=bn.Renorm(2.0, 1.0), track_running_stats=False)


@pytest.mark.parametrize("renorm", [True, (3.0, 5.0), "ioffe"])
def test_a_renorm_of_another_kind_raises(renorm):
    with pytest.raises(bn.InputError, match=r"renorm must be None, batchnorm\.Renorm or"):
        bn.BatchNorm1d(3, renorm=renorm)


# Operators and compiled graphs.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
def test_the_operators_give_the_same_as_the_direct_call(case, chunk, activation):
    kind, shape, layout, dim = case
    options = {"activation": activation, "channel_dim": dim, "virtual_batch_size": chunk}
    native, operators = ready(kind, **options), ready(kind, **options)
    x, residual = batch(shape, 1, layout), batch(shape, 2, layout)
    wanted = run(native, x, residual=residual)
    with PassThroughMode():
        found = run(operators, x, residual=residual)
    assert_equal(found, wanted, torch.float64)


@compiles
@pytest.mark.parametrize("chunk", [None, 3], ids=["", "virtual"])
@pytest.mark.parametrize(
    "renorm", [bn.Renorm(1.5, 0.5), bn.RenormSchedule(3.0, 5.0, start=1, r_end=8, d_end=6)], ids=["fixed", "a schedule"]
)
def test_a_compiled_layer_equals_eager_and_is_compiled_once_for_all_steps(renorm, chunk):
    torch._dynamo.reset()
    options = {"renorm": renorm, "activation": "relu", "virtual_batch_size": chunk}
    layer, eager = (bn.BatchNorm1d(5, **options).double() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(9):
        x, residual = batch((7, 5, 2), seed), batch((7, 5, 2), seed + 50)
        wanted = run(eager, x, residual=residual)
        y = compiled(x, residual)
        found = [y, *torch.autograd.grad(y, [x, *layer.parameters(), residual], normal(y.shape, 9))]
        assert_equal(found, wanted, torch.float64)
    assert counter.frame_count == 1
    for name, value in eager.named_buffers():
        # the same float64 moments by another order of additions
        torch.testing.assert_close(layer.get_buffer(name), value, rtol=1e-13, atol=1e-13)


# The study of benchmarks/renorm_agreement.py.


def test_in_the_committed_study_training_and_eval_agree_better_than_plain():
    content = benchmark_results("renorm_agreement")
    found = {arm: [row[arm]["disagreement"] for row in content["seeds"]] for arm in ("plain", "renorm")}
    assert len(found["renorm"]) >= 10
    medians = {arm: statistics.median(values) for arm, values in found.items()}
    assert medians == {arm: values["disagreement"] for arm, values in content["medians"].items()}
    assert medians["renorm"] < medians["plain"]


def test_in_a_small_study_training_and_eval_agree_better_than_plain():
    medians = benchmark_script("renorm_agreement").study(seeds=2, steps=320)["medians"]
    assert medians["renorm"]["disagreement"] < medians["plain"]["disagreement"]
