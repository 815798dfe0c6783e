"""Tables, entries and numbers as plain text of at most 80 columns."""

import math

from batchnorm.text import WIDTH, format_column, format_entries, format_table, shorten


def test_a_column_has_decimals_that_line_up_or_exponents():
    assert format_column([0.0, -1e-9, 0.5]) == ["0.0", "0.0", "0.5"]
    assert format_column([99.99, -0.123]) == ["99.990", "-0.123"]
    assert format_column([1234567.0, 1.0]) == ["1.23e+06", "1.00e+00"]
    assert format_column([1234567.0, 1.0], digits=7) == ["1234567", "1"]
    assert format_column([0.001, None]) == ["1.00e-03", ""]
    assert format_column([math.nan, math.inf, 1.5]) == ["nan", "inf", "1.5"]


def test_a_table_aligns_its_first_column_to_the_left_and_the_others_to_the_right():
    assert format_table(["a", "b"], [["long", "x"], ["1", "22"]]) == ["  a       b", "  long    1", "  x      22"]


def test_a_table_too_wide_gets_smaller_gaps_and_then_a_shorter_first_column():
    numbers = [["1" * 8, "22"] for _ in range(7)]
    assert max(map(len, format_table(["layer", *"abcdefg"], [["bn", "fc"], *numbers]))) == 2 + 5 + 7 * 9
    path = "module.backbone.layer4.2.downsample.1"
    lines = format_table(["layer", *"abcdefg"], [[path, "fc"], *numbers], indent="")
    assert max(map(len, lines)) == WIDTH == 80
    assert lines[1].startswith("...2.downsample.1 ")


def test_a_short_text_stays_whole():
    assert shorten("layer4.bn", 9) == "layer4.bn"
    assert shorten("layer4.bn", 8) == "...r4.bn"


def test_the_text_of_an_entry_is_wrapped_beside_its_label():
    lines = format_entries([("System", "Linux"), ("Processor", "word " * 30), ("", "more")])
    assert lines[0] == "System     Linux"
    assert lines[1].startswith("Processor  word word")
    assert lines[2].startswith("           word")
    assert lines[-1] == "           more"
    assert max(map(len, lines)) <= WIDTH
