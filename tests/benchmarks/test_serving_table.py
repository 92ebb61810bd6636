"""docs/serving.md shows the figures of benchmarks/results/serving.json, and no others."""

import json

from benchmarks.serving.table import PAGE, tables
from benchmarks.shared.machine import RESULTS


def test_the_page_shows_the_tables_of_the_results():
    page = PAGE.read_text()
    for table in tables(json.loads((RESULTS / "serving.json").read_text())):
        assert table in page
