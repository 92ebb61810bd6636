"""Requests with sets of tables of their own, together in one batch."""

import pytest

from helpers.engine_models import check_answers, prompts
from helpers.engine_runs import job, run_jobs

KINDS = ["mixed", "tied", "mixtral", "gpt-oss"]


def batch_of(*names):
    return [(prompt, name) for prompt in prompts() for name in names]


@pytest.fixture(scope="module")
def answers(sketched, sets, tmp_path_factory):
    # C takes the slot of A or B, and vLLM has forgotten C when it comes again
    batches = [batch_of(None, "A", "B"), batch_of("C", None), batch_of("A", "B", "C", "D")]
    jobs = [job(sketched(kind), batches, sets(kind)) for kind in KINDS]
    found, _ = run_jobs(jobs, tmp_path_factory.mktemp("sets"))
    return dict(zip(KINDS, found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_gets_its_own_tables(sketched, sets, answers, kind):
    assert isinstance(answers[kind], list), answers[kind]
    assert len(answers[kind]) == 3 * (3 + 2 + 4)
    check_answers(sketched(kind), answers[kind], sets(kind))


def test_sets_differ(answers):
    found = {
        name: [a["tokens"] for a in answers["mixed"][:9] if a["set"] == name]
        for name in [None, "A", "B"]
    }
    assert found[None] != found["A"] != found["B"] != found[None]
