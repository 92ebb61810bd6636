"""`examples/finetune.py` as a user runs it, on a tiny model: data, masking, tables, resuming."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from helpers.training import word_tokenizer
from spallm_convert import SketchConfig, convert, load_sketched

EXAMPLES = Path(__file__).parent.parent / "examples"
RECORDS = [
    {"instruction": f"word{number} word{number + 1}", "output": f"word{number + 2}"}
    for number in range(40)
]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "finetune", raising=False)  # a benchmark has this name too
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    """A sketched model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "model"
    convert(tiny_llama.folder, folder, SketchConfig(effort="fast", groups_per_row=2))
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Runs the example with options; returns the folder of its tables."""

    def run(*options, records=RECORDS, name="train.json"):
        import finetune

        data = tmp_path / name
        lines = "\n".join(map(json.dumps, records))
        data.write_text(lines if name.endswith(".jsonl") else json.dumps(records))
        output = tmp_path / "tuned"
        arguments = [str(base), str(data), "--output", str(output), "--epochs", "2"]
        arguments += ["--held-out", "8", "--learning-rate", "1e-2", "--batch-size", "8"]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments, *options])
        finetune.main()
        return output

    return run


def test_tables_that_were_tuned_lower_the_held_out_loss(run, base, capsys):
    output = run("--gradient-checkpointing")
    printed = capsys.readouterr().out
    assert "trainable: " in printed
    assert sorted(path.name for path in output.glob("*.safetensors")) == [
        "sketch_tables.safetensors"
    ]
    tuned, untuned = (
        held_out_loss(load_sketched(base, dtype=torch.float32, tables=tables))
        for tables in (output, None)
    )
    assert tuned < 0.95 * untuned
    assert f"held-out loss {tuned:.4f}" in printed


def test_the_loss_counts_answers_only():
    import finetune

    tokenizer = word_tokenizer()
    record = {"instruction": "word1 word2", "input": "word3", "output": "word4 word5"}
    (example,) = finetune.encode([record], tokenizer, 512)
    answer = [*tokenizer("word4 word5")["input_ids"], tokenizer.eos_token_id]
    assert example["input_ids"][-3:] == example["labels"][-3:] == answer
    assert set(example["labels"][:-3]) == {finetune.IGNORED}
    assert tokenizer("word3")["input_ids"][0] in example["input_ids"]
    assert finetune.encode([record], tokenizer, 4) == []


def test_batches_are_padded_where_nothing_is_counted():
    import finetune

    batch = finetune.Collator(word_tokenizer())(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_json_lines_and_a_choice_of_modules(run, capsys):
    split = RECORDS[0] | {"output": "word2\u2028word3"}  # a line ends at a line feed only
    run("--tables", "*.mlp.*", "--norms", records=[split, *RECORDS[1:]], name="train.jsonl")
    printed = capsys.readouterr().out
    tables = 2 * (160 + 160 + 64) * 2 * 16
    assert f"sketch tables  {tables:,} of 36,864" in printed
    assert "others         320" in printed  # five norms of 64


def test_a_run_goes_on_from_its_last_checkpoint(run, monkeypatch, capsys):
    output = run("--checkpoints", "--resume")
    assert "checkpoints yet: training from the start" in capsys.readouterr().out
    whole = (output / "sketch_tables.safetensors").read_bytes()
    _, last = sorted((output / "checkpoints").iterdir())
    shutil.rmtree(last)
    trained = []
    monkeypatch.setattr(
        Trainer,
        "training_step",
        lambda *a, step=Trainer.training_step: trained.append(1) or step(*a),
    )
    run("--checkpoints", "--resume", "--overwrite")
    assert len(trained) == 8  # of the second epoch: 4 steps of two parts
    assert (output / "sketch_tables.safetensors").read_bytes() == whole


def test_tables_that_are_there_are_kept(run, capsys):
    output = run()
    before = (output / "sketch_tables.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        run()
    assert "--overwrite replaces them" in capsys.readouterr().err
    assert (output / "sketch_tables.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"question": "?"}],
            "record 0: found the keys 'question', expected 'instruction' and 'output'",
        ),
        (
            ["text"],
            "record 0: found a value of type str, expected an object with 'instruction' and",
        ),
        (RECORDS[:8], "found 8 examples, and the first 8 are held out; pass a smaller --held-out"),
    ],
)
def test_data_that_cannot_be_used(run, records, message):
    with pytest.raises(SystemExit, match=message):
        run(records=records)


def test_files_that_cannot_be_read(tmp_path):
    import finetune

    with pytest.raises(SystemExit, match="no such file"):
        finetune.read_records(str(tmp_path / "trian.json"))
    (tmp_path / "train.ndjson").write_text('{"instruction": 1,')
    with pytest.raises(SystemExit, match=r"train\.ndjson, line 1: not JSON"):
        finetune.read_records(str(tmp_path / "train.ndjson"))


def held_out_loss(model):
    import finetune

    tokenizer = word_tokenizer()
    batch = finetune.Collator(tokenizer)(finetune.encode(RECORDS[:8], tokenizer, 512))
    with torch.no_grad():
        return model.eval()(**batch).loss.item()
