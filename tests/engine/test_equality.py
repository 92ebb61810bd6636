"""vLLM answers as transformers does, for every kind of sketched model."""

import pytest

from helpers.engine_models import KINDS, check_answers, prompts
from helpers.engine_runs import job, run_jobs


@pytest.fixture(scope="module")
def answers(sketched, tmp_path_factory):
    batch = [(prompt, None) for prompt in prompts()]
    jobs = [job(sketched(kind), [batch]) for kind in KINDS]
    found, output = run_jobs(jobs, tmp_path_factory.mktemp("equality"))
    return dict(zip(KINDS, found, strict=True)), output


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_that_of_transformers(sketched, answers, kind):
    assert isinstance(answers[0][kind], list), answers[0][kind]
    check_answers(sketched(kind), answers[0][kind])


def test_nothing_is_served_dense(answers):
    assert "served dense" not in answers[1]
