"""Separate running statistics for each domain."""

import copy
import io

import pytest
import torch
from torch import nn

import batchnorm as bn

NAMES = ["real", "drawn"]
KINDS = ("running_mean", "running_var", "num_batches_tracked")


def network(names=NAMES):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), bn.BatchNorm1d(3)))
    return bn.add_domains(model, names) if names else model


def batch(mean, seed=0):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) * mean + mean


def statistics(layer, domain=None):
    return [getattr(layer, kind if domain is None else f"{kind}_{domain}").clone() for kind in KINDS]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_model_given_is_returned_and_gamma_and_beta_are_shared():
    model = network([])
    assert bn.add_domains(model, NAMES) is model
    assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias"]


def test_a_batch_in_a_domain_moves_its_statistics_and_no_others():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    before, of_real = statistics(layer), statistics(layer, "real")
    x = batch(5.0)
    with bn.use_domain(layer, "drawn"):
        layer(x)
    assert equal(before, statistics(layer))
    assert equal(of_real, statistics(layer, "real"))
    # Float32 keeps 7 digits.
    torch.testing.assert_close(layer.running_mean_drawn, 0.1 * x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var_drawn, 0.9 + 0.1 * x.var(0), rtol=1e-6, atol=1e-6)
    assert int(layer.num_batches_tracked_drawn) == 1


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_interleaved_domains_learn_as_layers_of_their_own(momentum):
    layer = bn.add_domains(bn.BatchNorm1d(3, momentum=momentum), NAMES)
    own = {name: nn.BatchNorm1d(3, momentum=momentum) for name in NAMES}
    for seed in range(6):
        for name in NAMES[: 1 + seed % 2]:
            x = batch(2.0 if name == "real" else -7.0, seed)
            with bn.use_domain(layer, name):
                layer(x)
            own[name](x)
    for name in NAMES:
        for one, other in zip(statistics(layer, name), own[name].buffers(), strict=True):
            # Both keep float32: a few roundings of 6e-8, relative.
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_without_a_domain_the_layers_own_statistics_move():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    before = statistics(layer, "real")
    layer(batch(5.0))
    assert int(layer.num_batches_tracked) == 1
    assert equal(before, statistics(layer, "real"))


def test_eval_in_a_domain_is_the_formula_with_its_statistics():
    layer, x = bn.add_domains(bn.BatchNorm1d(3), NAMES), batch(3.0)
    with bn.use_domain(layer, "drawn"):
        layer(batch(5.0))
        y = layer.eval()(x)
    mean, var = layer.running_mean_drawn.double(), layer.running_var_drawn.double()
    # Values below 16 in float32: a few roundings of 6e-8 times 16.
    torch.testing.assert_close(y.double(), (x.double() - mean) / torch.sqrt(var + 1e-5), rtol=0, atol=4e-6)
    # Here the statistics of the layer: 0 and 1.
    torch.testing.assert_close(layer(x).double(), x.double() / (1 + 1e-5) ** 0.5, rtol=0, atol=4e-6)


def test_a_single_sample_under_running_uses_the_domains_statistics():
    layer = bn.add_domains(bn.BatchNorm1d(3, small_batch="running"), NAMES)
    with bn.use_domain(layer, "drawn"):
        layer(batch(5.0))
        before = statistics(layer, "drawn")
        y = layer(batch(1.0)[:1])
        assert equal(before, statistics(layer, "drawn"))
        assert torch.equal(y, layer.eval()(batch(1.0)[:1]))


def test_a_frozen_layer_uses_the_domains_statistics_and_moves_none():
    layer = bn.freeze(bn.add_domains(bn.BatchNorm1d(3), NAMES))
    layer.running_mean_drawn.fill_(4.0)
    before = statistics(layer, "drawn")
    with bn.use_domain(layer, "drawn"):
        y = layer(torch.full((2, 3), 4.0))
    assert torch.equal(y, torch.zeros(2, 3))
    assert equal(before, statistics(layer, "drawn"))


def test_a_poisoned_batch_leaves_the_domain_as_it_was():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    before = statistics(layer, "drawn")
    with bn.use_domain(layer, "drawn"):
        layer(torch.full((4, 3), torch.nan))
    assert equal(before, statistics(layer, "drawn"))
    assert int(layer.skipped_batches) == 1


def test_a_domain_applies_to_all_layers_of_the_model():
    model = network()
    with bn.use_domain(model, "real"):
        model(torch.randn(8, 4))
    layers = (model[1], model[2][1])
    assert [int(layer.num_batches_tracked_real) for layer in layers] == [1, 1]
    assert [int(layer.num_batches_tracked) for layer in layers] == [0, 0]


def test_a_nested_domain_ends_in_the_outer_one_and_that_in_none():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    with bn.use_domain(layer, "real"):
        with bn.use_domain(layer, "drawn"):
            layer(batch(1.0))
        layer(batch(1.0))
        layer(batch(1.0))
    layer(batch(1.0))
    counts = layer.num_batches_tracked_drawn, layer.num_batches_tracked_real, layer.num_batches_tracked
    assert [int(count) for count in counts] == [1, 2, 1]


def test_an_exception_ends_the_domain():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    with pytest.raises(ZeroDivisionError), bn.use_domain(layer, "real"):
        1 / 0
    layer(batch(1.0))
    assert (int(layer.num_batches_tracked), int(layer.num_batches_tracked_real)) == (1, 0)


def test_an_unknown_domain_is_named_with_the_known_ones_and_no_layer_enters_it():
    model = network()
    bn.add_domains(model[1], ["cartoon"])
    with (
        pytest.raises(bn.InputError, match=r"2\.1 must have the domain 'cartoon'.*; got real, drawn"),
        bn.use_domain(model, "cartoon"),
    ):
        pass
    assert model[1].active_domain is None
    with (
        pytest.raises(bn.InputError, match=r"must have the domain 'real'.*; got none"),
        bn.use_domain(bn.BatchNorm1d(3), "real"),
    ):
        pass


@pytest.mark.parametrize("names", ["real", [], ["a b"], ["a.b"], [3], [""]], ids=repr)
def test_names_that_are_no_identifiers_are_refused(names):
    with pytest.raises(bn.InputError, match="name"):
        bn.add_domains(bn.BatchNorm1d(3), names)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), bn.BatchNorm1d(3, track_running_stats=False)], ids=repr)
def test_a_model_without_layers_that_keep_statistics_is_refused(model):
    with pytest.raises(bn.InputError, match=f"{type(model).__name__} has none"):
        bn.add_domains(model, NAMES)


# State dicts, casts, copies.


def trained():
    model = network()
    for i, name in enumerate(NAMES):
        with bn.use_domain(model, name):
            model(torch.randn(8, 4) + i)
    return model


def test_a_lazy_layer_that_has_seen_no_batch_is_refused_by_its_path():
    model = nn.Sequential(bn.BatchNorm1d(3), bn.LazyBatchNorm1d())
    with pytest.raises(bn.InputError, match="and 1 has none before its first batch"):
        bn.add_domains(model, ["real"])
    assert model[0].domain_names == []


def test_a_state_dict_goes_strictly_into_a_model_with_the_same_domains():
    model, file = trained(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = network()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert "1.running_mean_real" in model.state_dict()
    for name in (None, *NAMES):
        assert equal(statistics(fresh[1], name), statistics(model[1], name))


@pytest.mark.parametrize("names", [[], ["real"], [*NAMES, "cartoon"], ["real", "painted"]], ids=str)
def test_a_model_with_other_domains_refuses_the_state_dict(names):
    with pytest.raises(RuntimeError, match=r"running_mean_(drawn|cartoon)"):
        network(names).load_state_dict(trained().state_dict(), strict=True)


def test_the_statistics_of_domains_stay_float32_bitwise_through_a_cast():
    layer, fine = bn.add_domains(bn.BatchNorm1d(3), NAMES), 1 + 2.0**-20
    layer.running_var_real.fill_(fine)
    layer.bfloat16()
    assert layer.running_var_real.dtype == torch.float32
    assert layer.running_var_real.tolist() == [fine] * 3
    with bn.use_domain(layer, "real"):
        layer(batch(2.0).bfloat16())
    assert layer.running_mean_real.dtype == torch.float32
    assert int(layer.num_batches_tracked_real) == 1


def test_a_deepcopy_has_domains_of_its_own():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    twin = copy.deepcopy(layer)
    before = statistics(layer, "real")
    with bn.use_domain(twin, "real"):
        twin(batch(2.0))
    assert equal(before, statistics(layer, "real"))
    assert int(twin.num_batches_tracked_real) == 1


def test_a_copy_made_within_a_domain_is_in_none():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    with bn.use_domain(layer, "real"):
        twin = copy.deepcopy(layer)
    twin(batch(2.0))
    assert (int(twin.num_batches_tracked), int(twin.num_batches_tracked_real)) == (1, 0)


def test_a_domain_added_later_copies_the_layers_statistics_and_leaves_those_there():
    layer = bn.add_domains(bn.BatchNorm1d(3), ["real"])
    with bn.use_domain(layer, "real"):
        layer(batch(2.0))
    of_real = statistics(layer, "real")
    layer(batch(5.0))
    bn.add_domains(layer, ["real", "drawn"])
    assert equal(statistics(layer, "drawn"), statistics(layer))
    assert equal(statistics(layer, "real"), of_real)
    layer(batch(5.0))
    assert not equal(statistics(layer, "drawn"), statistics(layer))


def test_resetting_outside_of_domains_leaves_them_and_the_repr_names_them():
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    layer(batch(2.0))
    with bn.use_domain(layer, "real"):
        layer(batch(2.0))
    of_real = statistics(layer, "real")
    layer.reset_running_stats()
    assert equal(statistics(layer), [torch.zeros(3), torch.ones(3), torch.tensor(0)])
    assert equal(statistics(layer, "real"), of_real)
    assert "domains=['real', 'drawn']" in repr(layer)


def test_resetting_within_a_domain_resets_its_statistics_and_no_others():
    model = trained()
    before = [statistics(model[1], name) for name in (None, "drawn")]
    with bn.use_domain(model, "real"):
        model[1].reset_running_stats()
    assert equal(statistics(model[1], "real"), [torch.zeros(3), torch.ones(3), torch.tensor(0)])
    for name, others in zip((None, "drawn"), before, strict=True):
        assert equal(statistics(model[1], name), others)


def test_update_bn_within_a_domain_measures_it_and_leaves_the_others():
    model, rows = trained(), torch.randn(40, 4)
    layer, before = model[1], [statistics(model[1], name) for name in (None, "drawn")]
    with bn.use_domain(model, "real"):
        torch.optim.swa_utils.update_bn(rows.split(10), model)
    inputs = model[0](rows).detach()
    # Means of float32 values below 8: a few roundings of 6e-8 times 8.
    torch.testing.assert_close(layer.running_mean_real, inputs.mean(0), rtol=0, atol=2e-6)
    assert int(layer.num_batches_tracked_real) == 4
    for name, others in zip((None, "drawn"), before, strict=True):
        assert equal(statistics(layer, name), others)


@pytest.mark.parametrize("set_buffer", [setattr, bn.BatchNorm1d.register_buffer], ids=["setattr", "register_buffer"])
def test_statistics_set_within_a_domain_are_the_domains(set_buffer):
    layer = bn.add_domains(bn.BatchNorm1d(3), NAMES)
    of_all, of_drawn = statistics(layer), statistics(layer, "drawn")
    with bn.use_domain(layer, "real"):
        set_buffer(layer, "running_mean", torch.full((3,), 7.0))
    assert layer.running_mean_real.tolist() == [7.0] * 3
    assert equal(statistics(layer), of_all)
    assert equal(statistics(layer, "drawn"), of_drawn)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loaded_within_a_domain_fills_every_set(assign):
    source, model = trained(), network()
    with bn.use_domain(model, "real"):
        model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    for name in (None, *NAMES):
        assert equal(statistics(model[1], name), statistics(source[1], name))


# A model that has torch's layers too.


def mixed():
    return nn.Sequential(nn.Sequential(bn.BatchNorm1d(3)), nn.BatchNorm1d(3), nn.SyncBatchNorm(3))


def use_in_mixed(model):
    bn.add_domains(model[0], ["real"])
    return bn.use_domain(model, "real")


OPENED = {
    "add_domains": lambda model: bn.add_domains(model, ["real"]),
    "use_domain": lambda model: use_in_mixed(model).__enter__(),
    "freeze": bn.freeze,
    "unfreeze": bn.unfreeze,
    "accumulate": lambda model: bn.accumulate(model).__enter__(),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_torchs_layers_cannot_do_refuses_a_model_that_has_some(name):
    with pytest.raises(
        bn.InputError,
        match=f"^{name} needs batchnorm's layers, since torch's .*; got 2 .* first at 1. Call batchnorm.convert",
    ):
        OPENED[name](mixed())


def test_domains_leave_torchs_layers_without_statistics_alone():
    model = nn.Sequential(bn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    assert bn.add_domains(model, ["real"])[0].domain_names == ["real"]
