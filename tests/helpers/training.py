"""Share parts of the training tests: data that can be learned, a Trainer, and its results."""

from __future__ import annotations

import dataclasses

import torch

#: Token ids of the tiny models that sequences use; 0 and 1 stay free.
_FIRST, _IDS = 2, 126


def counting(rows=24, length=16):
    """Return sequences that count up from random starts, as a dataset and as labelled examples."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, _IDS, (rows, 1), generator=generator)
    tokens = (starts + torch.arange(length)) % _IDS + _FIRST
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def word_tokenizer():
    """Return a tokenizer for the tiny models: "word0" to "word125", 0 is the end, 1 all else."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": _FIRST + number for number in range(_IDS)}
    made = Tokenizer(models.WordLevel({"<end>": 0, "<unknown>": 1} | words, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


def trainer(model, output, *, evaluation=None, callbacks=(), **options):
    """Return transformers' Trainer on counting sequences, on the CPU, four of them per step."""
    from transformers import Trainer, TrainingArguments

    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(output), **defaults | options)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=counting(),
        eval_dataset=evaluation,
        callbacks=list(callbacks),
    )


def checkpointing(*, reentrant):
    """Return options of Trainer that recompute activations, under the names that it knows."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing" in names  # gradient_checkpointing before transformers 5.23
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


def losses(trainer):
    """Return the loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    """Return a copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(model, other):
    """The same parameters, bit for bit, in the same dtypes."""
    found, expected = parameters(model), parameters(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def assert_close(found, expected):
    """Equal, but for sums over a batch that were taken in another order."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # AdamW divides by the size of a gradient, so an entry with hardly any may go either way.
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=1e-3, atol=1e-4)
