"""Reinforcement learning with tables: vLLM answers, transformers trains, and tables go between.

    python examples/grpo_tables.py base --output tuned

Needs vLLM (docs/serving.md). After each step the tables, tens of megabytes, are saved and put into
the running engine; the index maps never move. The loss is GRPO's (arXiv 2402.03300) without its
penalty for distance from the base. The reward is a toy, to be replaced: the share of digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

PROMPTS = ["Count to ten: ", "My phone number is ", "The year was ", "Add 12 and 30: "]


def reward(text: str) -> float:
    """Return the share of an answer's characters that are digits."""
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def main() -> None:
    options = parse()
    gpu = torch.cuda.is_available()
    engine = LLM(
        options.model,
        worker_extension_cls="spallm_convert.serving.worker.TablesExtension",
        dtype="bfloat16" if gpu else "float32",
        enforce_eager=not gpu,  # compiling takes minutes on a CPU
        max_model_len=512,
        max_num_seqs=64,
        gpu_memory_utilization=0.4,  # the rest is for training
    )
    # After the engine has started: vLLM for CPUs does not start if numba has been imported.
    from spallm_convert import load_sketched, set_trainable

    model: Any = load_sketched(options.model, dtype=torch.bfloat16 if gpu else torch.float32)
    model.to("cuda" if gpu else "cpu")
    print(set_trainable(model))
    tables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tables, lr=options.learning_rate, weight_decay=0.0)
    for step in range(1, options.steps + 1):
        sampling = SamplingParams(n=options.group, max_tokens=options.tokens, logprobs=0, seed=step)
        groups = engine.generate(PROMPTS, sampling, use_tqdm=False)
        rewards = torch.tensor([[reward(a.text) for a in group.outputs] for group in groups])
        better = rewards - rewards.mean(1, keepdim=True)
        advantages = better / (rewards.std(1, keepdim=True) + 1e-4)
        apart = 0.0
        for group, advantage in zip(groups, advantages, strict=True):
            loss, distance = grpo_loss(model, group, advantage)
            torch.autograd.backward(loss / len(groups))
            apart = max(apart, distance)
        torch.nn.utils.clip_grad_norm_(tables, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        push(engine, model, options.output)
        print(f"step {step}: reward {rewards.mean():.3f}, log-probabilities {apart:.0e} apart")


def grpo_loss(model: Any, group: Any, advantage: Tensor, clip: float = 0.2) -> tuple[Tensor, float]:
    """Return the loss of a group of answers to one prompt.

    Args:
        model: The model that is trained.
        group: vLLM's answers.
        advantage: How much better than the group each answer is, float [answers].
        clip: How far the probability of a token may move before it no longer counts.

    Returns:
        The loss, and by how much the engine and the model differ in their log-probabilities. It is
        tiny on a CPU if the engine has the model's tables.
    """
    prompt, answers = list(group.prompt_token_ids), group.outputs
    longest = max(len(a.token_ids) for a in answers)
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)
    old, counts = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, answer in enumerate(answers):
        length = len(answer.token_ids)
        ids[row, :length] = torch.tensor(list(answer.token_ids))
        counts[row, :length] = 1 / length
        pairs = zip(answer.logprobs, answer.token_ids, strict=True)
        old[row, :length] = torch.tensor([found[token].logprob for found, token in pairs])
    ids, old, counts, advantage = (t.to(model.device) for t in (ids, old, counts, advantage))
    whole = torch.cat([torch.tensor(prompt, device=ids.device).expand(len(ids), -1), ids], dim=1)
    logits = model(input_ids=whole).logits[:, len(prompt) - 1 : -1].float()
    new = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    ratio, by = (new - old).exp(), advantage.unsqueeze(1)
    gain = torch.minimum(ratio * by, ratio.clamp(1 - clip, 1 + clip) * by)
    apart = ((new - old).abs() * (counts > 0)).max().item()
    return -(gain * counts).sum(1).mean(), apart


def push(engine: LLM, model: Any, folder: Path) -> None:
    """Save the tables, and put them into the engine."""
    from spallm_convert import save_tables

    save_tables(model, folder, overwrite=True)
    engine.collective_rpc("load_tables", args=(str(folder.resolve()),))
    engine.reset_prefix_cache()  # its keys and values are those of the former tables


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a sketched model: a folder or an id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
