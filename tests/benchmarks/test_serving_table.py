"""docs/serving.md shows the figures of the results files, and no others."""

import pytest

from benchmarks.serving.table import PAGE, TITLES, tables


@pytest.mark.parametrize("file", TITLES)
def test_the_page_shows_the_tables_of_the_results(file):
    page = PAGE.read_text()
    for table in tables(file):
        assert table in page
