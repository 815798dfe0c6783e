"""Which layers of a network are hidden, which are left alone, and the reasons."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from support import randn


def found(model, *arguments, **options):
    """The paths of the layers that get batch normalization, and the reasons of the others by path."""
    _, report = bn.insert(model, *arguments, **options)
    return [layer.path for layer in report.layers], {left.path: left.reason for left in report.left}


class Model(nn.Module):
    """A network whose forward is a function of the module and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x):
        return self.function(self, *x)


def model_of(function, **layers):
    """A model whose forward takes a single argument, so that torch.fx can trace it."""

    class Single(Model):
        def forward(self, x):
            return self.function(self, x)

    return Single(function, **layers)


def linear(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


def conv(inputs=4, outputs=4, size=1):
    return nn.Conv2d(inputs, outputs, size)


# Between a layer and its nonlinearity.

BETWEEN = {
    "max pooling": lambda x: F.max_pool2d(x, 2),
    "dropout": F.dropout,
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.size(0), -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "mean": lambda x: x.mean((2, 3)),
    "bias": lambda x: x + 1,
    "scale": lambda x: x * 0.5,
    "residual": lambda x: x + F.avg_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_steps_between_a_layer_and_its_nonlinearity_are_followed(name):
    def forward(self, x):
        x = F.relu(BETWEEN[name](self.first(x)))
        return self.last(x.flatten(1))

    model = model_of(forward, first=conv(), last=nn.LazyLinear(2))
    x = randn(3, 4, 5, 5)
    model(x)
    assert found(model) == (["first"], {"last": "an output layer"})
    for placement in ("before", "after"):
        assert found(model, placement, x)[0] == ["first"]


@pytest.mark.parametrize("name", ["flatten", "permute", "view"])
def test_behind_a_reshape_the_channels_are_known_with_an_example_alone(name):
    model = model_of(lambda self, x: self.last(F.relu(BETWEEN[name](self.first(x))).flatten(1)), first=conv())
    model.last = nn.Linear(100, 2)
    paths, left = found(model, "after")
    assert paths == []
    assert "an example must show the channels" in left["first"]
    normalized, _ = bn.insert(model, "after", randn(3, 4, 5, 5))
    layer = normalized.first_bn
    expected = {"flatten": (100, 1), "view": (100, 1), "permute": (4, -1)}[name]
    assert (layer.num_features, layer.channel_dim) == expected


def test_both_layers_before_a_sum_are_hidden_and_share_the_layer_behind_the_nonlinearity():
    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))

    model = model_of(forward, stem=conv(), conv1=conv(), conv2=conv(), shortcut=conv(), head=linear())
    hidden = ["stem", "conv1", "conv2", "shortcut"]
    assert found(model) == (hidden, {"head": "an output layer"})
    assert found(model, "after")[0] == hidden[:-1]
    after, report = bn.insert(model, "after")
    assert "shortcut" in {each.path for each in report.left}
    assert [name for name, _ in after.named_children() if name.endswith("_bn")] == ["stem_bn", "conv1_bn", "conv2_bn"]


def test_a_residual_stream_is_not_followed_beyond_the_first_nonlinearity():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = conv(), conv()

        def forward(self, x):
            return x + self.conv2(F.relu(self.conv1(F.relu(x))))

    model = nn.Sequential(conv(), Block(), Block(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(randn(1, 4, 2, 2))
    paths, left = found(model)
    assert paths == ["0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    assert left == {"5": "an output layer"}


def test_folded_away_norms_and_identities_are_no_step():
    model = nn.Sequential(conv(), nn.Identity(), nn.ReLU(), conv())
    assert found(model)[0] == ["0"]


def test_layers_in_a_list_that_the_forward_runs_over():
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        for layer in self.rest:
            x = layer(x)
        return x

    model = model_of(
        forward,
        layers=nn.ModuleList([linear(), linear()]),
        rest=nn.Sequential(linear(), nn.ReLU(), linear()),
    )
    assert found(model) == (["layers.0", "layers.1", "rest.0"], {"rest.2": "an output layer"})
    normalized, _ = bn.insert(model, "after")
    names = [name for name, _ in normalized.named_children()]
    assert names == ["layers", "rest", "layers_0_bn", "layers_1_bn", "rest_0_bn"]


# Layers that are left alone.


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda x: x, "an output layer"),
        (torch.sigmoid, "an output layer, with sigmoid behind it"),
        (F.relu, "an output layer, with relu behind it"),
        (lambda x: F.log_softmax(x, 1), "an output layer, with log_softmax behind it"),
        (lambda x: (x, x.flatten(1)), "an output layer"),
        (lambda x: {"logits": torch.tanh(x)}, "an output layer, with tanh behind it"),
    ],
)
def test_output_layers(end, reason):
    model = model_of(lambda self, x: end(self.last(F.relu(self.first(x)))), first=linear(), last=linear())
    assert found(model) == (["first"], {"last": reason})


def test_a_layer_without_a_nonlinearity_before_the_next():
    model = nn.Sequential(linear(), linear(), nn.ReLU(), linear())
    assert found(model) == (
        ["1"],
        {"0": "no nonlinearity stands between it and the next layer", "3": "an output layer"},
    )


def test_layers_that_are_called_several_times():
    def forward(self, x):
        return self.last(F.relu(self.shared(F.relu(self.shared(x)))))

    assert found(model_of(forward, shared=linear(), last=linear())) == (
        [],
        {"shared": "it is called 2 times", "last": "an output layer"},
    )


def attention(self, x, product):
    q, k, v = self.q(x), self.k(x), self.v(x)
    x = x + self.out(product(q, k, v))
    x = x + self.fc2(F.gelu(self.fc1(x)))
    return self.head(x.mean(1))


PRODUCTS = {
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "matmul": lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v,
    "einsum": lambda q, k, v: torch.einsum("nij,njd->nid", torch.einsum("nid,njd->nij", q * 0.5, k).softmax(-1), v),
    "heads": lambda q, k, v: (
        F.scaled_dot_product_attention(*(t.view(t.shape[0], t.shape[1], 2, 2).transpose(1, 2) for t in (q, k, v)))
        .transpose(1, 2)
        .flatten(2)
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_projections_of_attention_written_by_hand(name):
    layers = {each: linear() for each in ("q", "k", "v", "out", "fc1", "fc2", "head")}
    paths, left = found(model_of(lambda self, x: attention(self, x, PRODUCTS[name]), **layers))
    assert paths == ["fc1"]
    assert {left[each] for each in ("q", "k", "v", "out")} == {"an attention projection"}


def test_attention_transformers_recurrent_layers_and_embeddings_of_torch():
    def forward(self, x):
        x = self.embedding(x)
        x = x + self.attention(x, x, x)[0]
        x = self.transformer(x)
        x = F.relu(self.hidden(self.lstm(x)[0]))
        return self.head(x[:, -1])

    model = model_of(
        forward,
        embedding=nn.Embedding(9, 4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        transformer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        lstm=nn.LSTM(4, 4, batch_first=True),
        hidden=linear(),
        head=linear(),
    )
    paths, left = found(model)
    assert paths == ["hidden"]
    assert left == {
        "embedding": "an embedding is a table, whose rows feed no nonlinearity",
        "attention": "the projections of attention feed no nonlinearity",
        "transformer": "torch runs TransformerEncoderLayer as a whole, with nothing between its layers",
        "lstm": "the steps of a recurrent layer share its weights",
        "head": "an output layer",
    }


def test_a_recurrent_cell_written_by_hand_is_called_several_times():
    def forward(self, x):
        h = torch.tanh(self.input(x[:, 0]))
        for i in range(1, 3):
            h = torch.tanh(self.input(x[:, i]) + self.state(h))
        return self.head(h)

    paths, left = found(model_of(forward, input=linear(), state=linear(), head=linear()))
    assert paths == []
    assert left["state"] == "it is called 2 times"


def squeeze_and_excitation(self, x, gate):
    x = F.relu(self.conv(x))
    s = gate(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
    return self.head((x * s).mean((2, 3)))


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid, lambda x: F.relu6(x + 3) / 6])
def test_squeeze_and_excitation_is_left_and_what_it_scales_is_not(gate):
    model = model_of(
        lambda self, x: squeeze_and_excitation(self, x, gate),
        conv=conv(),
        fc1=conv(4, 2),
        fc2=conv(2, 4),
        head=linear(),
    )
    paths, left = found(model)
    assert "multiplies another tensor" in left["fc2"]
    if gate is not F.relu6:
        assert left["fc1"] == "it feeds a gate and nothing else"
    assert paths in (["conv"], [])


def test_gated_linear_units():
    def forward(self, x):
        x = F.glu(self.glu(x))
        x = self.down(F.silu(self.gate(x)) * self.up(x))
        a, b = self.both(x).chunk(2, -1)
        return self.head(a * torch.sigmoid(b))

    layers = {"glu": linear(4, 8), "gate": linear(), "up": linear(), "down": linear(), "both": linear(4, 8)}
    paths, left = found(model_of(forward, **layers, head=linear()))
    assert paths == []
    assert left["glu"].startswith("a gate: glu")
    assert left["gate"] == "a gate: its output, after silu, multiplies another tensor"
    assert left["both"] == "a gate: its output, after sigmoid, multiplies another tensor"
    assert left["up"] == "no nonlinearity stands between it and the next layer"


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.RMSNorm(4), bn.BatchNorm1d(4)])
@pytest.mark.parametrize("behind", [False, True])
def test_hidden_layers_that_are_normalized_already(norm, behind):
    steps = [nn.ReLU(), norm] if behind else [norm, nn.ReLU()]
    paths, left = found(nn.Sequential(linear(), *steps, linear(), nn.ReLU(), linear()))
    name = type(norm).__name__
    assert paths == ["3"]
    assert left["0"] == f"{name} normalizes its output{' after ReLU' if behind else ''}"


def test_products_with_other_tensors_and_unknown_functions():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    model = nn.Sequential(linear(), Odd(), nn.ReLU(), linear())
    assert found(model)[1]["0"] == "Odd takes its output, and is not known as a nonlinearity"
    graph = Model(lambda self, x, a: self.fc2(F.relu(a @ self.fc1(x))), fc1=linear(), fc2=linear())

    class Graph(type(graph)):
        def forward(self, x, a):
            return self.function(self, x, a)

    graph.__class__ = Graph
    assert found(graph)[1]["fc1"] == "matmul multiplies its output with another tensor"


def test_a_layer_of_an_unknown_class_is_listed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return x @ self.weight

    paths, left = found(nn.Sequential(linear(), nn.ReLU(), Own(), nn.ReLU(), linear()))
    assert paths == ["0"]
    assert left["2"] == "Own is no Linear or convolution of torch"


def test_two_nonlinearities_have_no_single_place_behind_them():
    def forward(self, x):
        z = self.first(x)
        return self.last(torch.cat([F.relu(z), F.relu(-z)], 1))

    model = model_of(forward, first=linear(), last=linear(8, 2))
    assert found(model)[0] == ["first"]
    assert found(model, "after")[1]["first"] == "2 nonlinearities take its output"


def test_a_value_changed_in_place_that_others_use_is_left_alone():
    def forward(self, x):
        z = self.first(x)
        F.relu_(z)
        return self.last(z)

    model = model_of(forward, first=linear(), last=linear())
    assert found(model)[1]["first"] == "relu_ changes a value in place that others use"


# Forwards that cannot be traced.


def branching(self, x):
    x = F.relu(self.first(x)) if x.sum() > 1e9 else torch.tanh(self.first(x))
    return self.last(x)


def test_an_example_shows_what_tracing_cannot_and_the_layer_calls_the_new_one():
    model = model_of(branching, first=linear(), last=linear()).double()
    x = randn(9, 4, dtype=torch.float64)
    paths, left = found(model)
    assert paths == []
    assert "torch.fx cannot trace" in left["first"]
    normalized, report = bn.insert(model, example=x)
    assert [layer.path for layer in report.layers] == ["first"]
    assert isinstance(normalized.first, nn.Linear)
    assert normalized.first.bn.num_features == 4
    expected = model.last(torch.tanh(bn.BatchNorm1d(4, dtype=torch.float64)(model.first(x))))
    assert torch.allclose(normalized.train()(x), expected, atol=1e-12)
    assert model.state_dict().keys() - {"first.bias"} <= normalized.state_dict().keys()


def test_a_function_in_a_forward_that_cannot_be_traced_has_no_layer_behind_it():
    model = model_of(branching, first=linear(), last=linear())
    assert "torch.fx cannot trace" in found(model, "after", randn(9, 4))[1]["first"]


def test_a_graph_module_gets_the_layers_into_its_graph():
    model = torch.fx.symbolic_trace(nn.Sequential(linear(), nn.ReLU(), linear()))
    x = randn(9, 4)
    normalized, report = bn.insert(model, example=x, preserve=True)
    assert [layer.path for layer in report.layers] == ["0"]
    assert "_bn" in normalized.code
    assert torch.allclose(normalized.eval()(x), model(x), atol=1e-6)
