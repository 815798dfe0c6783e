"""The page on surgery: its table of whole steps is that of the committed results."""

from support import ROOT, benchmark_results, benchmark_script

PAGE = (ROOT / "docs/surgery.md").read_text()


def test_the_table_of_whole_steps_is_that_of_the_committed_results():
    rows = benchmark_results("accelerated_models")["rows"]
    shown = PAGE.partition("<!-- accelerated_models.json -->\n")[2].partition("<!-- /accelerated_models.json -->")[0]
    assert shown.strip() == benchmark_script("accelerated_models").table(rows)


def test_the_sentence_about_whole_steps_holds_for_the_table():
    rows = benchmark_results("accelerated_models")["rows"]
    slowest = min(row["training_ratio"] for row in rows)
    fastest = max(row["training_ratio"] for row in rows)
    assert f"take {slowest:.2f} to {fastest:.2f} times as long with torch's layers" in " ".join(PAGE.split())
