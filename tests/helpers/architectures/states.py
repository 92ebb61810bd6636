"""Decoders of text with state-space, recurrent or convolutional blocks."""

from .sizes import EXPERTS, HEADS, LLAMA, TEXT

_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}

STATES = {
    "MambaForCausalLM": ("MambaConfig", TEXT | {"state_size": 4}),
    "Mamba2ForCausalLM": (
        "Mamba2Config",
        TEXT | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "FalconMambaForCausalLM": ("FalconMambaConfig", TEXT | {"state_size": 4}),
    "RwkvForCausalLM": ("RwkvConfig", TEXT | {"attention_hidden_size": 32, "context_length": 32}),
    "JambaForCausalLM": ("JambaConfig", EXPERTS | {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "BambaForCausalLM": ("BambaConfig", LLAMA | _MAMBA2 | {"attn_layer_indices": [1]}),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        LLAMA | _MAMBA2 | {"mamba_d_ssm": 64, "head_dim": 8},
    ),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        HEADS
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "num_experts_per_tok": 2,
        },
    ),
    "GraniteMoeHybridForCausalLM": (
        "GraniteMoeHybridConfig",
        EXPERTS | _MAMBA2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "Zamba2ForCausalLM": (
        "Zamba2Config",
        LLAMA
        | {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "chunk_size": 8,
            "num_key_value_heads": 4,
            "adapter_rank": 8,
        },
    ),
    "RecurrentGemmaForCausalLM": (
        "RecurrentGemmaConfig",
        LLAMA
        | {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 8},
    ),
    "Lfm2ForCausalLM": (
        "Lfm2Config",
        LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "xLSTMForCausalLM": (
        "xLSTMConfig",
        TEXT
        | {
            "hidden_size": 64,
            "num_heads": 2,
            "chunk_size": 4,
            "mode": "train",
            "use_cache": False,
            "ffn_round_up_to_multiple_of": 16,
            "qk_dim_factor": 1.0,
            "autocast_kernel_dtype": "float32",
        },
    ),
}
