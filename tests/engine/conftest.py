"""Tiny sketched models and sets of tables for the tests with vLLM's engine (`make test-vllm`)."""

import pytest

from helpers.engine_models import save_sets, save_sketched


@pytest.fixture(scope="session")
def sketched(tmp_path_factory):
    """Return the folder of a sketched model by its kind; each is made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = save_sketched(kind, tmp_path_factory.mktemp("models"))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def sets(sketched):
    """Return the folders of sets A to D by the kind of their model. D is affine."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = save_sets(sketched(kind), "ABCD", affine="D")
        return made[kind]

    return get
