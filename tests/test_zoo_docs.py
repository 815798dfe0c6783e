"""docs/zoo.md quotes the committed results of benchmarks/zoo.py."""

from support import ROOT, benchmark_results, benchmark_script

PAGE = (ROOT / "docs/zoo.md").read_text()


def test_the_sentences_and_tables_of_the_page_are_those_of_the_committed_file():
    assert benchmark_script("zoo_table").filled(PAGE, benchmark_results("zoo")) == PAGE


def test_no_fault_is_left_in_the_committed_results():
    rows = [row for row in benchmark_results("zoo")["rows"] if "error" not in row]
    faults = {
        row["model"]: outcome["faults"] for row in rows for outcome in row["operations"].values() if "faults" in outcome
    }
    assert faults == {}
