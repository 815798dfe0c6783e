"""Every operation on random networks: what a network computes stays, and no batch normalization layer is silent."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from random_networks import input_of, networks

# Float64: each of up to some ten layers divides the rounding errors before it by a deviation, sqrt(eps) = 0.1 at worst.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
STEPS = 3
HIDDEN = (nn.Linear, nn.modules.conv._ConvNd)


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def outputs(model, x):
    found = model(x.clone())
    return list(found) if isinstance(found, tuple) else [found]


def norms(model):
    kinds = ("BatchNorm", "NormAct")
    return {path for path, module in model.named_modules() if any(kind in type(module).__name__ for kind in kinds)}


def fingerprint(model):
    """Everything of a model that an operation must leave alone."""
    modules = [(path, type(module), id(module), module.training) for path, module in model.named_modules()]
    state = {name: (id(values), values.clone()) for name, values in model.state_dict(keep_vars=True).items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return modules, state, hooks


def assert_untouched(model, before):
    modules, state, hooks = fingerprint(model)
    assert modules == before[0]
    assert hooks == before[2]
    assert state.keys() == before[1].keys()
    for name, (identity, values) in state.items():
        assert identity == before[1][name][0]
        assert torch.equal(values, before[1][name][1]), name


def built(network):
    """Return the model, if it has batch normalization and is one that autograd can train."""
    model = network.build()
    assume(norms(model))
    note(repr(network))
    assume_trainable(model, network)
    return model


def assume_trainable(model, network):
    """Leave out a network in which an in-place function changes what backward needs: autograd refuses it."""
    try:
        steps(copy.deepcopy(model), network)
    except RuntimeError as error:
        assume("inplace operation" not in str(error) and "does not require grad" not in str(error))
        raise


def steps(model, network):
    """Train for some steps, and return outputs, gradients by position and statistics."""
    found = []
    model.train()
    for seed in range(STEPS):
        torch.manual_seed(seed)
        x = input_of(network, seed + 10).requires_grad_()
        made = outputs(model, x)
        sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).mean() for y in made).backward()
        found += [*made, x.grad]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.clamp(-1, 1)
                    parameter.grad = None
    return [values.detach() for values in found if values is not None]


def check(model, network, operation, *, trains=False):
    """Compare what the operation makes with the model, which must stay as it is."""
    before, x = fingerprint(model), input_of(network, 5)
    made, report = operation(model)
    assert_untouched(model, before)
    torch.testing.assert_close(outputs(copy.deepcopy(made).eval(), x), outputs(copy.deepcopy(model).eval(), x), **CLOSE)
    if trains:
        torch.testing.assert_close(steps(copy.deepcopy(made), network), steps(copy.deepcopy(model), network), **CLOSE)
    return made, report


def assert_none_is_silent(model, report):
    assert norms(model) <= {row.path for row in (*report.layers, *report.left)}


@examples(12)
@given(networks())
def test_convert_keeps_outputs_gradients_and_statistics(network):
    model = built(network)
    _, report = check(model, network, bn.convert, trains=True)
    assert_none_is_silent(model, report)


@examples(12)
@given(networks(), st.booleans())
def test_to_torch_keeps_outputs_and_what_it_does_not_call_lost(network, converted):
    model = built(network)
    if converted:
        model, _ = bn.convert(model)
    made, report = check(model, network, bn.to_torch)
    if {option.partition("=")[0] for row in report.layers for option in row.lost} <= {"nonfinite"}:
        assume_trainable(made, network)  # torch's ReLU keeps its output for backward, and ours does not
        check(model, network, bn.to_torch, trains=True)


@examples(12)
@given(networks())
def test_fold_keeps_outputs(network):
    model = built(network)
    for example in (None, input_of(network, 7)):
        made, report = check(model, network, lambda model: bn.fold(model, example))  # noqa: B023
        assert_none_is_silent(model, report)
        assert not norms(made) & {row.path for row in report.layers}
        if report.layers:
            with pytest.raises(bn.UnsupportedError):
                made.train()


@examples(12)
@given(networks())
def test_tune_trains_as_with_frozen_statistics(network):
    model = built(network)
    for example in (None, input_of(network, 7)):
        made, report = check(model, network, lambda model: bn.tune(model, example))  # noqa: B023
        assert_none_is_silent(model, report)
    assert made.state_dict().keys() == model.state_dict().keys()
    frozen, _ = bn.convert(model)
    for layer in frozen.modules():
        if hasattr(layer, "freeze") and layer.running_mean is not None:
            layer.freeze()
    torch.testing.assert_close(steps(made, network), steps(frozen, network), **CLOSE)


@examples(12)
@given(networks(), st.sampled_from(["before", "after"]))
def test_insert_keeps_outputs_with_preserve(network, placement):
    model = built(network)
    assume(any(isinstance(module, HIDDEN) for module in model.modules()))
    example = input_of(network, 7)
    made, report = check(model, network, lambda model: bn.insert(model, placement, example, preserve=True))
    assert len(norms(made)) == len(norms(model)) + len(report.layers)


@examples(12)
@given(networks(), st.sampled_from(["identity", "layer", "group"]))
def test_replace_names_every_layer_and_gives_the_shapes_of_before(network, kind):
    model, x = built(network), input_of(network, 5)
    before = fingerprint(model)
    made, report = bn.replace(model, kind, example=x)
    assert_untouched(model, before)
    assert_none_is_silent(model, report)
    assert norms(made) == {row.path for row in report.left}
    assert [y.shape for y in outputs(made, x)] == [y.shape for y in outputs(copy.deepcopy(model), x)]


@examples(12)
@given(networks())
def test_unfreeze_undoes_freeze(network):
    model, report = bn.convert(built(network))
    layers = [module for module in model.modules() if hasattr(module, "freeze")]
    assume(not report.left and all(layer.running_mean is not None for layer in layers))
    frozen = bn.freeze(copy.deepcopy(model), affine=True)
    statistics = bn.snapshot(frozen).tensors
    steps(frozen, network)
    assert all(torch.equal(values, statistics[name]) for name, values in bn.snapshot(frozen).tensors.items())
    assume(not any(layer.frozen_statistics or layer.frozen_affine for layer in layers))
    free = bn.unfreeze(bn.freeze(copy.deepcopy(model), affine=True))
    torch.testing.assert_close(steps(free, network), steps(copy.deepcopy(model), network), **CLOSE)
