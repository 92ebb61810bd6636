"""Provide the data and tests of the fine-tuning benchmark: batches, held-out loss, accuracy.

Template, masking and padding are those of examples/finetune.py, which is loaded unchanged. Batches
depend only on the seed, so every method sees the same examples in the same order.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from benchmarks.shared.machine import ROOT
from spallm_convert.errors import OptionError
from spallm_convert.source.records import json_records, objects

TRAIN_FILE, TEST_FILE = "train.json", "test.json"

Batch = dict[str, Tensor]
Example = dict[str, Any]

_EXAMPLE = ROOT / "examples" / "finetune.py"
_FORMAT = "Answer format:"
_SPELLED = re.compile(r"\bAnswer(\d+): ")


@dataclass(frozen=True)
class Question:
    """Hold a held-out record: its example as in training, its options, and the right one.

    An option is the whole completion without the final token.
    """

    example: Example
    options: list[list[int]]
    right: int


@dataclass(frozen=True)
class Data:
    """Hold training batches and held-out questions. Without questions nothing is evaluated."""

    batches: list[Batch]
    questions: list[Question]
    pad: int


def load_data(
    folder: Path,
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int,
    held_out: int,
    max_length: int,
    seed: int,
) -> Data:
    """Read `train.json` and the first records of `test.json`.

    Raises OptionError if a file is missing or holds too little, or a held-out record has no
    options, and SourceError if a file does not hold records with an instruction and an output.
    """
    example = load_example()
    paths = [folder / name for name in (TRAIN_FILE, TEST_FILE)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise OptionError(f"{folder} has no {' and no '.join(missing)}")
    needed = ("instruction", "output")
    train, test = (list(map(in_words, objects(json_records(path), needed))) for path in paths)
    if len(test) < held_out:
        raise OptionError(f"{paths[1]} has {len(test)} records, {held_out} are to be held out")
    encoded = example.encode(train, tokenizer, max_length)
    if not encoded:
        raise OptionError(f"{paths[0]} has no example of at most {max_length} tokens")
    collate = example.Collator(tokenizer)
    order = example_order(len(encoded), steps * batch_size, seed)
    batches = [
        collate([encoded[index] for index in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    ]
    questions = [ask(record, tokenizer, max_length) for record in test[:held_out]]
    return Data(batches, [question for question in questions if question], collate.pad)


def random_data(vocabulary: int, *, steps: int, batch_size: int, tokens: int, seed: int) -> Data:
    """Return batches of random tokens, all of which count: for memory and speed, not quality."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, vocabulary, (batch_size, tokens), generator=generator)
        batches.append({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    return Data(batches, [], 0)


def load_example() -> ModuleType:
    """Load examples/finetune.py as a module."""
    name = "finetune_example"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _EXAMPLE)
        if spec is None or spec.loader is None:
            raise OptionError(f"{_EXAMPLE} cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def example_order(examples: int, count: int, seed: int) -> list[int]:
    """Return the first `count` indices of repeated permutations of all examples."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(examples, generator=generator).tolist()
    return order[:count]


def in_words(record: dict[str, Any]) -> dict[str, Any]:
    """Spell out the options of a question, and answer with the words of the right option.

    A small model knows something about the words, but not about the number of an option. Learning
    more than the form of an answer would take thousands of examples. Other records are not changed.
    """
    question, _, rest = record["instruction"].partition("\n\nAnswer1: ")
    if not rest:
        return record
    spelled = _SPELLED.split("Answer1: " + rest.split("\n\n" + _FORMAT)[0])[1:]
    options = dict(zip(spelled[::2], map(str.strip, spelled[1::2]), strict=True))
    question = question.partition("to the question: ")[2] or question
    answer = options[record["answer"].removeprefix("answer")]
    return {
        "instruction": question,
        "output": answer,
        "answer": answer,
        "options": [*options.values()],
    }


def ask(record: dict[str, Any], tokenizer: Any, max_length: int) -> Question | None:
    """Turn a record into a question; return None if it is too long."""
    options, answer, output = offered(record), record["answer"], record["output"]
    if answer not in options or not output.endswith(answer):
        raise OptionError(
            f"a held-out record must end its output with one of the options that it offers; found "
            f"output {output!r}, answer {answer!r}, options {options!r}"
        )
    encoded = load_example().encode([record], tokenizer, max_length)
    if not encoded:
        return None
    lead = output.removesuffix(answer)
    ids = [tokenizer(lead + option, add_special_tokens=False)["input_ids"] for option in options]
    return Question(encoded[0], ids, options.index(answer))


def offered(record: dict[str, Any]) -> list[str]:
    """Return the options of a record: its own, or those in "Answer format: answer1/answer2/..."."""
    if "options" in record:
        return list(record["options"])
    _, found, options = record["instruction"].rpartition(_FORMAT)
    return [option.strip() for option in options.split("/")] if found else []


@torch.no_grad()
def evaluate(
    model: Any, data: Data, batch_size: int, autocast: AbstractContextManager[Any]
) -> dict[str, float]:
    """Evaluate a model on the held-out questions.

    loss: mean per token of the answers, as in training. option_loss: of choosing among the options
    of a question by their likelihoods; by chance it is ln(4) for four options. accuracy: fraction
    of questions whose right option is the most likely.
    """
    model.eval()
    loss = tokens = option_loss = right = 0.0
    device = next(model.parameters()).device
    for start in range(0, len(data.questions), batch_size):
        part = data.questions[start : start + batch_size]
        sequences = [sequence for question in part for sequence in _sequences(question)]
        with autocast:
            scores = iter(_scores(model, sequences, data.pad, device))
        for question in part:
            lead = _prompt(question.example)
            own = next(scores)
            answer = question.example["input_ids"][len(lead) :]
            loss -= _likelihood(own, len(lead), answer)
            tokens += len(answer)
            found = []
            for option in question.options:
                row = own if _is_carried(question, option) else next(scores)
                found.append(_likelihood(row, len(lead), option))
            option_loss -= float(log_softmax(torch.tensor(found), dim=0)[question.right])
            right += max(range(len(found)), key=found.__getitem__) == question.right
    count = len(data.questions)
    return {
        "loss": loss / tokens,
        "option_loss": option_loss / count,
        "accuracy": right / count,
    }


def _prompt(example: Example) -> list[int]:
    ignored = load_example().IGNORED
    return example["input_ids"][: example["labels"].count(ignored)]


def _sequences(question: Question) -> Iterator[list[int]]:
    """Return the example itself, then the options that it does not contain."""
    yield question.example["input_ids"]
    for option in question.options:
        if not _is_carried(question, option):
            yield _prompt(question.example) + option


def _is_carried(question: Question, option: list[int]) -> bool:
    """Return whether an option is the example's own answer up to its last token.

    If so, its likelihood is read from the same pass, because the last token is predicted, not read.
    """
    answer = question.example["input_ids"][len(_prompt(question.example)) :]
    return answer[: len(option) - 1] == option[:-1]


def _scores(
    model: Any, sequences: list[list[int]], pad: int, device: torch.device
) -> Iterator[Tensor]:
    """Return the logits of each sequence; sequences are padded on the right."""
    length = max(map(len, sequences))
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids in sequences], device=device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None]).long()
    yield from model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def _likelihood(logits: Tensor, start: int, ids: list[int]) -> float:
    """Return the log-likelihood of tokens that begin at a position."""
    rows = log_softmax(logits[start - 1 : start - 1 + len(ids)].float(), dim=-1)
    value = float(rows[torch.arange(len(ids)), ids].sum())
    return value if math.isfinite(value) else -math.inf
