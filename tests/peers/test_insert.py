"""Insertion into networks of torchvision, timm and transformers, and into those that courses teach."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import UnsupportedError
from support import peer, randn


def reasons(report):
    return {left.reason for left in report.left}


def built(kind, *arguments, **options):
    torch.manual_seed(0)
    return kind(*arguments, **options)


def relative_difference(model, given, x):
    expected = given.eval()(x)
    return ((model.eval()(x) - expected).abs().max() / expected.abs().max()).item()


# torchvision and timm.


def with_narrow_classifier(model):
    """A network of torchvision whose linear layers, which hold nearly all of its weights, are narrower."""
    layers = [name for name, module in model.classifier.named_children() if isinstance(module, nn.Linear)]
    widths = [model.classifier.get_submodule(layers[0]).in_features, 32, 32, 10]
    for name, inputs, outputs in zip(layers, widths, widths[1:], strict=False):
        model.classifier.register_module(name, nn.Linear(inputs, outputs))
    return model


@pytest.mark.parametrize("placement", ["before", "after"])
def test_alexnet_of_torchvision(placement):
    given = with_narrow_classifier(built(peer("torchvision").models.alexnet))
    model, report = bn.insert(given, placement)
    assert [layer.path for layer in report.layers] == [
        *(f"features.{i}" for i in (0, 3, 6, 8, 10)),
        "classifier.1",
        "classifier.4",
    ]
    assert model.train()(randn(4, 3, 64, 64)).shape == (4, 10)


def test_squeezenet_of_torchvision_ends_with_a_convolution():
    _, report = bn.insert(built(peer("torchvision").models.squeezenet1_1, num_classes=10), "after")
    assert len(report.layers) == 25
    assert [(left.path, left.reason) for left in report.left] == [
        ("classifier.1", "an output layer, with ReLU behind it")
    ]


def test_a_vgg_of_torchvision_becomes_the_one_with_batch_norm_and_keeps_its_function():
    models = peer("torchvision").models
    given = with_narrow_classifier(built(models.vgg11))
    model, _ = bn.insert(given, example=randn(2, 3, 32, 32), preserve=True)
    with torch.device("meta"):
        expected = models.vgg11_bn().features

    def kinds(features):
        return [nn.BatchNorm2d if isinstance(module, nn.BatchNorm2d) else type(module) for module in features]

    assert kinds(model.features) == kinds(expected)
    assert relative_difference(model, given, randn(2, 3, 32, 32, seed=1)) < 1e-4


def test_a_residual_network_without_norms_gets_them_where_a_resnet_has_them():
    models = peer("torchvision").models
    given = built(models.resnet18, num_classes=10, norm_layer=lambda channels: nn.Identity())
    model, report = bn.insert(given)
    assert len(report.layers) == sum(isinstance(module, nn.BatchNorm2d) for module in models.resnet18().modules())
    assert reasons(report) == {"an output layer"}
    assert model.train()(randn(4, 3, 64, 64)).shape == (4, 10)


def test_a_network_that_has_batch_norm_is_left_as_it_is():
    _, report = bn.insert(peer("torchvision").models.resnet18())
    assert report.layers == ()
    assert reasons(report) == {"BatchNorm2d normalizes its output", "an output layer"}


@pytest.mark.parametrize(
    ("name", "hidden", "left"),
    [
        (
            "convnext_atto",
            12,
            {
                "LayerNorm2d normalizes its output",
                "no nonlinearity stands between it and the next layer",
                "an output layer",
            },
        ),
        (
            "vit_tiny_patch16_224",
            12,
            {"LayerNorm normalizes its output", "an attention projection", "an output layer"},
        ),
    ],
)
def test_networks_of_timm(name, hidden, left):
    options = {"img_size": 32} if "vit" in name else {}
    given = built(peer("timm").create_model, name, num_classes=10, **options)
    x = randn(2, 3, 32, 32)
    model, report = bn.insert(given, example=x, preserve=True)
    assert (len(report.layers), reasons(report)) == (hidden, left)
    assert relative_difference(model, given, x) < 1e-4
    assert len(str(report).splitlines()) < 40


# transformers.


@pytest.fixture
def bert():
    transformers = peer("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    return built(transformers.BertForSequenceClassification, config)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_transformer_gets_layers_in_its_feed_forward_parts_alone(bert, placement):
    ids = torch.arange(27).reshape(3, 9)
    model, report = bn.insert(bert, placement, example={"input_ids": ids}, preserve=True)
    assert [layer.path for layer in report.layers] == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    left = {layer.path.removeprefix("bert.encoder.layer.0."): layer.reason for layer in report.left}
    assert {left[f"attention.self.{name}"] for name in ("query", "key", "value")} == {"an attention projection"}
    assert left["attention.output.dense"] == left["output.dense"] == "LayerNorm normalizes its output"
    assert report.max_difference < 1e-5
    layer = model.bert.encoder.layer[0].intermediate.dense_bn
    assert (layer.num_features, layer.channel_dim) == (32, -1)
    model.train()(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert layer.weight.grad.abs().sum() > 0


# Networks of courses.


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.up2 = self.block(1, 4), self.block(4, 8), self.block(8, 4)
        self.pool, self.up1 = nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(4, 1, 1)

    def block(self, inputs, outputs):
        convs = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(convs[0], nn.ReLU(inplace=True), convs[1], nn.ReLU(inplace=True))

    def forward(self, x):
        skip = self.down1(x)
        x = self.up1(self.down2(self.pool(skip)))
        return self.out(self.up2(torch.cat([skip, x], 1)))


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6)
        )
        self.decoder = nn.Sequential(
            nn.Linear(6, 128),
            nn.ReLU(),
            nn.Unflatten(1, (8, 4, 4)),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 2, 2),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.mean, self.log_var = nn.Linear(16, 12), nn.Linear(12, 3), nn.Linear(12, 3)
        self.fc3, self.fc4 = nn.Linear(3, 12), nn.Linear(12, 16)

    def forward(self, x):
        h = F.relu(self.fc1(x.view(-1, 16)))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, log_var


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(30, 8), nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.fc, self.out = nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, tokens):
        _, (h, _) = self.lstm(self.embedding(tokens))
        return self.out(torch.tanh(self.fc(h[-1])))


LAST = "an output layer"
NO = "no nonlinearity stands between it and the next layer"


@pytest.mark.parametrize(
    ("network", "x", "hidden", "left"),
    [
        (
            UNet,
            randn(2, 1, 16, 16),
            ["down1.0", "down1.2", "down2.0", "down2.2", "up2.0", "up2.2"],
            {"up1": NO, "out": LAST},
        ),
        (
            AutoEncoder,
            randn(3, 1, 16, 16),
            ["encoder.0", "encoder.2", "decoder.0", "decoder.3"],
            {"encoder.5": NO, "decoder.5": "an output layer, with Sigmoid behind it"},
        ),
        (
            Variational,
            randn(5, 16),
            ["fc1", "fc3"],
            {"mean": LAST, "log_var": LAST, "fc4": "an output layer, with sigmoid behind it"},
        ),
        (
            LSTMClassifier,
            torch.arange(12).reshape(3, 4),
            ["fc"],
            {
                "embedding": "an embedding is a table, whose rows feed no nonlinearity",
                "lstm": "the steps of a recurrent layer share its weights",
                "out": LAST,
            },
        ),
    ],
)
@pytest.mark.parametrize("placement", ["before", "after"])
def test_networks_of_courses(network, x, hidden, left, placement):
    given = built(network)
    assert [layer.path for layer in bn.insert(given, placement)[1].layers] == hidden
    model, report = bn.insert(given, placement, x, preserve=True)
    assert [layer.path for layer in report.layers] == hidden
    assert {layer.path: layer.reason for layer in report.left} == left
    assert report.max_difference < 1e-5
    model.train()(x)


# Models that were folded.


def test_a_folded_resnet_gets_its_layers_back_and_trains_on():
    given = built(peer("torchvision").models.resnet18, num_classes=10)
    x, labels = randn(24, 3, 32, 32), torch.arange(24) % 10
    for _ in range(3):
        given(x)
    folded, _ = bn.fold(given.eval())
    model, report = bn.insert(folded, example=list(x.split(8)), preserve=True)
    assert report.left == ()
    assert model.state_dict().keys() == given.state_dict().keys()
    assert relative_difference(model, given, randn(4, 3, 32, 32, seed=1)) < 1e-4
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.1), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(UnsupportedError):
        folded.train()
