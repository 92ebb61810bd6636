"""Describe published models by their configs: sizes are those of the `config.json` on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Published:
    """Describe a model on the Hub.

    Attributes:
        hub: Its id.
        architecture: Name of the model class.
        config: Name of the config class.
        options: Arguments of the config that differ from the defaults of the class.
        more_blocks: Number of blocks that predict further tokens. The checkpoint has them, and
            transformers leaves them out.
        sketch: Options of the conversion that are not the defaults.
    """

    hub: str
    architecture: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    more_blocks: int = 0
    sketch: dict[str, Any] = field(default_factory=dict)


_QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_SCOUT_TEXT = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "pad_token_id": 200018,
}
_SCOUT_VISION = {
    "hidden_size": 1408,
    "intermediate_size": 5632,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "vision_output_dim": 4096,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "image_size": 336,
}

PUBLISHED = {
    "Mixtral-8x7B": Published("mistralai/Mixtral-8x7B-v0.1", "MixtralForCausalLM", "MixtralConfig"),
    "Qwen3-30B-A3B": Published(
        "Qwen/Qwen3-30B-A3B",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "gpt-oss-120b (bf16)": Published(
        "openai/gpt-oss-120b",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
        },
    ),
    "DeepSeek-V3 (bf16)": Published(
        "deepseek-ai/DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"num_hidden_layers": 61, "num_nextn_predict_layers": 1},
        more_blocks=1,
    ),
    "GLM-4.5-Air": Published(
        "zai-org/GLM-4.5-Air",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
        more_blocks=1,
    ),
    "Llama-4-Scout": Published(
        "meta-llama/Llama-4-Scout-17B-16E",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {"text_config": _SCOUT_TEXT, "vision_config": _SCOUT_VISION, "pad_token_id": 200018},
    ),
    "Qwen2.5-VL-7B": Published(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {"text_config": _QWEN_TEXT, "vision_config": _QWEN_VISION},
    ),
    "Nemotron-3-Nano": Published(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_routed_experts": 128,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "num_experts_per_tok": 6,
        },
    ),
}
#: The same models with what their default leaves dense: much of them is embedding and head.
_ENDS = {"embeddings": True, "lm_head": True}
PUBLISHED |= {
    f"{name}, whole": replace(PUBLISHED[name], sketch=_ENDS)
    for name in ("GLM-4.5-Air", "Qwen2.5-VL-7B")
}
