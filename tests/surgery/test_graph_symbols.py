"""Symbols of torch.fx: what a forward asks of its values while it is read must have the answer of a tensor, or none."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.surgery.graph import read_dataflow
from support import peer


class Asking(nn.Module):
    """A forward that puts an addition before the activation, if a question about its input is answered by yes."""

    def __init__(self, question):
        super().__init__()
        self.norm, self.question = nn.BatchNorm1d(3), question

    def forward(self, x):
        y = self.norm(x)
        if self.question(x):
            y = y + x
        return F.relu(y)


def steps(model):
    return [node.name for node in read_dataflow(model).blocks[""].graph.nodes][1:-1]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda x: isinstance(x, torch.Tensor), True),
        (lambda x: isinstance(x, list | tuple), False),
        (lambda x: hasattr(x, "tensors"), False),
        (lambda x: hasattr(x, "shape"), True),
        (lambda x: isinstance(x + 1, torch.Tensor), True),
        (lambda x: isinstance(x, int | float), False),
    ],
)
def test_a_symbol_is_a_tensor_for_the_forward(question, answer):
    *_, before_relu, _ = ["", *steps(Asking(question))]
    assert before_relu.startswith("add") is answer
    assert question(torch.randn(4, 3)) is answer


def test_a_list_of_values_is_a_list_for_the_block_that_gets_it():
    class Joining(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, features):
            features = [features] if isinstance(features, torch.Tensor) else features
            return self.norm(torch.cat(features, 1))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.join = Joining()

        def forward(self, x):
            return self.join([x, x])

    (cat,) = [node for node in read_dataflow(Net()).blocks["join"].graph.nodes if node.name == "cat"]
    assert cat.args[0].name == "features"


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (lambda x: int(x.mean()) > 0, "takes the int of a value"),
        (lambda x: float(x.mean()) > 0, "takes the float of a value"),
        (lambda x: bool(x.sum() > 0), "branches on a value"),
        (lambda x: len([*x]) > 0, "iterates over a value"),
    ],
)
def test_a_question_about_a_value_counts_where_the_forward_catches_the_error(question, reason):
    def caught(x):
        try:
            return question(x)
        except Exception:  # noqa: BLE001 (as authors write)
            return False

    (found,) = read_dataflow(Asking(caught)).unread.values()
    assert found == f"torch.fx cannot trace Asking: it {reason}"


class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x) if type(x) is torch.Tensor else x


class Told(Typed):
    def forward(self, x):
        return self.norm(x) if torch.is_tensor(x) else x


@pytest.mark.parametrize("model", [Typed(), Told()])
def test_a_forward_that_asks_for_a_type_in_another_way_is_refused(model):
    name = type(model).__name__
    assert read_dataflow(model).unread == {"": f"the forward of {name} may depend on the types of values"}


def test_sizes_that_are_symbols_do_not_reach_code_in_c():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            rows, columns = x.shape
            return self.norm(x) * torch.ones((rows, columns), device=x.device)

    (reason,) = read_dataflow(Masked()).unread.values()
    assert reason == "torch.fx cannot trace Masked: it takes the index of a value"


@pytest.mark.peers
def test_densenet_whose_layers_take_a_tensor_or_a_list_is_read():
    model = peer("torchvision").models.densenet121(weights=None, num_classes=2)
    assert read_dataflow(model).unread == {}
