"""The page on performance shows the figures of the committed results, and nothing else."""

import json

from benchmarks.gpu.bars import add_shares, judge
from benchmarks.gpu.roofline import read
from benchmarks.gpu.table import tables
from benchmarks.shared.machine import RESULTS, ROOT


def test_the_page_shows_the_tables_of_the_results():
    page = (ROOT / "docs/performance.md").read_text()
    found = tables(read(RESULTS / "gpu.json"))
    assert len(found) == 10
    for table in found:
        assert table in page


def test_the_verdicts_follow_from_the_figures_of_the_same_file():
    document = json.loads((RESULTS / "gpu.json").read_text())
    add_shares(document["sections"])
    assert judge(document["sections"]) == document["bars"]
    assert document["tests"]["status"] == "passed"
