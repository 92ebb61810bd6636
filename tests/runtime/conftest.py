"""A sketched model that many tests here load."""

import pytest

from spallm_convert import SketchConfig, convert


@pytest.fixture(scope="session")
def sketched_llama(tiny_llama, tmp_path_factory):
    """Two groups per row, clustered, tables in bfloat16."""
    folder = tmp_path_factory.mktemp("sketched-llama") / "out"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
    return folder
