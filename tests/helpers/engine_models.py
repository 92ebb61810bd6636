"""Make tiny models that vLLM serves, sketch them, and train sets of tables for them."""

from dataclasses import dataclass, field

import numpy as np
import torch
import transformers

from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import (
    CalibrationConfig,
    Recipe,
    Rule,
    SketchConfig,
    convert,
    load_sketched,
    load_tables,
    save_tables,
    set_tables,
    set_trainable,
)

#: vLLM's attention for CPUs takes heads of 32 and more.
_SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: Parts of joined layers that differ in bits and groups, and a dense one.
_MIXED = Recipe(
    (
        Rule(pattern="*.q_proj", bits=4, groups=2),
        Rule(pattern="*.k_proj", bits=3),
        Rule(pattern="*.v_proj", dense=True),
        Rule(pattern="*.up_proj", bits=2),
        Rule(pattern="*.down_proj", bits=3, groups=4),
    )
)
_TARGET = CalibrationConfig(samples=2, seqlen=32, target_bits=4.5)


@dataclass(frozen=True)
class Kind:
    """Describe a tiny model and how it is sketched.

    Attributes:
        name: Name of its config in transformers, without "Config".
        options: What its config has beside `_SIZES`.
        sketch: Options of the conversion.
    """

    name: str
    options: dict = field(default_factory=dict)
    sketch: dict = field(default_factory=dict)


_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WITH_ENDS = {"embeddings": True, "lm_head": True}
KINDS = {
    "llama": Kind("Llama"),
    "mixed": Kind("Qwen2", sketch={"recipe": _MIXED}),  # with biases
    "hashed": Kind("Qwen2", sketch={"mapping": "hash", "bits": 3}),
    "two-bits": Kind("Llama", sketch={"bits": 2, "groups_per_row": 2}),
    "target-bits": Kind("Llama", sketch={"effort": "high", "calibration": _TARGET}),
    "tied": Kind("Llama", {"tie_word_embeddings": True}, _WITH_ENDS),
    "untied": Kind("Llama", {"tie_word_embeddings": False}, _WITH_ENDS | {"groups_per_row": 2}),
    "qwen3": Kind("Qwen3"),
    "gemma3": Kind("Gemma3Text", {"sliding_window": 64, "query_pre_attn_scalar": 32}, _WITH_ENDS),
    "gpt2": Kind("GPT2"),  # its weights have a row per input
    "mixtral": Kind("Mixtral", _FOUR_EXPERTS),
    "qwen3-moe": Kind(
        "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    ),
    "gpt-oss": Kind("GptOss", _FOUR_EXPERTS | {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def save_sketched(kind, folder):
    """Sketch a tiny model with random weights and a tokenizer, and return its folder."""
    found, dense, sketched = KINDS[kind], folder / kind / "dense", folder / kind / "sketched"
    torch.manual_seed(0)
    config = getattr(transformers, f"{found.name}Config")(**_SIZES | found.options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # biases of zero and norms of one would hide mistakes
            torch.nn.init.normal_(parameter, float("bias" not in name), 0.1)
    model.save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    options = {"effort": "fast"} | found.sketch
    convert(dense, sketched, SketchConfig(**options))
    return sketched


def save_sets(sketched, names, affine):
    """Save sets of changed tables beside a model, and return their folders by name.

    Args:
        sketched: Folder of the model.
        names: Names of the sets.
        affine: Those of the names whose sets are affine.
    """
    folders = {}
    for seed, name in enumerate(names, 1):
        model = load_sketched(sketched, dtype=torch.float32)
        if name in affine:
            set_trainable(model, affine=True)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.2 * noise * model.config.initializer_range)
        folders[name] = save_tables(model, sketched.parent / f"set-{name}")
    return folders


def prompts(count=3):
    """Return prompts of different lengths, as ids of tokens."""
    generator = np.random.default_rng(0)
    return [generator.integers(5, 100, 4 + 5 * number).tolist() for number in range(count)]


def check_answers(sketched, answers, sets=None, tie=1e-3):
    """Compare what vLLM answered with the model in transformers, token by token.

    Each token must be the most likely one, or be as likely to within `tie`, and so must be its
    log-probability.
    """
    model = load_sketched(sketched, dtype=torch.float32).eval()
    for name, folder in (sets or {}).items():
        load_tables(model, folder, name=name, activate=False)
    for answer in answers:
        set_tables(model, answer["set"] or "base")
        tokens, prompt = answer["tokens"], answer["prompt"]
        assert len(tokens) == answer["asked"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        found = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (expected.max(-1).values - found).max() <= tie
        assert (torch.tensor(answer["logprobs"]) - found).abs().max() <= tie
