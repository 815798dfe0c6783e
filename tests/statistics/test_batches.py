"""Batches of a loader: how their samples are counted, where they cannot be, and what moves with a batch."""

import collections
import dataclasses
import re
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import batchnorm as bn
from batchnorm.statistics.batches import BatchReader, moved
from support import mixed_network, randn

META = torch.device("meta")
X, Y = torch.zeros(6, 4), torch.zeros(6)
IMAGES = [torch.zeros(3, 8 + i, 8) for i in range(5)]

Pair = collections.namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Record:
    x: object
    name: str = "a batch"


class Bag:
    """A batch of a class of one's own, whose content the library cannot know."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return 1


class MovingBag(Bag):
    def to(self, device):
        return MovingBag(self.x.to(device))


class BagThatMovesInPlace(Bag):
    def to(self, device):
        self.x = self.x.to(device)


def by_forward(model, batch):
    """Stand for a function that runs the model on a batch of any kind."""


def counted(batch, samples=None, forward=by_forward):
    return BatchReader(nn.Identity(), forward, None, samples).count(batch)


# Counting


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, "label"],
        ((X,), Y),
        [[X, Y], Y],
        {"x": X, "n": torch.tensor(3)},
        {"views": {"left": X, "right": X}, "y": [Y]},
        Pair((X, X), Y),
        Record({"x": X}),
        collections.UserDict(x=X),
        (X.numpy(), ["a"] * 6, Y),
        (X, None, 1.5),
        X.to_sparse(),
        pack_sequence([torch.zeros(3, 4)] * 6),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_samples_are_the_first_size_that_all_tensors_of_a_batch_share(batch):
    assert counted(batch) == 6


def test_where_the_model_is_given_the_first_tensor_alone_its_rows_count():
    assert counted((X, torch.zeros(9), Bag(X)), forward=None) == 6


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (Bag(X), "got Bag"),
        (MovingBag(X), "got MovingBag"),
        ((Bag(X), Y), "got Bag"),
        ({"graph": Bag(X)}, "got Bag"),
        (Record(Bag(X)), "got Bag"),
        (torch.tensor(1.0), "without one"),
        ([], "without one"),
        ({"name": "a batch"}, "without one"),
        ({"x": X, "edge_index": torch.zeros(2, 9)}, "sizes 2, 6 in dict"),
        ((IMAGES, torch.zeros(5)), "sizes 3, 5 in tuple"),
        (([torch.zeros(n, 2) for n in (3, 1, 4)], Y), "sizes 1, 3, 4, 6 in tuple"),
    ],
)
def test_a_batch_whose_samples_cannot_be_seen_is_refused_and_told_of_samples(batch, got):
    with pytest.raises((bn.InputError, bn.InputTypeError), match=rf"{got}.*pass samples=.*lambda batch"):
        counted(batch)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(7, 7), (np.int64(7), 7), (lambda batch: len(batch.x), 6), (lambda batch: torch.tensor(5), 5), (lambda b: 0, 0)],
)
def test_samples_are_a_number_or_a_function_of_the_batch(samples, expected):
    assert counted(Bag(X), samples) == expected


@pytest.mark.parametrize("samples", [1.5, True, "6", torch.ones(2)])
def test_samples_that_are_no_whole_number_are_refused(samples):
    with pytest.raises(bn.InputTypeError, match="samples must be None, a whole number or a function"):
        counted(X, samples)
    with pytest.raises(
        bn.InputTypeError, match=r"samples must return a whole number.*; got " + re.escape(repr(samples))
    ):
        counted(X, lambda batch: samples)


@pytest.mark.parametrize(("samples", "rule"), [(0, "at least 1; got 0"), (lambda batch: -1, "at least 0; got -1")])
def test_too_small_numbers_of_samples_are_refused(samples, rule):
    with pytest.raises(bn.InputError, match=rule):
        counted(X, samples)


@pytest.mark.parametrize("name", ["recalibrate", "at once", "adapt"])
def test_a_loader_of_which_no_batch_has_samples_is_refused(name):
    with pytest.raises(bn.InputError, match="at least one sample"):
        calls(mixed_network(), loader_of(lambda x: x), samples=lambda batch: 0)[name]()


# Counting, in the functions that use it


def loader_of(wrap):
    return [wrap(part) for part in randn(32, 4, dtype=torch.float64).split(8)]


def calls(model, loader, **options):
    """Return the reports of everything that goes over a loader, by name."""
    return {
        "recalibrate": lambda: bn.recalibrate(model, loader, **options),
        "at once": lambda: bn.recalibrate(model, loader, mode="at_once", **options),
        "adapt": lambda: bn.adapt(model, loader, **options),
        "detect_shift": lambda: bn.detect_shift(model, loader, **options),
        "reference": lambda: bn.detect_shift(model, [X.double()] * 4, reference=loader, **options),
    }


CALLS = ["recalibrate", "at once", "adapt", "detect_shift"]


@pytest.mark.parametrize("name", [*CALLS, "reference"])
def test_no_function_guesses_the_samples_of_a_batch(name):
    model = mixed_network()
    before = {name: values.clone() for name, values in model.state_dict().items()}

    def forward(model, batch):
        model(batch if isinstance(batch, torch.Tensor) else batch.x)

    with pytest.raises(bn.InputTypeError, match="got Bag: pass samples="):
        calls(model, loader_of(Bag), forward=forward)[name]()
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("samples", [8, lambda batch: len(batch.x)])
@pytest.mark.parametrize("name", CALLS)
def test_every_function_takes_the_samples_from_the_user(name, samples):
    report = calls(mixed_network(), loader_of(Bag), forward=lambda m, b: m(b.x), samples=samples)[name]()
    assert report.samples == 32
    plain = calls(mixed_network(), loader_of(lambda x: x))[name]()
    assert report.to_dict() == plain.to_dict()


@pytest.mark.parametrize("name", CALLS)
def test_a_nested_batch_counts_its_rows(name):
    report = calls(mixed_network(), loader_of(lambda x: ((x,), x[:, 0])), forward=lambda m, b: m(b[0][0]))[name]()
    assert report.samples == 32


@pytest.mark.parametrize("name", CALLS)
def test_a_list_with_a_tensor_per_sample_is_not_counted_by_its_channels(name):
    images = [list(part) for part in randn(40, 3, 5).split(8)]  # 8 images of 3 channels
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 2), bn.BatchNorm1d(2))
    stacked = {"forward": lambda m, b: m(torch.stack(b))}
    with pytest.raises(
        bn.InputError, match="tensors with 3 rows in a list, and a layer that is given 8: pass samples="
    ):
        calls(model, images, **stacked)[name]()
    assert calls(model, images, samples=len, **stacked)[name]().samples == 40


@pytest.mark.parametrize("name", CALLS)
def test_inputs_side_by_side_are_counted_by_their_rows(name):
    pairs = loader_of(lambda x: (x, x + 1))
    assert calls(mixed_network(), pairs, forward=lambda m, b: m(b[0]) + m(b[1]))[name]().samples == 32


def test_max_samples_counts_what_the_user_says():
    report = bn.recalibrate(
        mixed_network(), loader_of(Bag), forward=lambda m, b: m(b.x), samples=lambda b: 100, max_samples=150
    )
    assert (report.samples, report.layers[0].count) == (200, 16)


@pytest.mark.parametrize("option", [{"samples": 4}, {"device": "cpu"}])
def test_adapting_to_each_batch_by_itself_takes_no_option_of_a_loader(option):
    with pytest.raises(bn.InputError, match="forward, device, samples and group need a loader"):
        bn.adapt(mixed_network(), **option)


# Moving


def devices(batch):
    """Return the devices of all tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return [batch.device.type]
    if isinstance(batch, collections.abc.Mapping):
        batch = list(batch.values())
    elif dataclasses.is_dataclass(batch) or isinstance(batch, Bag):
        batch = [batch.x]
    return [each for part in batch for each in devices(part)] if isinstance(batch, list | tuple) else []


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y, "label"),
        [X, [Y, 3]],
        {"x": X, "more": {"y": (Y,)}},
        collections.OrderedDict(x=X),
        collections.defaultdict(list, x=[X]),
        collections.UserDict(x=X),
        types.MappingProxyType({"x": X}),
        Pair(X, [Y]),
        Record((X, Y)),
        MovingBag(X),
        [MovingBag(X), Record(MovingBag(X))],
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_everything_in_a_batch_moves_and_keeps_its_type(batch):
    arrived = moved(batch, META)
    assert set(devices(arrived)) == {"meta"}
    assert set(devices(batch)) == {"cpu"}
    if not isinstance(batch, types.MappingProxyType):
        assert type(arrived) is type(batch)


def test_a_packed_sequence_moves_as_torch_moves_it():
    arrived = moved(pack_sequence([X, X[:2]]), META)
    assert (arrived.data.device, arrived.batch_sizes.device.type) == (META, "cpu")


def test_an_object_that_moves_in_place_and_returns_nothing_is_kept():
    bag = BagThatMovesInPlace(X)
    assert moved(bag, META) is bag
    assert bag.x.is_meta


@pytest.mark.parametrize("batch", [X, (X, Y), {"x": [X]}, Record(X), Bag(X), "text", None, X.numpy(), [1, 2]])
def test_a_batch_that_is_there_already_is_not_copied(batch):
    assert moved(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize(
    ("device", "rule"),
    [("gpu", r"a device of this machine.*got 'gpu'"), ("xpu:9", "of this machine"), ("meta", "one that holds values")],
)
def test_a_device_without_tensors_of_this_machine_is_refused(device, rule):
    with pytest.raises(bn.InputError, match=rf"device must be .*{rule}"):
        bn.recalibrate(mixed_network(), [X.double()], device=device)


@pytest.mark.parametrize("name", ["recalibrate", "adapt", "detect_shift"])
def test_a_model_on_meta_is_refused_in_plain_words(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3))
    with pytest.raises(bn.InputError, match=r"must be loaded; got 0\.weight on the meta device"):
        calls(model, [X])[name]()
