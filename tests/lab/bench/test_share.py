import torch
from torch import nn

from batchnorm.lab.bench.share import share_of_batch_norm

X = torch.randn(64, 8, 16, 16, requires_grad=True)
DY = torch.randn(64, 8, 16, 16)


def test_batch_norm_relu_and_an_addition_are_counted_forward_and_backward():
    layer = nn.BatchNorm2d(8)

    def step():
        torch.autograd.grad(torch.relu(layer(X) + X), [X, *layer.parameters()], DY)

    assert share_of_batch_norm(step) > 0.8  # the rest makes empty tensors and detaches


def test_a_matrix_product_and_the_optimizer_are_not():
    layer = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, foreach=False)

    def step():
        optimizer.zero_grad()
        layer(DY.view(-1, 64)).sum().backward()
        optimizer.step()

    assert share_of_batch_norm(step) == 0
