"""Build small models of many architectures on the meta device, without weights."""

from typing import Any

import torch

from .architectures import ARCHITECTURES

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
_EXPERTS = _TEXT | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
_STATES = _EXPERTS | {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
_MAMBA2 = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_WAVLM = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_GEMMA3N = _TEXT | {
    "head_dim": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention", "full_attention"],
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
    "activation_sparsity_pattern": [0.0, 0.0],
    "laurel_rank": 8,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "image_size": 32,
    "window_size": 4,
}

#: Name of the config class and its arguments, by model class, for architectures that are not in
#: `ARCHITECTURES`. Older versions of transformers lack some.
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", _GPT2),
    "GPT2Model": ("GPT2Config", _GPT2),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", _GPT2),
    "ImageGPTForCausalImageModeling": ("ImageGPTConfig", _GPT2),
    "FalconForCausalLM": ("FalconConfig", _TEXT),
    "NemotronForCausalLM": ("NemotronConfig", _TEXT),
    "DiffLlamaForCausalLM": ("DiffLlamaConfig", _TEXT),
    "Mamba2ForCausalLM": ("Mamba2Config", _MAMBA2 | {"num_hidden_layers": 2}),
    "FalconMambaForCausalLM": ("FalconMambaConfig", _TEXT | {"state_size": 4}),
    "BambaForCausalLM": ("BambaConfig", _STATES | {"attn_layer_indices": [1]}),
    "FalconH1ForCausalLM": ("FalconH1Config", _STATES | {"mamba_d_ssm": 64}),
    "GraniteMoeHybridForCausalLM": (
        "GraniteMoeHybridConfig",
        _STATES | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    ),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        _EXPERTS
        | {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8}
        | {"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    ),
    "RwkvForCausalLM": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
    "Gemma3nForCausalLM": ("Gemma3nTextConfig", _GEMMA3N),
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", _EXPERTS),
    "Llama4ForCausalLM": ("Llama4TextConfig", _EXPERTS | {"intermediate_size_mlp": 48}),
    "HunYuanMoEV1ForCausalLM": (
        "HunYuanMoEV1Config",
        _EXPERTS | {"moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    ),
    "WavLMModel": ("WavLMConfig", _WAVLM),
    "Swinv2Model": ("Swinv2Config", _SWIN),
    "MusicgenForCausalLM": (
        "MusicgenDecoderConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48}
        | {"num_attention_heads": 4, "num_codebooks": 2},
    ),
    "ViTModel": ("ViTConfig", _VISION),
    "BeitModel": ("BeitConfig", _VISION),
    "DINOv3ViTModel": ("DINOv3ViTConfig", _VISION),
    "SiglipModel": ("SiglipConfig", {"text_config": _TEXT, "vision_config": _VISION}),
    "NomicBertModel": ("NomicBertConfig", _TEXT),
}


def meta_model(name: str, **changes: Any) -> Any:
    """Return a model of a class of transformers on the meta device; `changes` go to its config."""
    import transformers

    config_name, options = {**ARCHITECTURES, **_MORE}[name]
    config = getattr(transformers, config_name)(**options | changes)
    with torch.device("meta"):
        return getattr(transformers, name)(config)
