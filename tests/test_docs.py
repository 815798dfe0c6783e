"""The README and the pages of docs: their examples run, and their numbers are those of the committed results."""

import doctest
import json
import math
import re
import statistics
from pathlib import Path

import pytest

from batchnorm.lab.claims import read_judgment
from batchnorm.lab.comparison.run_file import read_run
from batchnorm.lab.report.comparison import Comparison

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def committed(name):
    return read_run(ROOT / "docs/results" / name)


def result(name):
    return committed(name).result


def test_a_newcomer_reads_how_to_get_install_and_run_it_in_that_order():
    commands = " ".join(re.findall(r"^ {4}(.+?)(?:  +#.*)?$", README, re.MULTILINE))
    steps = [
        "git clone ",
        "cd batchnorm",
        "python3 -m venv",
        "/whl/cpu",
        "pip install '.[lab]'",
        "make demo",
        "compare",
    ]
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)
    assert README.index("git clone ") < len(README) / 5


PAGES = ["README.md", "docs/compare.md", "docs/explain.md", "docs/layers.md", "docs/statistics.md"]
PAGES += ["docs/tools.md", "docs/surgery.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page):
    failed, attempted = doctest.testfile(str(ROOT / page), module_relative=False)
    assert attempted > 5
    assert failed == 0


def test_the_table_of_readme_is_what_the_committed_run_prints():
    printed = str(Comparison.of(committed("digits"))).splitlines()
    shown = [line[4:] for line in README.splitlines() if re.match(r" {4,}(batch norm|none|before|after) ", line)]
    assert len(shown) == 4
    assert [line for line in shown if line not in printed] == []
    assert result("digits").verdict in " ".join(README.split())


def times(median):
    """As it is printed: runs that don't arrive leave a ratio open."""
    return "{:.2g} to {:.2g}".format(*median) if median[0] != median[1] else f"{median[0]:.2g}"


def test_the_figures_of_readme_are_those_of_the_committed_runs():
    text = " ".join(README.split())
    digits, weak = result("digits"), result("digits-paper")
    before, after = (digits.ratios[arm] for arm in ("before", "after"))
    assert f"needs **{times(before.median)}x fewer steps**" in text
    assert f"before the nonlinearity (97.9% CI {before.interval[0]:.1f} to unbounded)" in text
    assert f"and {times(after.median)}x fewer with it after" in text
    assert f"after (97.9% CI {after.interval[0]:.1f} to unbounded), measured by" in text
    assert {ratio.interval[1] for ratio in (before, after)} == {math.inf}
    assert f"{digits.arms['none'].steps.count(None)} of the 10 runs without" in text
    seconds = {arm: values.seconds_per_step for arm, values in digits.arms.items()}
    assert f"costs {seconds['before'] / seconds['none']:.1f}x the time here" in text
    assert f"ratio of seconds is {times(before.seconds.median)} before" in text
    assert f"with an interval from {before.seconds.interval[0]:.1f}" in text
    networks = digits.stacking.runs
    assert f"{networks} networks" in text
    for arm in ("before", "after"):
        assert f"at least {weak.ratios[arm].median[0]:.0f}x" in text
        assert f"(CI {weak.ratios[arm].interval[0]:.0f} to unbounded)" in text
    assert f"to {100 * weak.target.value:.1f}%" in text
    assert f"took {committed('digits').seconds:.0f} s" in text


def test_the_verdicts_of_readme_are_those_of_the_committed_studies():
    shown = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| \w+: ", line)]
    expected = {}
    for study in ("digits-study", "placement-study"):
        for claim in read_judgment(committed(study)).claims:
            for finding in claim.findings:
                verdicts = expected.setdefault(f"{claim.name}: {finding.label}", [])
                verdicts.append(finding.verdict)
    assert {name: [verdict for verdict in verdicts if verdict.strip()] for name, *verdicts in shown} == expected


def test_what_readme_says_of_the_studies_is_in_the_committed_runs():
    text = " ".join(README.split())
    stability = next(claim for claim in read_judgment(committed("digits-study")).claims if claim.name == "stability")
    assert stability.findings[0].median == pytest.approx([2.5, 2.5], abs=0.05)
    assert "trains over 2.5 decades more of learning rate" in text
    checks = json.loads((ROOT / "benchmarks/results/null_claims.json").read_text())["checks"]
    held = [check["any claim"]["holds"] for check in checks.values()]
    assert f"some claim held in {held[0]} and {held[1]} (`benchmarks/null_claims.py`" in text


def test_a_study_and_a_comparison_of_the_same_data_agree():
    assert result("digits-study").verdict == result("digits").verdict
    for arm, values in result("digits").arms.items():
        assert values.steps == result("digits-study").arms[arm].steps


def measured(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_the_speeds_without_avx_512_are_those_of_the_committed_benchmark():
    text = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    kernels = measured("kernels-avx2")
    assert kernels["machine"]["kernels"] == "native (AVX2)"
    assert f"`{kernels['command']}`, on an AMD EPYC that has AVX2 alone" in text
    trained = [r for r in kernels["results"] if r["mode"] == "train"]

    def mean(least, dtype, layouts):
        fits = [r for r in trained if r["bytes"] >= least and r["dtype"] == dtype and r["layout"] in layouts]
        return statistics.geometric_mean(r["times_faster"]["median"] for r in fits if r["operation"] == "bn+relu")

    assert f"more is {mean(25e6, 'float32', ['contiguous']):.1f} times as fast as torch's where" in text
    assert f"contiguous and {mean(25e6, 'float32', ['channels_last']):.1f} channels-last" in text
    assert f"1 MB and more {mean(1e6, 'bfloat16', ['contiguous', 'channels_last']):.1f} times" in text
    small = min(r["times_faster"]["median"] for r in trained if r["bytes"] < 65536)
    assert f"under 64 KB train at least {small:.2f} times as fast" in text
    both = [mean(25e6, "float32", [layout]) for layout in ("contiguous", "channels_last")]
    assert f"become {both[0]:.1f} and {both[1]:.1f}." in " ".join(README.split())
    lowest = min(kernels["results"], key=lambda r: r["times_faster"]["median"])
    assert f"all {len(kernels['results'])} is {lowest['name']}, {lowest['times_faster']['median']:.2f}." in text


def test_the_speeds_of_readme_are_those_of_the_committed_benchmarks():
    text = " ".join(README.split())
    kernels = measured("kernels")
    assert kernels["complete"]
    assert f"all {len(kernels['results'])} cases" in text
    large = [r for r in kernels["results"] if r["bytes"] >= 25e6 and r["dtype"] == "float32" and r["mode"] == "train"]
    for layout, words in (("contiguous", "times as fast as torch's"), ("channels_last", "channels-last")):
        ratios = [r["times_faster"]["median"] for r in large if r["layout"] == layout and r["operation"] == "bn+relu"]
        assert len(ratios) == 3
        assert f"{statistics.geometric_mean(ratios):.1f} {words}" in text
    allocators = [r["times_faster_than_untuned"]["median"] for r in measured("allocators")["results"]]
    assert f"{min(allocators):.1f} times" in text
    for model in measured("models")["results"]:
        assert f"{model['times_faster']['median']:.2f} and {model['times_faster_than_untuned']['median']:.2f}" in text


def test_what_readme_says_of_small_batches_is_in_the_committed_benchmark():
    records = measured("small_batches")["results"]

    def span(records):
        ratios = [record["times_faster"]["median"] for record in records]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    planes = [record for record in records if 2 <= record["positions"] <= 15]
    others = [record for record in records if record not in planes]
    assert all(record["bytes"] < 65536 for record in others)
    relu, none = (span(r for r in others if r["activation"] == activation) for activation in ("relu", "none"))
    text = " ".join(README.split())
    assert f"under 64 KB is {relu} with ReLU fused and {none} without an activation" in text
    assert f"on planes of 2 to 15 positions it is {span(planes)}, so torch is faster there" in text
