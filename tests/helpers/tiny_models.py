"""Make small random models, saved as checkpoints to convert."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class TinyModel:
    """Hold the folder and config of a checkpoint of a small random model."""

    folder: Path
    config: dict[str, Any]


def save_tiny_llama(
    folder: Path,
    *,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> TinyModel:
    """Save a random Llama with tokenizer-like extra files; `changes` go to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
    } | changes
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**options)).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.pt").write_bytes(b"not to be copied")
    return TinyModel(folder, json.loads((folder / "config.json").read_text()))


def add_matrices(folder: Path, *names: str, rows: int = 640) -> Path:
    """Add matrices of 64 columns that the model does not know; return the folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name: torch.ones(rows, 64) for name in names}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
