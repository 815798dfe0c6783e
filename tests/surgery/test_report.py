"""The report of surgery: every layer that was changed or left, within 80 columns however many there are."""

import pytest

from batchnorm.surgery.report import Left, Replacement, Surgery

FEW = Surgery(
    layers=(
        Replacement("bn1", "BatchNorm2d", "BatchNorm2d, ReLU", ("nonfinite='skip'",)),
        Replacement("", "BatchNorm1d", "BatchNorm1d"),
    ),
    left=(Left("neck.bn", "SplitBatchNorm2d", "it is called 2 times"),),
    max_difference=1.2e-6,
    notes=("Make a new optimizer.",),
)
PATHS = [f"layer{stage}.{block}.bn{i}" for stage in range(1, 5) for block in range(12) for i in (1, 2, 3)]
MANY = Surgery(
    layers=tuple(Replacement(path, "BatchNorm2d", "BatchNorm2d(activation='relu')", ("sync=True",)) for path in PATHS),
    left=tuple(Left(f"{path}.inner", "FrozenBatchNorm2d", "its forward takes a mask") for path in PATHS),
)


def test_few_layers_are_shown_one_by_one():
    assert str(FEW).splitlines() == [
        "layer              before               after",
        "bn1           BatchNorm2d   BatchNorm2d, ReLU",
        "(the model)   BatchNorm1d         BatchNorm1d",
        "",
        "Lost in training:",
        "nonfinite  bn1",
        "",
        "Left alone:",
        "- SplitBatchNorm2d at neck.bn: it is called 2 times",
        "",
        "Largest difference of the outputs on the example: 1.2e-06",
        "",
        "Make a new optimizer.",
    ]


def test_many_layers_that_were_changed_alike_are_one_row():
    lines = str(MANY).splitlines()
    assert len(lines) < 12
    assert max(map(len, lines)) <= 80
    assert "layer1.0.bn1 and 143 more" in lines[1]
    assert "sync  all 144 layers" in lines
    assert "and 141 more: its forward takes a mask" in str(MANY).replace("\n", " ")


def test_layers_that_were_changed_differently_have_a_row_each():
    other = Replacement("head.bn", "BatchNorm1d", "BatchNorm1d")
    lines = str(Surgery((*MANY.layers, other))).splitlines()
    assert "head.bn" in lines[2]


def test_long_names_of_classes_and_paths_stay_within_80_columns():
    path = "backbone.encoder." * 8 + "bn"
    long = Replacement(path, "A" * 70, "B" * 70, ("domains=['a']",))
    report = Surgery((long, long), (Left(path, "C" * 50, "d " * 90 + "end"),), 1.0, ("note " * 40,))
    shown = [line for line in str(report).splitlines() if path not in line]
    assert max(map(len, shown)) <= 80


def test_a_report_without_changes_says_so_first():
    assert str(Surgery((), FEW.left)).splitlines()[0] == "No layer was changed."


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (FEW, "Surgery(2 layers changed, 1 left alone, largest difference 1.2e-06)"),
        (Surgery(FEW.layers[:1]), "Surgery(1 layer changed)"),
        (Surgery(()), "Surgery(0 layers changed)"),
    ],
)
def test_the_repr_counts_the_layers(report, text):
    assert repr(report) == text


def test_the_frame_has_a_row_for_each_layer_with_the_reason_of_those_left():
    frame = FEW.frame()
    assert frame["layer"].to_list() == ["bn1", "", "neck.bn"]
    assert frame["left_because"].to_list() == ["", "", "it is called 2 times"]
    assert frame["lost"].to_list() == ["nonfinite='skip'", "", ""]


def test_the_dictionary_has_all_fields():
    values = FEW.to_dict()
    assert values["left"] == [{"path": "neck.bn", "kind": "SplitBatchNorm2d", "reason": "it is called 2 times"}]
    assert values["max_difference"] == 1.2e-6
    assert values["notes"] == ["Make a new optimizer."]


def test_long_texts_keep_their_end_and_the_room_that_there_is():
    names = [f"encoder/block_{i}/BatchNorm_{i}" for i in range(9, 11)]
    rows = tuple(Replacement(f"layers.{i}", "BatchNorm2d", f"bn.BatchNorm2d of {name}") for i, name in enumerate(names))
    text = str(Surgery(rows))
    assert all(name in text for name in names)
    rows += (Replacement("a" * 30, "B" * 30, "bn.BatchNorm2d, Dropout, PReLU"),)
    lines = str(Surgery(rows)).splitlines()
    assert max(map(len, lines)) <= 90
    assert all(line.endswith(("_9", "_10", "PReLU", "after")) for line in lines)
