"""Running statistics moved towards those of shifted data, weighted by samples and prior, and restored."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import assert_same_buffers, compiles, copied_buffers, norm_layers, randn

KINDS = [bn.BatchNorm1d, nn.BatchNorm1d]
# what float64 rounds of numbers of size 100
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def rows(count=40, columns=4, seed=0):
    return randn(count, columns, seed=seed, dtype=torch.float64) * 3 + 5


def network():
    """Layers of ours and torch's, with statistics that no data gave them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), bn.BatchNorm1d(6, activation="relu"), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
    ).double()
    for layer in norm_layers(model):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model


def between(stored, new, samples, prior):
    """Schneider et al. (2020), section 2."""
    return prior / (prior + samples) * stored + samples / (prior + samples) * new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", [0, 16, 3.5, 1000])
def test_stored_and_new_statistics_are_weighted_by_prior_and_samples(kind, prior):
    layer, x = kind(4).double(), rows()
    layer.running_mean.copy_(torch.arange(4.0))
    layer.running_var.copy_(torch.arange(4.0) + 1)
    before = copied_buffers(layer)
    report = bn.adapt(layer, x.split(16), prior=prior)
    torch.testing.assert_close(layer.running_mean, between(before["running_mean"], x.mean(0), 40, prior), **EXACT)
    torch.testing.assert_close(layer.running_var, between(before["running_var"], x.var(0), 40, prior), **EXACT)
    assert (report.samples, report.prior, layer.num_batches_tracked) == (40, prior, 0)


def test_images_count_as_samples_whatever_their_size():
    layer = bn.BatchNorm2d(2).double()
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64) + 10
    bn.adapt(layer, [x], prior=8)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)) / 2, **EXACT)


def test_a_later_layer_is_adapted_to_the_outputs_of_adapted_layers():
    model, x = network(), rows()
    expected = network().eval()
    for index in (1, 3):
        layer, seen = expected[index], expected[:index](x).detach()
        layer.running_mean.copy_(between(layer.running_mean, seen.mean(0), 40, 16))
        layer.running_var.copy_(between(layer.running_var, seen.var(0), 40, 16))
    bn.adapt(model, x.split(7))
    for index in (1, 3):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(model[index], name), getattr(expected[index], name), **EXACT)


def test_undo_restores_the_bits_and_does_so_once():
    model = network().train()
    before, modes = copied_buffers(model), [module.training for module in model.modules()]
    report = bn.adapt(model, [rows()])
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_same_buffers(model, before)
    assert [module.training for module in model.modules()] == modes
    report.undo()
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_same_buffers(model, before)
    bn.recalibrate(model, [rows(seed=1)])
    recalibrated = copied_buffers(model)
    report.undo()
    assert_same_buffers(model, recalibrated)


def test_as_a_context_it_is_undone_at_the_end_and_after_an_error():
    model = network()
    before = copied_buffers(model)
    with pytest.raises(KeyError), bn.adapt(model, [rows()]):
        raise KeyError
    assert_same_buffers(model, before)


def test_undo_restores_the_domain_that_was_active():
    layer = bn.add_domains(bn.BatchNorm1d(4).double(), ["drawn"])
    before = copied_buffers(layer)
    with bn.use_domain(layer, "drawn"):
        report = bn.adapt(layer, [rows()])
        assert not torch.equal(layer.running_mean, before["running_mean_drawn"])
    assert torch.equal(layer.running_mean, before["running_mean"])
    report.undo()
    with bn.use_domain(layer, "drawn"):
        assert torch.equal(layer.running_mean, before["running_mean_drawn"])
    assert_same_buffers(layer, before)


def test_the_report_gives_the_drift_of_each_layer():
    report = bn.adapt(network(), [rows()], prior=0)
    assert [layer.path for layer in report.layers] == ["1", "3"]
    assert all(layer.before > 0.1 > 1e-9 > layer.after for layer in report.layers)
    assert str(report).splitlines()[-1] == "40 samples count 100%, with a prior of 0"


def test_frozen_layers_are_left_alone():
    model = network()
    model[1].freeze()
    before = copied_buffers(model)
    assert [layer.path for layer in bn.adapt(model, [rows()]).layers] == ["3"]
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def test_an_error_in_the_loader_changes_nothing():
    model, x = network().train(), rows()
    before = copied_buffers(model)

    class Breaks:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield x
            if self.passes == 2:
                raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        bn.adapt(model, Breaks())
    assert_same_buffers(model, before)
    assert model.training


# Each batch by itself


@pytest.mark.parametrize("kind", KINDS)
def test_each_batch_is_normalized_with_the_mean_of_its_and_the_stored_statistics(kind):
    layer = kind(4).double().eval()
    layer.running_mean.copy_(torch.arange(4.0))
    before = copied_buffers(layer)
    with bn.adapt(layer, prior=16):
        for count in (1, 2, 30):
            x = rows(count, seed=count)
            var = x.var(0) if count > 1 else torch.zeros(4, dtype=torch.float64)
            mean, var = between(before["running_mean"], x.mean(0), count, 16), between(1.0, var, count, 16)
            torch.testing.assert_close(layer(x), (x - mean) / (var + layer.eps).sqrt(), rtol=1e-10, atol=1e-10)
            assert_same_buffers(layer, before)
    x = rows()
    torch.testing.assert_close(layer(x), (x - before["running_mean"]) / (1 + layer.eps) ** 0.5, **EXACT)


def test_one_batch_and_a_loader_of_that_batch_give_the_same_outputs():
    model, x = network().eval(), rows()
    with bn.adapt(model, [x]):
        expected = model(x)
    with bn.adapt(model):
        torch.testing.assert_close(model(x), expected, **EXACT)


@pytest.mark.parametrize("loader", [None, [rows()]], ids=["each batch", "a loader"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_normalizes_by_the_batch_and_leaves_the_stored_statistics(kind, loader):
    layer, other = kind(4).double(), kind(4).double()
    before = copied_buffers(layer)
    with bn.adapt(layer, loader):
        assert torch.equal(layer(rows()), other(rows()))
    assert_same_buffers(layer, before)


def test_a_mask_leaves_padding_out_of_what_is_adapted_to():
    layer = bn.BatchNorm1d(4).double().eval()
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    mask = bn.lengths_to_mask(torch.tensor([5, 3, 2, 5, 1, 4]))
    padded = torch.where(mask.unsqueeze(1), x, torch.nan)
    flat = x.movedim(1, 2)[mask]
    with bn.adapt(layer, prior=2):
        y = layer(padded, mask=mask)
    mean, var = between(0.0, flat.mean(0), 6, 2), between(1.0, flat.var(0), 6, 2)
    expected = (flat - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(y.movedim(1, 2)[mask], expected, **EXACT)


def test_a_batch_with_nan_or_without_samples_uses_the_stored_statistics():
    layer = bn.BatchNorm1d(2).eval()
    x = torch.tensor([[1.0, 2.0], [torch.nan, 5.0]])
    with bn.adapt(layer):
        assert torch.equal(layer(x)[0], bn.BatchNorm1d(2).eval()(x)[0])
        assert layer(torch.empty(0, 2)).shape == (0, 2)


def test_the_stored_statistics_come_back_after_an_error_in_the_layer():
    layer = bn.BatchNorm1d(4).double().eval()
    before = copied_buffers(layer)
    with bn.adapt(layer), pytest.raises(ValueError, match="residual"):
        layer(rows(), residual=rows(3))
    assert_same_buffers(layer, before)


def test_no_hook_and_no_class_stays_behind():
    model = network()
    classes = [type(module) for module in model.modules()]
    with bn.adapt(model):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [type(module) for module in model.modules()] == classes


@compiles
def test_a_compiled_model_is_adapted_too():
    model, x = network().eval(), rows()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(x)
    with bn.adapt(compiled):
        adapted = compiled(x)
    with bn.adapt(model):
        torch.testing.assert_close(adapted, model(x), **EXACT)
    assert torch.equal(compiled(x), expected)


# Adaptations that outlast what they were made for


@pytest.mark.parametrize("loader", [None, [rows()]], ids=["each batch", "a loader"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_that_is_run_twice_leaves_nothing_in_force_after_undo(kind, loader):
    layer, x = kind(4).double().eval(), rows()
    expected = layer(x)
    for _ in range(2):
        adaptation = bn.adapt(layer, loader)
    adapted = layer(x)
    with bn.adapt(layer, [rows() + 9]):
        assert not torch.equal(layer(x), adapted)
    assert torch.equal(layer(x), adapted)
    adaptation.undo()
    assert torch.equal(layer(x), expected)


def test_an_adaptation_of_another_domain_stays_when_its_handle_is_gone():
    layer, x = bn.add_domains(bn.BatchNorm1d(4).double(), ["a", "b"]).eval(), rows()
    for domain in ("a", "b"):
        with bn.use_domain(layer, domain):
            adaptation = bn.adapt(layer, [x])
    with bn.use_domain(layer, "a"):
        assert not torch.equal(layer.running_mean, layer.running_mean_a)
    adaptation.undo()


def test_training_in_a_domain_updates_it_while_another_is_adapted():
    layer = bn.add_domains(bn.BatchNorm1d(4).double(), ["a", "b"])
    with bn.use_domain(layer, "a"):
        adaptation = bn.adapt(layer, [rows()])
        layer(rows())
    with bn.use_domain(layer, "b"):
        layer(rows())
    assert [int(layer._buffers[f"num_batches_tracked_{domain}"]) for domain in "ab"] == [0, 1]
    adaptation.undo()


def test_keep_leaves_layers_frozen_since_with_a_warning():
    model = network()
    adaptation = bn.adapt(model, [rows()])
    before, adapted = copied_buffers(model), model[3].running_mean.clone()
    bn.freeze(model[1])
    with pytest.warns(UserWarning, match="keep.. leaves frozen running statistics as they are"):
        adaptation.keep()
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert torch.equal(model[3].running_mean, adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_moved_while_adapted_runs_there(kind):
    layer = kind(4).double().eval()
    adaptation = bn.adapt(layer, [rows()])
    layer.to("meta")
    assert layer.running_mean.device.type == "meta"
    assert layer(rows().to("meta")).device.type == "meta"
    adaptation.undo()


@pytest.mark.parametrize("loader", [None, [rows()]], ids=["each batch", "a loader"])
def test_a_handle_that_is_kept_after_undo_keeps_no_settings(loader):
    model = network()
    adaptation = bn.adapt(model, loader)
    adaptation.undo()
    assert adaptation._context.settings == {}


# What is refused


@pytest.mark.parametrize("prior", [-1, float("nan"), float("inf"), "16"])
def test_a_prior_must_be_a_number_of_samples(prior):
    with pytest.raises(bn.InputError, match="prior must be a finite number of samples, at least 0; got"):
        bn.adapt(network(), [rows()], prior=prior)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], bn.InputError, "at least one sample"),
        (iter([rows()]), bn.InputError, "in 2 passes over the loader"),
        ([object()], bn.InputTypeError, "pass forward="),
    ],
)
def test_a_loader_that_cannot_be_used_changes_nothing(loader, error, message):
    model = network()
    before = copied_buffers(model)
    with pytest.raises(error, match=message):
        bn.adapt(model, loader)
    assert_same_buffers(model, before)


def test_a_single_value_needs_a_prior():
    layer = bn.BatchNorm1d(4).double().eval()
    with pytest.raises(bn.InputError, match="at least 2 values per channel if prior is 0; got 1"):
        bn.adapt(layer, [rows(1)], prior=0)
    with bn.adapt(layer, prior=0), pytest.raises(bn.InputError, match="at least 2 values"):
        layer(rows(1))


def test_forward_goes_with_a_loader():
    with pytest.raises(bn.InputError, match="forward, device, samples and group need a loader"):
        bn.adapt(network(), forward=lambda model, batch: model(batch))


def test_ranks_adapt_to_the_samples_of_all(on_ranks):
    code = """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64) + 3
    shares = {1: [x], 2: [x[:20], x[20:]], 3: [x[:20], x[20:20], x[20:]]}[world]
    torch.manual_seed(0)
    model = nn.Sequential(bn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    report = bn.adapt(model, [shares[rank]] if len(shares[rank]) else [])
    result = {"samples": report.samples, "buffers": [values.tolist() for _, values in model.named_buffers()]}
    """
    (alone,) = on_ranks(code, 1)
    for world in (2, 3):
        for rank in on_ranks(code, world):
            assert rank["samples"] == 24
            for found, expected in zip(rank["buffers"], alone["buffers"], strict=True):
                assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
