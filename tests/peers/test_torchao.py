"""Quantization-aware training of exported models by torchao (PT2E)."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao and of torch's export


def quantized(model):
    """Export a model, train it with fake quantization, and convert it for inference."""
    peer("torchao")
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = ({0: torch.export.Dim("n")},)
    exported = torch.export.export(model, (randn(8, 3, 8, 8),), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    for i in range(2):
        optimizer.zero_grad()
        prepared(randn(8, 3, 8, 8, seed=i) + 0.5).square().mean().backward()
        optimizer.step()
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    return move_exported_model_to_eval(converted)


def test_quantization_aware_training_folds_the_layers_into_the_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 5, 3, bias=False))
    converted = quantized(model.append(bn.BatchNorm2d(5)).train())
    assert not [node for node in converted.graph.nodes if "norm" in str(node.target)]
    x, neighbor = randn(2, 3, 8, 8), randn(1, 3, 8, 8, seed=1) * 5 + 3
    assert torch.equal(converted(torch.cat((x[:1], neighbor)))[0], converted(x)[0])
