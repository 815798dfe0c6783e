"""Groups of parameters beside those of timm's optimizers."""

import pytest

import batchnorm as bn
from support import peer


def by_decay(groups):
    return {group["weight_decay"]: {id(parameter) for parameter in group["params"]} for group in groups}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnety_002", "repvgg_a0", "convnext_atto"])
def test_the_groups_of_a_convolutional_network_are_timms(name):
    timm = peer("timm")
    model = timm.create_model(name)
    theirs = peer("timm.optim").param_groups_weight_decay(model, weight_decay=0.1)
    assert by_decay(bn.param_groups(model, 0.1)) == by_decay(theirs)


def test_the_groups_of_levit_are_those_of_the_optimizer_that_timm_creates():
    timm = peer("timm")
    model = timm.create_model("levit_128s")  # names the biases of its attention, which have two dimensions
    optimizer = peer("timm.optim").create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    assert by_decay(bn.param_groups(model, 0.1)) == by_decay(optimizer.param_groups)


def test_the_groups_of_resnet_are_those_of_torchvisions_recipe_without_decay_of_norms_and_biases():
    torchvision = peer("torchvision")
    model = torchvision.models.resnet18()
    # references/classification/utils.py, set_weight_decay(model, 0.1, norm_weight_decay=0, custom_keys=[("bias", 0)])
    norms = {id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters()}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    everything = {id(p) for p in model.parameters()}
    assert by_decay(bn.param_groups(model, 0.1)) == {0.1: everything - norms - biases, 0.0: norms | biases}
