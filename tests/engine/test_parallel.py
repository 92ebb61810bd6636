"""Models split between processes: tensor parallelism, experts, and torch.compile."""

import pytest

from helpers.engine_models import check_answers, prompts
from helpers.engine_runs import job, run_jobs


def run(sketched, kind, tmp_path, folders=None, **options):
    names = [None, "A", "B"] if folders else [None]
    batch = [(prompt, name) for prompt in prompts() for name in names]
    ((answers,), output) = run_jobs([job(sketched(kind), [batch], folders, **options)], tmp_path)
    assert isinstance(answers, list), f"{answers}\n{output[-8000:]}"
    check_answers(sketched(kind), answers, folders)


@pytest.mark.parametrize("kind", ["mixed", "tied", "mixtral"])
def test_split_between_two_processes_with_sets(sketched, sets, tmp_path, kind):
    run(sketched, kind, tmp_path, sets(kind), tensor_parallel_size=2)


def test_experts_shared_out(sketched, tmp_path):
    run(sketched, "gpt-oss", tmp_path, tensor_parallel_size=2, enable_expert_parallel=True)


def test_experts_of_gpt_oss_are_not_split(sketched, tmp_path):
    jobs = [job(sketched("gpt-oss"), [[(prompts(1)[0], None)]], tensor_parallel_size=2)]
    ((error,), output) = run_jobs(jobs, tmp_path)
    assert isinstance(error, str)
    assert "share whole experts out: --enable-expert-parallel" in error + output


def test_compiled(sketched, tmp_path):
    run(sketched, "mixed", tmp_path, enforce_eager=False)
