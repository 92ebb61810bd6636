"""Make tiny random models of many architectures, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_TEXT = _BERT | {"vocab_size": 64, "pad_token_id": 0}
_LLAMA = _TEXT | {"num_key_value_heads": 2}
_EXPERTS = _LLAMA | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
_VISION = _BERT | {"image_size": 16, "patch_size": 8}
_ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
_MROPE = {
    "rope_scaling": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
    }
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

#: Name of the config class and its arguments, by model class. GPT-2 and ViT are left out: they have
#: no linear layers, or none under the names in their checkpoints.
ARCHITECTURES = {
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA),
    "LlamaModel": ("LlamaConfig", _LLAMA),
    "LlamaForSequenceClassification": ("LlamaConfig", _LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", _LLAMA | {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", _LLAMA | {"head_dim": 8}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _EXPERTS),
    "MixtralForCausalLM": ("MixtralConfig", _EXPERTS),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", _EXPERTS),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", _EXPERTS | _LATENT),
    "GptOssForCausalLM": ("GptOssConfig", _EXPERTS | {"head_dim": 8}),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        _EXPERTS | {"head_dim": 8, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    ),
    # In early versions of transformers 5, the sizes of DBRX must be equal.
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    "JetMoeForCausalLM": (
        "JetMoeConfig",
        _TEXT | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {
            "text_config": _EXPERTS | _MROPE | {"head_dim": 8},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "GemmaForCausalLM": ("GemmaConfig", _LLAMA | {"head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", _LLAMA | {"head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _LLAMA | {"head_dim": 8}),
    "PhiForCausalLM": ("PhiConfig", _TEXT),
    "Phi3ForCausalLM": ("Phi3Config", _LLAMA),
    "Olmo2ForCausalLM": ("Olmo2Config", _LLAMA),
    "StableLmForCausalLM": ("StableLmConfig", _LLAMA),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _TEXT),
    "GPTJForCausalLM": ("GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "OPTForCausalLM": ("OPTConfig", _TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MptForCausalLM": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 64}),
    "MambaForCausalLM": ("MambaConfig", _TEXT | {"state_size": 4}),
    "JambaForCausalLM": ("JambaConfig", _EXPERTS | {"attn_layer_offset": 1}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    ),
    "BartForConditionalGeneration": ("BartConfig", _BART),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        _BART | {"max_source_positions": 32, "max_target_positions": 32},
    ),
    "BertModel": ("BertConfig", _TEXT),
    "BertForMaskedLM": ("BertConfig", _TEXT),
    "BertForPreTraining": ("BertConfig", _TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", _TEXT),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64},
    ),
    "Dinov2Model": ("Dinov2Config", _VISION),
    "CLIPModel": ("CLIPConfig", {"text_config": _TEXT, "vision_config": _VISION}),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": _LLAMA | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {
            "text_config": _LLAMA | _ROPE,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
            },
        },
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": _LLAMA | {"head_dim": 8}, "vision_config": _VISION},
    ),
}


def save_tiny(name: str, folder: Path, **changes: Any) -> Path:
    """Save a random model of a class of `ARCHITECTURES` and changes; return the folder."""
    import transformers

    config_name, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options | changes)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder
