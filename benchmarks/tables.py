"""Put the tables of benchmarks/results into docs/benchmarks.md: python benchmarks/tables.py."""

from __future__ import annotations

from pathlib import Path

from batchnorm.lab.bench.markdown import fill_page

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/benchmarks.md"

if __name__ == "__main__":
    PAGE.write_text(fill_page(PAGE.read_text(), ROOT / "benchmarks/results"))
