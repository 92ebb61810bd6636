"""All tables of an engine are swapped while it runs."""

import pytest

from helpers.engine_models import check_answers, prompts
from helpers.engine_runs import job, run_jobs

EXTENSION = "spallm_convert.serving.worker.TablesExtension"


def test_answers_are_those_of_the_set_that_is_in(sketched, sets, tmp_path):
    kind = "mixtral"
    folders = sets(kind)
    batch = [(prompt, None) for prompt in prompts()]
    batches = [
        batch,
        ["load_tables", str(folders["A"]), "A"],
        batch,
        ["load_tables", str(folders["B"]), "B"],
        batch,
        ["set_tables"],
        batch,
        ["set_tables", "A"],
        batch,
    ]
    ((answers,), _) = run_jobs(
        [job(sketched(kind), batches, worker_extension_cls=EXTENSION)], tmp_path
    )
    assert isinstance(answers, list), answers
    for place, name in enumerate([None, "A", "B", None, "A"]):
        for answer in answers[3 * place : 3 * place + 3]:
            answer["set"] = name
    check_answers(sketched(kind), answers, folders)


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_tables_that_a_trainer_pushes(sketched, sets, tmp_path, kind):
    folders = sets(kind)
    batch = [(prompt, None) for prompt in prompts()]
    batches = [["push", str(folders["A"])], batch, ["push", str(folders["B"])], batch]
    ((answers,), _) = run_jobs([job(sketched(kind), batches)], tmp_path)
    assert isinstance(answers, list), answers
    for place, name in enumerate("AB"):
        for answer in answers[3 * place : 3 * place + 3]:
            answer["set"] = name
    check_answers(sketched(kind), answers, folders)


def test_foreign_tables_and_unknown_names_are_refused(sketched, sets, tmp_path):
    foreign = str(sets("tied")["A"])
    jobs = [
        job(sketched("mixtral"), [batch], worker_extension_cls=EXTENSION)
        for batch in (
            ["load_tables", foreign],
            ["load_tables", foreign, "base"],
            ["load_tables", str(tmp_path)],
            ["set_tables", "tuned"],
        )
    ]
    found, _ = run_jobs(jobs, tmp_path)
    assert "sketch tables refused" in found[0]
    assert "made for index maps" in found[0]
    assert "the name 'base' belongs to the tables that the engine started with" in found[1]
    assert "No such file" in found[2]
    assert "no set of tables is called 'tuned'" in found[3]
