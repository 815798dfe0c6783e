"""Test for a shift by a model's stored statistics: distances, p-values, errors."""

import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics.batches import BatchReader
from batchnorm.statistics.block_sums import MAX_BLOCKS, sum_inputs
from batchnorm.statistics.layers import running_layers
from support import randn

KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]


def random(*shape, seed=0):
    return randn(*shape, seed=seed, dtype=torch.float64)


def standard(channels=5, kind=bn.BatchNorm1d):
    """A layer whose stored statistics are exactly those of standard normal numbers."""
    return kind(channels).double().eval()


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    )
    images = torch.rand(600, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    bn.recalibrate(model, images[:300].split(100))
    return model.eval(), images[300:]


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_the_normal_distributions(kind):
    layer, x = standard(3, kind), random(50, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, -2.0])
    layer.running_mean.copy_(torch.tensor([0.5, 0.0, 0.0]))
    layer.running_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    (found,) = bn.detect_shift(layer, x.split(20)).layers
    mean, var, eps = x.mean(0), x.var(0, correction=0), layer.eps
    kl = [
        torch.distributions.kl_divergence(torch.distributions.Normal(*one), torch.distributions.Normal(*other))
        for one, other in (
            ((mean, (var + eps).sqrt()), (layer.running_mean, (layer.running_var + eps).sqrt())),
            ((layer.running_mean, (layer.running_var + eps).sqrt()), (mean, (var + eps).sqrt())),
        )
    ]
    assert found.kl == pytest.approx(sum(kl).mean().item(), rel=1e-9)
    away = ((mean - layer.running_mean) ** 2 + (var.sqrt() - layer.running_var.sqrt()) ** 2).sqrt()
    assert found.wasserstein == pytest.approx((away / (layer.running_var + eps).sqrt()).mean().item(), rel=1e-9)
    assert found.effective_samples == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("amount", [0.5, -0.5])
def test_a_shifted_mean_is_reported(amount):
    assert bn.detect_shift(standard(), [random(64, 5) + amount]).shifted


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_changed_variance_about_the_same_mean_is_reported(factor):
    assert bn.detect_shift(standard(), [random(64, 5) * factor], reference_samples=10_000).shifted


@pytest.mark.parametrize("samples", [8, 64])
@pytest.mark.parametrize("clean", [False, True])
def test_at_alpha_of_a_twentieth_at_most_that_share_of_clean_draws_is_reported(samples, clean):
    # 200 draws: an exact test exceeds 9.5% (19 of 200) once in 300 times. The seeds are fixed, so it passes or not.
    model, draws = standard(), random(200, samples, 5, seed=1)
    reference = [random(500, 5, seed=2)] if clean else None
    reports = [bn.detect_shift(model, [x], reference=reference, reference_samples=10**9) for x in draws]
    assert sum(report.shifted for report in reports) <= 19
    # and it is no test that never reports: p-values reach over the whole range
    assert min(report.p_value for report in reports) < 0.2
    assert max(report.p_value for report in reports) > 0.8


def test_pixels_count_by_what_they_add_to_the_error_and_not_as_samples():
    layer = bn.BatchNorm2d(3).double().eval()
    same = random(64, 3, 1, 1).expand(64, 3, 7, 7)  # 49 equal pixels tell what one does
    (found,) = bn.detect_shift(layer, [same]).layers
    assert found.effective_samples == pytest.approx(64, rel=0.1)
    (found,) = bn.detect_shift(layer, [random(64, 3, 7, 7)]).layers
    assert found.effective_samples == pytest.approx(64 * 49, rel=0.4)
    reports = [
        bn.detect_shift(layer, [random(32, 3, 1, 1, seed=seed).expand(32, 3, 7, 7)], reference_samples=10**9)
        for seed in range(50)
    ]
    assert sum(report.shifted for report in reports) <= 7  # 7 of 50: once in 250 times


def test_differences_within_the_error_of_the_reference_samples_raise_no_alarm():
    layer, x = standard(), random(2000, 5) + 0.1
    assert bn.detect_shift(layer, [x], reference_samples=100_000).shifted
    assert not bn.detect_shift(layer, [x], reference_samples=50).shifted


def test_with_reference_data_the_stored_statistics_do_not_matter():
    layer = standard()
    layer.running_mean.fill_(3)  # stale
    x = random(128, 5)
    assert bn.detect_shift(layer, [x]).shifted
    report = bn.detect_shift(layer, [x], reference=[random(400, 5, seed=1)])
    assert not report.shifted
    assert (report.against, report.reference_samples) == ("reference", 400)
    assert bn.detect_shift(layer, [x + 1], reference=[random(400, 5, seed=1)]).shifted


def test_a_layers_p_value_is_adjusted_for_their_number():
    """The same inputs in 20 layers have p-values of their own; the smallest, adjusted, is seldom below alpha."""
    model = nn.ModuleList([standard(2) for _ in range(20)])

    def forward(layers, x):
        for layer, part in zip(layers, x.split(2, dim=1), strict=True):
            layer(part)

    draws = random(60, 64, 40)
    least = [
        min(one.p_value for one in bn.detect_shift(model, [x], forward=forward, reference_samples=10**9).layers)
        for x in draws
    ]
    assert sum(p <= 0.05 for p in least) <= 8  # 8 of 60: once in 150 times; unadjusted it would be 38
    one = draws[0].clone()
    one[:, 10] += 1
    report = bn.detect_shift(model, [one], forward=forward)
    assert [layer.path for layer in report.layers if layer.p_value <= 0.05] == ["5"]


def test_memory_is_bounded_and_all_rows_count():
    model, x = standard(), random(5000, 5)
    found = sum_inputs(BatchReader(model), running_layers(model), x.split(300), name="the loader")
    units = found.layers[""]
    assert len(units.counts) <= MAX_BLOCKS
    assert (found.samples, units.counts.tolist()) == (5000, [16.0] * 312 + [8.0])
    torch.testing.assert_close(units.mean()[:5], x.mean(0) / math.sqrt(1 + 1e-5), rtol=1e-9, atol=1e-12)
    # the squared error of a mean of 5,000 numbers, from 313 units: known to 8%, over 5 channels to 4%
    assert units.squared_error().mean().item() == pytest.approx(1 / 5000, rel=0.15)


def test_the_size_of_batches_does_not_matter():
    model, images = convolutional()
    whole, parts = (bn.detect_shift(model, images[:100].split(size)) for size in (100, 7))
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)  # float32 convolutions of other sizes
        assert one.p_value == pytest.approx(other.p_value, abs=0.01)


def test_padding_does_not_matter_and_sequences_count_by_their_length():
    layer = bn.BatchNorm1d(3, channel_dim=-1).double().eval()
    lengths = torch.randint(1, 8, (40,), generator=torch.Generator().manual_seed(0))
    mask, x = bn.lengths_to_mask(lengths, 7), random(40, 7, 3) + 0.3

    def forward(model, batch):
        model(batch, mask=mask)

    found = [
        bn.detect_shift(layer, [torch.where(mask.unsqueeze(2), x, pad)], forward=forward) for pad in (0.0, math.nan)
    ]
    assert found[0] == found[1]
    kept = x[mask]
    expected = (kept.mean(0).square() + (kept.std(0, correction=0) - 1) ** 2).sqrt().mean()
    assert found[0].layers[0].wasserstein == pytest.approx(expected.item(), rel=1e-4)  # eps


def test_a_layer_used_twice_and_rows_made_of_samples_stay_with_their_sample():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = standard(4)

        def forward(self, x):  # (N, 3, 4)
            self.norm(x.reshape(-1, 4))
            return self.norm(x[:, 0])

    model = Model().eval()
    x = random(30, 1, 4).expand(30, 3, 4)  # a sample's four rows are the same
    found = sum_inputs(BatchReader(model), running_layers(model), [x[:20], x[20:]], name="the loader").layers["norm"]
    assert found.counts.tolist() == [4.0] * 30
    torch.testing.assert_close(found.sums[:, :4], 4 * x[:, 0] / math.sqrt(1 + 1e-5), rtol=1e-9, atol=1e-12)


def test_the_model_is_left_unchanged():
    model, images = convolutional()
    model.train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    state = torch.get_rng_state()
    bn.detect_shift(model, images.split(50), reference=images.split(50))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_max_samples_ends_the_pass():
    seen = []

    def batches():
        for _ in range(10):
            seen.append(1)
            yield random(20, 5)

    assert bn.detect_shift(standard(), batches(), max_samples=50).samples == 60
    assert len(seen) == 3


def test_the_same_seed_gives_the_same_p_values():
    x = random(32, 5) + 0.15
    one, same, other = (bn.detect_shift(standard(), [x], seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.p_value != other.p_value
    assert one.p_value == pytest.approx(other.p_value, abs=0.1)


def test_the_report_prints_as_a_table_that_ends_in_the_verdict():
    model, images = convolutional()
    lines = str(bn.detect_shift(model, images.split(100))).splitlines()
    assert lines[0].split() == ["layer", "KL", "Wasserstein", "effective", "p"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "3"]
    assert lines[3].startswith("no shift shown: 300 samples against the stored statistics, p 0.")
    text = str(bn.detect_shift(model, (images + 1).split(100), reference=images.split(100)))
    assert text.endswith("shifted: 300 samples against 300 reference samples, p at most 0.001")


def test_a_channel_that_is_still_constant_does_not_count():
    layer = standard(2)
    layer.running_mean.copy_(torch.tensor([7.0, 0.0]))
    layer.running_var.copy_(torch.tensor([0.0, 1.0]))
    x = random(64, 2)
    x[:, 0] = 7.0
    report = bn.detect_shift(layer, [x])
    assert not report.shifted
    assert report.layers[0].kl < 0.1
    same = bn.detect_shift(layer, [torch.tensor([[7.0, 0.0]]).expand(64, 2)])
    assert math.isfinite(same.layers[0].effective_samples)
    assert math.isfinite(same.p_value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0}, "alpha must be between 0 and 1; got 0"),
        ({"reference_samples": 0}, "reference_samples must be at least 1; got 0"),
        ({"max_samples": -1}, "max_samples must be at least 1; got -1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options, message):
    with pytest.raises(bn.InputError, match=message):
        bn.detect_shift(standard(), [random(64, 5)], **options)


def test_too_few_samples_are_refused():
    with pytest.raises(bn.InputError, match=r"the loader must bring at least 8 samples to the layers.*; got 7"):
        bn.detect_shift(standard(), [random(7, 5)])
    with pytest.raises(bn.InputError, match=r"the reference must bring at least 8 samples.*; got 0"):
        bn.detect_shift(standard(), [random(8, 5)], reference=[])


def test_inputs_that_are_not_finite_are_refused_by_the_name_of_their_layer():
    model, images = convolutional()
    images[3] = math.nan
    with pytest.raises(bn.InputError, match="the inputs of 1 must be finite"):
        bn.detect_shift(model, images.split(100))


def test_a_model_without_statistics_is_refused():
    with pytest.raises(bn.InputError, match="must have batch normalization layers with running statistics"):
        bn.detect_shift(nn.Linear(2, 2), [random(8, 2)])
