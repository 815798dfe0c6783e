"""Running statistics set to the moments of all the data: which values are measured, and when a pass ends."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from support import (
    assert_same_buffers,
    compiles,
    copied_buffers,
    mixed_network,
    norm_layers,
    randn,
)

MODES = ["layerwise", "at_once"]
KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]
# float64 moments of a few hundred numbers of size 100 or less
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def data(rows=150, columns=4, seed=0):
    return randn(rows, columns, seed=seed, dtype=torch.float64) * 3 + 1


def assert_holds(layer, values, *, unbiased=True, **tolerance):
    """The running statistics are mean and variance of values (M, C)."""
    values = values.detach().double()
    torch.testing.assert_close(layer.running_mean.double(), values.mean(0), **(tolerance or EXACT))
    torch.testing.assert_close(layer.running_var.double(), values.var(0, correction=unbiased), **(tolerance or EXACT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_small_last_batch_is_weighted_by_its_rows(kind, mode):
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(96, 3, generator=generator), torch.randn(2, 3, generator=generator) + 20])
    layer = kind(3)
    bn.recalibrate(layer, rows.split(96), mode=mode)
    # float64 moments, rounded once to float32
    assert_holds(layer, rows, rtol=1e-6, atol=0)


def test_each_layer_gets_the_moments_of_all_data_in_the_recalibrated_network():
    model, expected, x = mixed_network(), mixed_network().eval(), data()
    bn.recalibrate(model, x.split(32))
    for index in (1, 4, 7):
        values = expected[:index](x).detach()
        unbiased = getattr(expected[index], "unbiased", True)
        expected[index].running_mean.copy_(values.mean(0))
        expected[index].running_var.copy_(values.var(0, correction=unbiased))
    for found, wanted in zip(norm_layers(model), norm_layers(expected), strict=True):
        torch.testing.assert_close(found.running_mean, wanted.running_mean, **EXACT)
        torch.testing.assert_close(found.running_var, wanted.running_var, **EXACT)


def test_at_once_each_layer_gets_the_moments_of_its_inputs_in_training():
    model, x = mixed_network(dropout=0.0), data()
    seen = [[] for _ in norm_layers(model)]
    for layer, inputs in zip(norm_layers(model), seen, strict=True):
        layer.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
    twin = mixed_network(dropout=0.0).train()
    bn.recalibrate(model, x.split(32), mode="at_once")
    trained = [[] for _ in seen]
    for layer, inputs in zip(norm_layers(twin), trained, strict=True):
        layer.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].detach()))
    for batch in x.split(32):
        twin(batch)
    for layer, inputs, in_training in zip(norm_layers(model), seen, trained, strict=True):
        unbiased = getattr(layer, "unbiased", True)
        assert_holds(layer, torch.cat(in_training), unbiased=unbiased)
        torch.testing.assert_close(torch.cat(inputs), torch.cat(in_training), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mean_far_above_the_deviation_keeps_the_variance(kind):
    rows = randn(1000, 4) * 0.1 + 1000
    layer = kind(4)
    bn.recalibrate(layer, rows.split(96))
    # The moments are exact for the float32 values: only the last rounding remains, far within the 1e-3 promised.
    assert_holds(layer, rows, rtol=1e-6, atol=0)


class Bag:
    """A batch of a type that the library does not know."""

    def __init__(self, rows):
        self.rows = rows


def from_bag(model, bag):
    return model(bag.rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda x: x, {}),
        (lambda x: (x, "label"), {}),
        (lambda x: [x], {}),
        (lambda x: {"input": x}, {}),
        (Bag, {"forward": from_bag, "samples": lambda bag: len(bag.rows)}),
    ],
    ids=["tensor", "tuple", "list", "dict", "forward"],
)
def test_batches_of_any_kind_with_a_last_one_of_one_row(mode, wrap, options):
    model, expected, x = mixed_network(), mixed_network(), data(33)
    report = bn.recalibrate(model, [wrap(part) for part in x.split(16)], **options, mode=mode)
    assert report.layers[0].count == 33
    assert_holds(model[1], expected[0](x))
    bn.recalibrate(expected, x.split(16), mode=mode)
    assert_same_buffers(model, copied_buffers(expected))


def test_a_batch_that_is_no_tensor_needs_forward_and_changes_nothing():
    model = mixed_network()
    before = copied_buffers(model)
    with pytest.raises(bn.InputTypeError, match=r"got Bag.*forward="):
        bn.recalibrate(model, [data(), Bag(data())])
    assert_same_buffers(model, before)


class Twice(nn.Module):
    """One layer of normalization, used twice with a map between."""

    def __init__(self, kind):
        super().__init__()
        self.norm = kind(4).double()

    def forward(self, x):
        return self.norm(torch.tanh(self.norm(x)) * 3 + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_used_twice_pools_both_uses(kind, mode):
    model, x = Twice(kind), data()
    report = bn.recalibrate(model, x.split(64), mode=mode)
    normalize = nn.functional.batch_norm
    both = [x, *(torch.tanh(normalize(part, None, None, training=True)) * 3 + 1 for part in x.split(64))]
    assert_holds(model.norm, torch.cat(both))
    assert report.layers[0].count == 2 * len(x)


def test_frozen_layers_are_left_alone():
    model, x = mixed_network(), data()
    model.train()
    bn.freeze(model[1])
    model[4].eval()
    before = copied_buffers(model)
    report = bn.recalibrate(model, x.split(32))
    assert [layer.path for layer in report.layers] == ["7"]
    after = copied_buffers(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "7.running_mean",
        "7.running_var",
    }
    assert not model[4].training


def test_torchs_layers_of_a_model_in_eval_mode_are_not_frozen():
    model = mixed_network().eval()
    assert len(bn.recalibrate(model, data().split(32)).layers) == 3


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (nn.Linear(4, 4), "Linear has none"),
        (bn.freeze(bn.BatchNorm1d(4)), "frozen"),
        (bn.LazyBatchNorm1d(), "lazy"),
    ],
    ids=["none", "frozen", "lazy"],
)
def test_a_model_without_a_layer_to_recalibrate_is_refused(model, rule):
    with pytest.raises(bn.InputError, match=rule):
        bn.recalibrate(model, [torch.randn(8, 4)])


@pytest.mark.parametrize(
    "options", [{"mode": "both"}, {"max_samples": 0}, {"tolerance": 0.0}, {"tolerance": 1.5}], ids=str
)
def test_an_option_out_of_its_range_is_refused_by_name(options):
    with pytest.raises(bn.InputError, match=f"{next(iter(options))} must be"):
        bn.recalibrate(mixed_network(), [data()], **options)


def test_an_iterator_serves_a_single_pass():
    model, x = mixed_network(), data()
    before = copied_buffers(model)
    with pytest.raises(bn.InputError, match="in 3 passes over the loader; got tuple_iterator"):
        bn.recalibrate(model, iter(x.split(32)))
    assert_same_buffers(model, before)
    assert bn.recalibrate(model, iter(x.split(32)), mode="at_once").samples == len(x)
    assert bn.recalibrate(model[1], iter(data(columns=6).split(32))).samples == len(x)
    twice = Twice(bn.BatchNorm1d)
    before = copied_buffers(twice)
    with pytest.raises(bn.InputError, match="in 2 passes"):
        bn.recalibrate(twice, iter(x.split(32)))
    assert_same_buffers(twice, before)


def test_a_shuffling_loader_leaves_torchs_generator_as_it_was():
    loader = DataLoader(TensorDataset(data(), torch.zeros(150)), batch_size=32, shuffle=True)
    model = mixed_network()
    before = torch.get_rng_state()
    bn.recalibrate(model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    # the order differs from pass to pass, the rows don't
    assert_holds(model[1], mixed_network()[0](data()))


# What is measured


def test_only_values_that_a_mask_counts_are_measured():
    x, mask = torch.randn(20, 7, 3, dtype=torch.float64), torch.arange(140).view(20, 7) % 4 != 0
    layer = bn.BatchNorm1d(3, channel_dim=-1).double()
    batches = [{"input": x[:12], "mask": mask[:12]}, {"input": x[12:], "mask": mask[12:]}]
    assert bn.recalibrate(layer, batches).layers[0].count == 105
    assert_holds(layer, x[mask])


def test_only_the_active_domain_is_recalibrated():
    layer, x = bn.add_domains(bn.BatchNorm1d(4).double(), ["real", "drawn"]), data()
    before = copied_buffers(layer)
    with bn.use_domain(layer, "drawn"):
        bn.recalibrate(layer, x.split(32))
    after = copied_buffers(layer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean_drawn", "running_var_drawn"}
    torch.testing.assert_close(layer.running_mean_drawn, x.mean(0), **EXACT)


def test_a_layer_that_no_batch_reaches_stays_as_it_is():
    model = nn.ModuleDict({"used": bn.BatchNorm1d(4), "unused": bn.BatchNorm1d(4)}).double()
    report = bn.recalibrate(model, [data()], forward=lambda model, x: model["used"](x))
    assert [layer.path for layer in report.layers] == ["used"]
    assert model["unused"].running_mean.tolist() == [0] * 4


@compiles
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "a part"])
def test_a_compiled_model_is_measured_and_its_statistics_are_used(inner):
    model, expected, x = mixed_network(0.0), mixed_network(0.0), data()
    compiled = torch.compile(model, backend="eager")
    if inner:
        model[1:5].compile(backend="eager")
        compiled = nn.Sequential(model[0], torch.compile(model[1:5], backend="eager"), model[5:])
    with torch.no_grad():
        compiled(x), expected(x)
    for each in (compiled, expected):
        bn.recalibrate(each, x.split(32))
    assert_same_buffers(model, copied_buffers(expected))
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), expected.eval()(x), **EXACT)


class Million:
    """A million rows, made as they are read; says how many batches anyone still holds."""

    def __init__(self):
        self.most = 0

    def __iter__(self):
        generator, made = torch.Generator().manual_seed(0), []
        for _ in range(100):
            batch = torch.randn(10_000, 2, generator=generator)
            made.append(weakref.ref(batch))
            self.most = max(self.most, sum(each() is not None for each in made))
            yield batch
            del batch


@pytest.mark.parametrize("mode", MODES)
def test_a_million_rows_are_read_in_the_memory_of_two_batches(mode):
    model = nn.Sequential(bn.BatchNorm1d(2), nn.Linear(2, 2), bn.BatchNorm1d(2))
    rows = Million()
    report = bn.recalibrate(model, rows, mode=mode)
    assert report.samples == report.layers[0].count == 1_000_000
    assert rows.most <= 2
    # a standard error of 1e-3 of N(0, 1), 5 of them
    assert model[0].running_mean.abs().max() < 5e-3


# The end of a pass, and the report


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_ends_after_max_samples(mode):
    x = data()
    model = mixed_network()
    report = bn.recalibrate(model, x.split(20), max_samples=50, mode=mode)
    assert report.samples == report.layers[-1].count == 60
    assert_holds(model[1], mixed_network()[0](x[:60]))


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_ends_when_the_standard_errors_are_within_the_tolerance(mode):
    read = []

    class Loader:
        def __iter__(self):
            for part in data(20_000, seed=1).split(20):
                read.append(len(part))
                yield part

    report = bn.recalibrate(mixed_network(), Loader(), tolerance=0.05, mode=mode)
    assert report.converged
    # A standard error of 1/20 of the deviation takes 400 rows of one channel; the worst of 14 a few times that.
    assert 200 < report.samples < 4000
    assert sum(read) < 4000 * report.passes


def test_a_loader_too_short_for_the_tolerance_is_read_to_its_end():
    report = bn.recalibrate(mixed_network(), data().split(30), tolerance=0.001)
    assert report.converged is False
    assert report.samples == 150
    assert bn.recalibrate(mixed_network(), data().split(30)).converged is None


def test_the_report_gives_the_drift_of_each_layer_in_the_order_of_use():
    model, x = mixed_network(), data()
    report = bn.recalibrate(model, x.split(32))
    assert [layer.path for layer in report.layers] == ["1", "4", "7"]
    assert {layer.count for layer in report.layers} == {150}
    assert report.passes == 3
    values = mixed_network()[0](x).detach()
    mean, var = values.mean(0), values.var(0) + 1e-5
    own = 1 + 1e-5
    before = ((var / own + own / var - 2 + mean**2 * (1 / var + 1 / own)) / 2).mean()
    assert report.layers[0].before == pytest.approx(before.item(), rel=1e-9)
    # the statistics are what was measured, to a rounding of 1e-16 in terms of size 1
    assert max(abs(layer.after) for layer in report.layers) < 1e-14
    again = bn.recalibrate(model, x.split(32))
    assert max(abs(layer.before) for layer in again.layers) < 1e-14
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "values", "drift", "before", "drift", "after"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "4", "7"]
    assert lines[-1] == "150 samples, 3 passes"


class Branches(nn.Module):
    """A batch takes one of two layers, and then a third."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (bn.BatchNorm1d(4).double() for _ in range(3))

    def forward(self, x, kind):
        return self.c(torch.tanh((self.a if kind == "a" else self.b)(x)))


def test_a_layer_is_measured_after_all_that_feed_it_in_any_batch():
    model, of_a, of_b = Branches(), data(seed=1), data(seed=2) * 4 + 7
    report = bn.recalibrate(model, [{"x": of_a, "kind": "a"}, {"x": of_b, "kind": "b"}])
    assert [layer.path for layer in report.layers] == ["a", "b", "c"]
    model.eval()
    assert_holds(model.c, torch.cat([torch.tanh(model.a(of_a)), torch.tanh(model.b(of_b))]))


def test_layers_in_contradictory_orders_are_measured_in_the_order_of_first_use():
    model = nn.ModuleDict({"a": bn.BatchNorm1d(4), "b": bn.BatchNorm1d(4)}).double()

    def forward(model, batch):
        for name in batch["order"]:
            model[name](batch["x"])

    report = bn.recalibrate(model, [{"x": data(), "order": "ba"}, {"x": data(), "order": "ab"}], forward=forward)
    assert [layer.path for layer in report.layers] == ["b", "a"]


def test_tolerance_waits_for_the_variance_too():
    """All batches have means of 0, and variances that differ."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randn(32, 4, generator=generator) * 10 ** torch.rand(1, generator=generator) for _ in range(400)]
    batches = [torch.cat([half, -half]) for half in halves]
    layer = bn.BatchNorm1d(4)
    report = bn.recalibrate(layer, batches, tolerance=0.1)
    assert report.converged
    assert 64 * 80 < report.samples < 64 * 400
    true = torch.cat(batches).var(0)
    assert ((layer.running_var - true).abs() < 4 * 0.1 * true).all()  # four standard errors


def test_a_domain_may_not_change_within_forward():
    layer = bn.add_domains(bn.BatchNorm1d(4), ["real"])
    before = copied_buffers(layer)

    def forward(model, batch):
        with bn.use_domain(model, "real"):
            model(batch)

    with pytest.raises(bn.UnsupportedError, match="must keep its domain during the forward; enter"):
        bn.recalibrate(layer, [data().float()], forward=forward)
    assert_same_buffers(layer, before)
    with bn.use_domain(layer, "real"):
        bn.recalibrate(layer, [data().float()])
    assert torch.equal(layer.running_mean, before["running_mean"])
    torch.testing.assert_close(layer.running_mean_real, data().mean(0).float())


def test_at_once_normalizes_a_batch_with_a_mean_that_float32_cannot_hold():
    """The second layer sees what the first one's own moments give, at a mean of 1e5 standard deviations."""
    x = randn(64, 3, dtype=torch.float64)
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    shifted = (x + 1e5).float()
    bn.recalibrate(model, [shifted], mode="at_once")
    seen = shifted.double()
    seen = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-5).sqrt()
    # y is within 1e-5 of the oracle, so its mean is
    torch.testing.assert_close(model[1].running_mean.double(), seen.mean(0), rtol=0, atol=1e-5)
    assert_holds(model[1], seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("option", "value"), [("max_samples", 2.5), ("max_samples", "3"), ("tolerance", "x")])
def test_a_limit_that_is_no_number_is_refused(option, value):
    with pytest.raises(bn.InputError, match=f"{option} must be None or"):
        bn.recalibrate(bn.BatchNorm1d(4), [data().float()], **{option: value})
