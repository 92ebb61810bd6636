"""Decoders of text with experts."""

from .sizes import EXPERTS as SIZES
from .sizes import HEADS, LATENT, LINEAR_ATTENTION, TOKENS

_HEADS = SIZES | {"head_dim": 8}
_LATENT = SIZES | LATENT
_INDEXER = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
_GROUPED = _HEADS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

EXPERTS = {
    "MixtralForCausalLM": ("MixtralConfig", SIZES),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", SIZES),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _HEADS),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", _HEADS | LINEAR_ATTENTION),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", _HEADS | LINEAR_ATTENTION),
    "OlmoeForCausalLM": ("OlmoeConfig", SIZES),
    "FlexOlmoForCausalLM": ("FlexOlmoConfig", SIZES),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", SIZES),
    "GraniteMoeSharedForCausalLM": (
        "GraniteMoeSharedConfig",
        SIZES | {"shared_intermediate_size": 16},
    ),
    "DeepseekV2ForCausalLM": ("DeepseekV2Config", _LATENT),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", _LATENT),
    "DeepseekV32ForCausalLM": ("DeepseekV32Config", _LATENT | _INDEXER),
    "DeepseekV4ForCausalLM": (
        "DeepseekV4Config",
        _HEADS
        | _INDEXER
        | {
            "num_key_value_heads": 1,
            "n_routed_experts": 4,
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "o_groups": 2,
            "qk_rope_head_dim": 4,
            "hc_mult": 2,
            "num_hash_layers": 1,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        },
    ),
    "LongcatFlashForCausalLM": (
        "LongcatFlashConfig",
        _LATENT
        | {
            "num_layers": 1,
            "zero_expert_num": 2,
            "ffn_hidden_size": 48,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 16,
            "head_dim": 4,
        },
    ),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", _GROUPED),
    "Glm4MoeLiteForCausalLM": ("Glm4MoeLiteConfig", _LATENT),
    "GlmMoeDsaForCausalLM": ("GlmMoeDsaConfig", _LATENT | _INDEXER),
    "Dots1ForCausalLM": ("Dots1Config", _GROUPED),
    "SolarOpenForCausalLM": ("SolarOpenConfig", _GROUPED),
    "GptOssForCausalLM": ("GptOssConfig", _HEADS),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        _HEADS | {"intermediate_size_mlp": 48, "moe_layers": [1]},
    ),
    "DbrxForCausalLM": (
        "DbrxConfig",
        TOKENS
        | {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 32,  # early versions of transformers 5 need equal sizes
                "hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    "MiniMaxForCausalLM": ("MiniMaxConfig", _HEADS),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", _HEADS | {"rotary_dim": 4}),
    "PhimoeForCausalLM": ("PhimoeConfig", SIZES),
    "Ernie4_5_MoeForCausalLM": ("Ernie4_5_MoeConfig", SIZES | {"moe_num_experts": 4, "moe_k": 2}),
    "HunYuanMoEV1ForCausalLM": ("HunYuanMoEV1Config", _HEADS | {"moe_topk": 2}),
    "AfmoeForCausalLM": ("AfmoeConfig", _HEADS | {"num_dense_layers": 1}),
    "Lfm2MoeForCausalLM": (
        "Lfm2MoeConfig",
        SIZES | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "KimiLinearForCausalLM": (
        "KimiLinearConfig",
        _LATENT
        | {
            "q_lora_rank": None,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "JetMoeForCausalLM": ("JetMoeConfig", HEADS | {"num_local_experts": 4, "kv_channels": 8}),
    "ExaoneMoeForCausalLM": ("ExaoneMoeConfig", _GROUPED),
    "Mistral4ForCausalLM": ("Mistral4Config", _LATENT),
    "Cohere2MoeForCausalLM": ("Cohere2MoeConfig", _HEADS),
    "LagunaForCausalLM": ("LagunaConfig", _HEADS),
    "HYV3ForCausalLM": ("HYV3Config", _HEADS),
    "MiMoV2FlashForCausalLM": ("MiMoV2FlashConfig", _GROUPED),
}
