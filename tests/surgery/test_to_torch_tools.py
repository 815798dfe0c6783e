"""Tools that look layers up by their exact type: what they do with our layers, and with those of `to_torch`."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import randn, trained

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

# Folding rounds the weights: some 10 roundings of 6e-8 in sums of 27 products up to about 5.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def fuse():
    """The function of torch.fx, whose import warns of TorchScript."""
    from torch.fx.experimental.optimization import fuse

    return fuse


def model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 3), bn.BatchNorm2d(4))
    return trained(nn.Sequential(*layers), (2, 3, 9, 9))


def count(network, kind):
    return sum(isinstance(module, kind) for module in network.modules())


def test_fx_fuse_folds_the_layers_of_to_torch_and_no_others(fuse):
    network, x = model(), randn(2, 3, 9, 9)
    assert count(fuse(network), nn.BatchNorm2d) == 2
    fused = fuse(bn.to_torch(network)[0])
    assert count(fused, nn.BatchNorm2d) == 0
    torch.testing.assert_close(fused(x), network(x), **CLOSE)


def test_fuse_modules_takes_the_layers_of_to_torch():
    network, x = model(), randn(2, 3, 9, 9)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(network, [["2", "3"]])
    fused = torch.ao.quantization.fuse_modules(bn.to_torch(network)[0], [["0", "1.0", "1.1"], ["2", "3"]])
    assert count(fused, nn.BatchNorm2d) == 0
    torch.testing.assert_close(fused(x), network(x), **CLOSE)


def test_fx_quantization_quantizes_the_layers_of_to_torch():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    network, x = model(), randn(2, 3, 9, 9)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        made = {}
        for name, each in (("ours", network), ("stock", bn.to_torch(network)[0])):
            prepared = prepare_fx(each, get_default_qconfig_mapping("onednn"), (x,))
            prepared(x)
            made[name] = convert_fx(prepared)
        y = made["stock"](x)
    finally:
        torch.backends.quantized.engine = engine
    assert count(made["ours"], nn.BatchNorm2d) == 2
    assert count(made["stock"], nn.BatchNorm2d) == 0
    assert (y - network(x)).abs().max() < 0.2  # 8 bits over values up to about 10, at several places


def test_a_converted_model_is_fused_after_to_torch_as_the_stock_model(fuse):
    torch.manual_seed(0)
    stock = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 9, 9))
    again, _ = bn.to_torch(bn.convert(stock)[0])
    fused, expected = fuse(again), fuse(stock)
    torch.testing.assert_close(dict(fused.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
