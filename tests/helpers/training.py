"""What the training tests share: data that can be learned, a Trainer, what came out of it."""

from __future__ import annotations

import dataclasses

import torch

#: Token ids of the tiny models that sequences use; 0 and 1 stay free.
_FIRST, _IDS = 2, 126


def counting(rows=24, length=16):
    """Sequences that count upwards from random starts, as a dataset and as labelled examples."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, _IDS, (rows, 1), generator=generator)
    tokens = (starts + torch.arange(length)) % _IDS + _FIRST
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def trainer(model, output, *, evaluation=None, callbacks=(), **options):
    """transformers' Trainer on sequences that count, on the CPU, four of them per step."""
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
    """Options of Trainer that have activations computed again, under the names that it knows."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing" in names  # gradient_checkpointing before transformers 5.23
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


def losses(trainer):
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    """A copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}
