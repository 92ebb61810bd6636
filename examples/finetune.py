"""Fine-tune a sketched model on instructions and save only its tables.

    spallm-convert meta-llama/Llama-3.2-1B -o base
    python examples/finetune.py base train.json --output tuned

Data: a JSON or JSONL file, or a dataset on the Hub. The latter needs
`pip install 'spallm-convert[datasets]'`. Records have `instruction`, `input` (may be missing or
empty) and `output`; the loss counts the output only. Most defaults come from the SketchTune paper
(arXiv 2410.06364). docs/howto/train.md says which and why.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from spallm_convert import SourceError, load_sketched, save_tables, set_trainable
from spallm_convert.source.records import JSON_SUFFIXES, json_records, numbered, objects

IGNORED = -100  # label of tokens that the loss does not count
PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def main() -> None:
    options = parse()
    checkpoints = options.output / "checkpoints"
    resumed = options.resume and any(checkpoints.glob("checkpoint-*"))
    if options.resume and not resumed:
        print(f"no checkpoint in {checkpoints} yet: training from the start")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    records = read_records(options.data)
    held_out = encode(records[: options.held_out], tokenizer, options.max_length)
    train = encode(records[options.held_out :], tokenizer, options.max_length)
    if not train:
        raise SystemExit(
            f"{options.data}: no example is left to train on: found {len(records)} examples, and "
            f"the first {options.held_out} are held out; pass a smaller --held-out"
        )

    cuda = torch.cuda.is_available()
    # Norms need float32 to be trained: in bfloat16 most updates are lost. Tables are in float32
    # in any case.
    half = cuda and not options.norms
    model = load_sketched(options.model, dtype=torch.bfloat16 if half else torch.float32)
    if cuda:
        model.cuda()
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    print(set_trainable(model, options.tables or True, norms=options.norms))

    steps = options.epochs * -(-len(train) // options.batch_size)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=checkpoints,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.micro_batch_size,
            per_device_eval_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(100, steps // 10),
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=cuda,
            dataloader_pin_memory=cuda,
            eval_strategy="epoch" if held_out else "no",
            save_strategy="epoch" if options.checkpoints else "no",
            logging_steps=10,
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=Collator(tokenizer),
    )
    trainer.train(resume_from_checkpoint=resumed)
    if held_out:
        print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
    print(f"tables saved in {save_tables(model, options.output, overwrite=options.overwrite)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="sketched checkpoint: a folder or an id on the Hub")
    parser.add_argument("data", help="JSON or JSONL file, or a dataset on the Hub")
    parser.add_argument("--output", type=Path, default=Path("tuned"), help="folder for the tables")
    parser.add_argument("--overwrite", action="store_true", help="replace tables in the folder")
    parser.add_argument("--epochs", type=int, default=3, help="passes through the data")
    parser.add_argument("--batch-size", type=int, default=16, help="examples per step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples at once")
    parser.add_argument("--learning-rate", type=float, default=8e-5, help="highest rate of AdamW")
    parser.add_argument("--max-length", type=int, default=512, help="most tokens per example")
    parser.add_argument(
        "--held-out", type=int, default=200, help="first N examples, for evaluation"
    )
    parser.add_argument("--tables", action="append", help="pattern of modules to train")
    parser.add_argument("--norms", action="store_true", help="train normalization layers too")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--checkpoints", action="store_true", help="save after every epoch")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of examples")
    options = parser.parse_args()
    if options.batch_size % options.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    if (options.output / "sketch_tables.safetensors").exists() and not options.overwrite:
        parser.error(f"{options.output} already holds sketch tables; --overwrite replaces them")
    return options


def read_records(source: str) -> list[dict[str, Any]]:
    """Read the records of a JSON or JSONL file, or of the split `train` of a dataset on the Hub."""
    path = Path(source)
    if path.exists() or path.suffix.lower() in JSON_SUFFIXES:
        records = json_records(path)
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise SystemExit(
                f"{source}: no such file, and reading a dataset of the Hub needs the package "
                f"'datasets': pip install 'spallm-convert[datasets]'"
            ) from None
        records = numbered(source, load_dataset(source, split="train"))
    try:
        return objects(records, ("instruction", "output"))
    except SourceError as error:
        raise SystemExit(str(error)) from error


def encode(records: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Return token ids and labels. Labels of the prompt are ignored; long examples are left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded, overlong = [], 0
    for record in records:
        template = PROMPT_WITH_INPUT if record.get("input") else PROMPT
        prompt = tokenizer(template.format(**record))["input_ids"]
        answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer, *end]
        if len(ids) > max_length:
            overlong += 1
            continue
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        encoded.append({"input_ids": ids, "labels": labels})
    if overlong:
        print(
            f"{overlong} of {len(records)} examples are longer than {max_length} tokens, so they "
            f"are left out; pass a larger --max-length to keep them"
        )
    return encoded


class Collator:
    """Pad a batch on the right, to its longest example."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            self.pad = tokenizer.eos_token_id or 0  # padding is masked anyway

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)

        def padded(key: str, fill: int) -> torch.Tensor:
            rows = [e[key] + [fill] * (length - len(e[key])) for e in examples]
            return torch.tensor(rows)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }


if __name__ == "__main__":
    main()
