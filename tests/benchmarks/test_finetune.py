"""The fine-tuning benchmark without its peers: runs end to end, data, evaluation, what is kept."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.finetune import seeds
from helpers.tiny_models import save_tiny_llama
from spallm_convert import OptionError, SketchConfig, convert

ROOT = Path(__file__).parents[2]
ANSWER = "the correct answer is "
SMOLLM2 = {
    f"{block}.{name}": shape
    for block in range(30)
    for name, shape in {
        "q": (576, 576),
        "k": (192, 576),
        "v": (192, 576),
        "o": (576, 576),
        "gate": (1536, 576),
        "up": (1536, 576),
        "down": (576, 1536),
    }.items()
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", vocab_size=257, attention_bias=False
    ).folder
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def record(number, answer, options="answer1/answer2"):
    instruction = f"Question {number}?\n\nAnswer format: {options}"
    return {"instruction": instruction, "input": "", "output": ANSWER + answer, "answer": answer}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 7), ("test", 3)):
        records = [record(number, f"answer{1 + number % 2}") for number in range(count)]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def run(tmp_path, *options):
    """The command line in this process; runs too, but for importing they are the same."""
    from benchmarks.finetune import __main__ as finetune

    common = ("--cache", tmp_path / "cache", "--output", tmp_path / "finetune.json")
    arguments = [str(option) for option in (*options, *common, "--device", "cpu")]
    return CliRunner().invoke(finetune.main, arguments)


def document(tmp_path):
    return json.loads((tmp_path / "finetune.json").read_text())


@pytest.fixture
def in_process(monkeypatch):
    """Jobs go through JSON as they do on their way to a process. Lists what was run."""
    from benchmarks.finetune import __main__ as finetune
    from benchmarks.finetune import one_run

    jobs = []

    def run_job(job, scratch):
        jobs.append((job.methods, job.learning_rate))
        carry_out = one_run.time_in_turn if job.in_turn else one_run.train
        return json.loads(json.dumps(carry_out(job)))

    monkeypatch.setattr(finetune, "run_job", run_job)
    return jobs


def test_a_run_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "finetune.json"
    folders = (ROOT, ROOT / "formats", ROOT / "kernels")
    options = ("--shape", "tiny", "--method", "sketch-2bit-gpr4", "--device", "cpu")
    few = ("--steps", "3", "--batch-size", "2", "--tokens", "8")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.finetune", *options, *few),
            *("--cache", tmp_path / "cache", "--output", output),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = document(tmp_path)["runs"]
    assert row["trainable_parameters"] == 2 * (64 + 32 + 32 + 64 + 160 + 160 + 64) * 4 * 4
    assert len(row["train_loss"]) == 3
    assert "held_out" not in row
    memory = row["memory"]
    assert memory["optimizer_bytes"] == 2 * 4 * row["trainable_parameters"]
    assert 0 < memory["rise_bytes"] == memory["peak_bytes"] - memory["idle_bytes"]
    assert document(tmp_path)["summary"][0]["held_out_loss"] is None


def test_what_is_done_is_not_done_again(tmp_path, in_process, model, data):
    options = ("--model", model, "--data", data, "--steps", 2, "--batch-size", 2, "--held-out", 3)
    methods = ("--method", "sketch-4bit-gpr1", "--method", "full")
    sketch = ("sketch-4bit-gpr1",)
    result = run(tmp_path, *options, *methods, "--sketch-rates", "1e-3", "--full-rates", "1e-3")
    assert result.exit_code == 0, result.output
    assert in_process == [(sketch, None), (sketch, 1e-3), (("full",), None), (("full",), 1e-3)]
    in_process.clear()
    rates = ("--sketch-rates", "3e-2,1e-3", "--full-rates", "1e-3")
    assert run(tmp_path, *options, *methods, *rates).exit_code == 0
    assert in_process == [(sketch, 3e-2)]

    found = document(tmp_path)
    assert [row["base"] for row in found["runs"]] == [
        *("sketch-4bit-gpr1", "sketch-4bit-gpr1", "dense", "dense", "sketch-4bit-gpr1")
    ]
    before = {r["base"]: r["held_out"]["loss"] for r in found["runs"] if not r["learning_rate"]}
    losses = {row["method"]: row["held_out_loss"] for row in found["summary"]}
    assert losses["sketch-4bit-gpr1"] < before["sketch-4bit-gpr1"]
    assert losses["full"] < before["dense"]
    in_process.clear()
    result = run(tmp_path, *options, *methods, "--speed", 2)
    assert result.exit_code == 0, result.output
    assert document(tmp_path)["runs"] == found["runs"]
    speeds = document(tmp_path)["speed"]["methods"]
    assert speeds["sketch-4bit-gpr1"]["relative"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    assert speeds["full"]["relative"]["p50"] > 0


def test_a_file_of_other_settings_is_refused(tmp_path, in_process, model, data):
    common = ("--model", model, "--data", data, "--method", "full", "--full-rates", "1e-3")
    options = (*common, "--batch-size", 1, "--held-out", 1, "--steps")
    assert run(tmp_path, *options, 2).exit_code == 0
    before = document(tmp_path)
    result = run(tmp_path, *options, 3)
    assert result.exit_code == 1
    assert "settings.steps: 2 in the file, 3 now" in result.output
    assert document(tmp_path) == before
    assert run(tmp_path, *options, 3, "--fresh").exit_code == 0
    assert document(tmp_path)["settings"]["steps"] == 3
    (tmp_path / "finetune.json").write_text("{")
    assert "is not JSON" in run(tmp_path, *options, 3).output
    (tmp_path / "finetune.json").write_text('{"benchmark": "memory"}')
    assert "benchmark: 'memory' in the file, 'finetune' now" in run(tmp_path, *options, 3).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --data or --shape"),
        (("--shape", "1.3b", "--method", "full"), "--shape tiny runs on the CPU"),
        (("--shape", "tiny", "--method", "full", "--full-rates", "fast"), "'fast' is not a list"),
        (("--shape", "tiny", "--method", "full", "--full-rates", "0"), "must be above 0, found 0"),
        (("--shape", "tiny", "--method", "qlora-r4"), "not installed: bitsandbytes, peft"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, monkeypatch, options, message):
    from benchmarks.finetune import __main__ as finetune

    monkeypatch.setattr(finetune.importlib.util, "find_spec", lambda name: None)
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_batches_depend_on_the_seed_alone_and_prompts_do_not_count(tokenizer, data):
    from benchmarks.finetune.data import load_data

    options = {"steps": 3, "batch_size": 4, "held_out": 2, "max_length": 200}
    loaded = load_data(data, tokenizer, **options, seed=1)
    again = load_data(data, tokenizer, **options, seed=1)
    other = load_data(data, tokenizer, **options, seed=2)
    texts = {
        name: [tokenizer.decode(ids) for batch in found.batches for ids in batch["input_ids"]]
        for name, found in {"loaded": loaded, "again": again, "other": other}.items()
    }
    assert texts["loaded"] == texts["again"] != texts["other"]
    assert len(set(texts["loaded"][:7])) == 7  # all of them before one comes again
    for batch in loaded.batches:
        for ids, labels, mask in zip(*(batch[name] for name in batch), strict=True):
            counted = tokenizer.decode(ids[labels != -100])
            assert counted in (f"{ANSWER}answer1<end>", f"{ANSWER}answer2<end>")
            assert int(mask.sum()) == len(tokenizer.decode(ids).split("<end>")[0]) + 1


@torch.no_grad()
def plain_likelihood(model, prompt, ids):
    logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return float(sum(logits[len(prompt) - 1 + n, token] for n, token in enumerate(ids)))


@pytest.mark.parametrize("options", ["answer1/answer2/answer3", "yes/no/maybe not"])
def test_loss_and_accuracy_are_those_of_the_plain_way(model, tokenizer, options):
    """Options that share a pass with the example, and options that need one of their own."""
    from transformers import AutoModelForCausalLM

    from benchmarks.finetune.data import Data, ask, evaluate

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in loaded.parameters():  # far from initialisation, or all options are alike
        parameter.data += 0.3 * torch.randn_like(parameter)
    choices = options.split("/")
    records = [record(n, choices[n % len(choices)], options) for n in range(5)]
    questions = [ask(one, tokenizer, 200) for one in records]
    found = evaluate(loaded, Data([], questions, 256), 2, contextlib.nullcontext())

    total = counted = right = chosen = 0
    for one in records:
        prompt = tokenizer(f"### Instruction:\n{one['instruction']}\n\n### Response:\n")[
            "input_ids"
        ]
        ids = tokenizer(one["output"])["input_ids"] + [256]
        total -= plain_likelihood(loaded, prompt, ids)
        counted += len(ids)
        scores = {
            choice: plain_likelihood(loaded, prompt, tokenizer(ANSWER + choice)["input_ids"])
            for choice in choices
        }
        right += max(scores, key=scores.get) == one["answer"]
        odds = {choice: math.exp(score) for choice, score in scores.items()}
        chosen -= math.log(odds[one["answer"]] / sum(odds.values()))
    assert found["loss"] == pytest.approx(total / counted, rel=1e-4)
    assert found["option_loss"] == pytest.approx(chosen / 5, rel=1e-3)
    assert found["accuracy"] == right / 5


def test_records_that_offer_no_options_are_refused(tokenizer, data, tmp_path):
    from benchmarks.finetune.data import ask, load_data

    with pytest.raises(OptionError, match="one of the options that it offers; found output"):
        ask(record(1, "answer3"), tokenizer, 200)
    assert ask(record(1, "answer1"), tokenizer, 8) is None
    options = {"steps": 1, "batch_size": 1, "max_length": 200, "seed": 0}
    with pytest.raises(OptionError, match=r"has no train\.json and no test\.json"):
        load_data(tmp_path, tokenizer, held_out=1, **options)
    with pytest.raises(OptionError, match="has 3 records, 4 are to be held out"):
        load_data(data, tokenizer, held_out=4, **options)


def test_options_that_are_spelled_out_are_answers_in_words():
    from benchmarks.finetune.data import in_words, offered

    spelled = record(1, "answer2") | {
        "instruction": "Please choose the correct answer to the question: What is red?\n\n"
        "Answer1: the sky Answer2: a rose: Answer3: 3 \n\nAnswer format: answer1/answer2/answer3"
    }
    found = in_words(spelled)
    assert (found["instruction"], found["output"]) == ("What is red?", "a rose:")
    assert offered(found) == ["the sky", "a rose:", "3"]
    assert in_words(record(1, "answer1")) == record(1, "answer1")


def test_the_matched_rank_is_the_largest_within_the_tables_parameters():
    from benchmarks.finetune.methods import METHODS, adapter_parameters, matched_rank, table_entries

    budget = table_entries(SMOLLM2, 4, 4)
    assert budget == 9_953_280
    assert METHODS["lora-matched"].rank_for(SMOLLM2) == 32
    assert adapter_parameters(SMOLLM2, 32) <= budget < adapter_parameters(SMOLLM2, 33)
    assert matched_rank(SMOLLM2, adapter_parameters(SMOLLM2, 7)) == 7
    assert matched_rank(SMOLLM2, 1) == 1
    assert METHODS["qlora-r16"].rank_for(SMOLLM2) == 16


@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (4, 4)])
def test_adapters_of_small_ranks_are_as_large_as_affine_sets(groups, rank):
    from benchmarks.finetune.methods import METHODS, adapter_parameters, table_entries

    numbers = 2 * table_entries(SMOLLM2, 0, groups)
    assert METHODS[f"affine-4bit-gpr{groups}"].groups == groups
    assert adapter_parameters(SMOLLM2, rank) == pytest.approx(numbers, rel=0.02)


def test_steps_of_scales_are_as_large_in_the_weights_as_steps_of_shifts(model, tmp_path):
    from benchmarks.finetune.methods import METHODS, load, parameter_groups

    method = METHODS["affine-4bit-gpr4"]
    convert(model, tmp_path / "out", SketchConfig(effort="fast", bits=4, groups_per_row=4))
    affine = load(method, 0, tmp_path / "out", "cpu")
    shifts, scales = parameter_groups(affine, 1e-3)
    assert len(shifts["params"]) == len(scales["params"]) == 14
    assert shifts["lr"] == 1e-3
    tables = [p for name, p in affine.named_parameters() if name.endswith("_table")]
    rms = torch.cat([table.flatten() for table in tables]).square().mean().sqrt().item()
    assert scales["lr"] * rms == pytest.approx(1e-3)


def test_layers_with_adapters_are_those_that_are_sketched(model):
    from benchmarks.shared.dense import read_linears

    linears = read_linears(model)
    assert len(linears) == 14
    assert linears["model.layers.0.mlp.down_proj"] == (64, 160)


def test_the_learning_rate_goes_up_and_then_down():
    from benchmarks.finetune.one_run import rate_factor

    factors = [rate_factor(step, 40) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 37)
    assert [rate_factor(step, 2) for step in range(2)] == [1.0, 0.5]


def finished(method, rate, loss, **changes):
    return {
        "method": method,
        "learning_rate": rate,
        "held_out": {"loss": loss, "option_loss": 1.0, "accuracy": 0.5},
        "trainable_parameters": 1,
        "model_bytes": 1,
        "memory": {"peak_bytes": 1, "rise_bytes": 1},
        "diverged": False,
    } | changes


def test_a_method_is_judged_by_its_best_rate():
    from benchmarks.finetune.schedule import summarise

    diverged = finished("full", 1e-2, 0.0, diverged=True)
    del diverged["held_out"]
    rows = summarise(
        [
            finished("full", None, 9.0),
            finished("full", 1e-5, 0.7),
            finished("full", 1e-4, 0.6),
            finished("full", 1e-3, 0.8),
            diverged,
            finished("lora-r4", 1e-4, None),
            finished("lora-r4", 1e-3, 0.5),
            finished("lora-r4", 1e-2, 0.9),
        ]
    )
    found = [(r["method"], r["learning_rate"], r["held_out_loss"], r["rate_at_end"]) for r in rows]
    assert found == [("lora-r4", 1e-3, 0.5, True), ("full", 1e-4, 0.6, False)]


def test_there_is_nothing_to_draw_without_held_out_losses(tmp_path):
    from benchmarks.finetune import plot
    from benchmarks.shared.drawing import PlotError

    with pytest.raises(
        PlotError, match=r"does not exist: `python -m benchmarks\.finetune` writes it"
    ):
        plot.read(tmp_path / "finetune.json")
    (tmp_path / "finetune.json").write_text('{"summary": [{"held_out_loss": null}]}')
    with pytest.raises(PlotError, match="has no held-out losses"):
        plot.read(tmp_path / "finetune.json")


def test_the_page_shows_the_table_of_the_seeds():
    assert seeds.table() in seeds.PAGE.read_text()
