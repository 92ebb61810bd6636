"""Language models that see images."""

from .sizes import EXPERTS, HEADS, LATENT, LINEAR_ATTENTION, LLAMA, MROPE, TEXT, VISION

_IMAGE = {"image_token_index": 63, "image_token_id": 63}
_CLIP = VISION | {"model_type": "clip_vision_model"}
_SIGLIP = VISION | {"model_type": "siglip_vision_model"}
_PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 8}
_LLAMA = LLAMA | {"model_type": "llama"}
_QWEN_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 8,
}
_QWEN3_VISION = _QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_QWEN_IDS = {
    "image_token_id": 63,
    "video_token_id": 62,
    "vision_start_token_id": 61,
    "vision_end_token_id": 60,
}

MULTIMODAL = {
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {"text_config": _LLAMA, "vision_config": _CLIP} | _IMAGE,
    ),
    "VipLlavaForConditionalGeneration": (
        "VipLlavaConfig",
        {"text_config": _LLAMA, "vision_config": _CLIP, "vision_feature_layers": [-1]} | _IMAGE,
    ),
    "LlavaNextForConditionalGeneration": (
        "LlavaNextConfig",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_grid_pinpoints": [[16, 16]]}
        | _IMAGE,
    ),
    "LlavaOnevisionForConditionalGeneration": (
        "LlavaOnevisionConfig",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": _SIGLIP,
            "video_token_index": 62,
            "image_grid_pinpoints": [[16, 16]],
        }
        | _IMAGE,
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2VLConfig",
        {"text_config": LLAMA | MROPE, "vision_config": _QWEN_VISION} | _QWEN_IDS,
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {
            "text_config": LLAMA | MROPE,
            "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
        }
        | _QWEN_IDS,
    ),
    "Qwen3VLForConditionalGeneration": (
        "Qwen3VLConfig",
        {"text_config": HEADS | MROPE, "vision_config": _QWEN3_VISION} | _QWEN_IDS,
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig",
        {"text_config": EXPERTS | {"head_dim": 8} | MROPE, "vision_config": _QWEN3_VISION}
        | _QWEN_IDS,
    ),
    "Qwen3_5ForConditionalGeneration": (
        "Qwen3_5Config",
        {"text_config": HEADS | LINEAR_ATTENTION, "vision_config": _QWEN3_VISION} | _QWEN_IDS,
    ),
    "Qwen3_5MoeForConditionalGeneration": (
        "Qwen3_5MoeConfig",
        {
            "text_config": EXPERTS | {"head_dim": 8} | LINEAR_ATTENTION,
            "vision_config": _QWEN3_VISION,
        }
        | _QWEN_IDS,
    ),
    "Glm4vForConditionalGeneration": (
        "Glm4vConfig",
        {"text_config": HEADS | MROPE, "vision_config": _QWEN_VISION | {"image_size": 16}}
        | _QWEN_IDS,
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {
            "text_config": HEADS,
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 63,
        },
    ),
    "PaliGemmaForConditionalGeneration": (
        "PaliGemmaConfig",
        {
            "text_config": HEADS | {"model_type": "gemma"},
            "vision_config": _SIGLIP | {"projection_dim": 32},
            "projection_dim": 32,
            "image_token_index": 63,
        },
    ),
    "Mistral3ForConditionalGeneration": (
        "Mistral3Config",
        {"text_config": HEADS | {"model_type": "mistral"}, "vision_config": _PIXTRAL} | _IMAGE,
    ),
    "InternVLForConditionalGeneration": (
        "InternVLConfig",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": VISION
            | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
            "image_token_id": 63,
        },
    ),
    "AyaVisionForConditionalGeneration": (
        "AyaVisionConfig",
        {"text_config": LLAMA | {"model_type": "cohere2"}, "vision_config": _SIGLIP} | _IMAGE,
    ),
    "MllamaForConditionalGeneration": (
        "MllamaConfig",
        {
            "text_config": LLAMA
            | {
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 63,
        },
    ),
    "Llama4ForConditionalGeneration": (
        "Llama4Config",
        {
            "image_token_index": 63,
            "pad_token_id": 0,
            "text_config": EXPERTS
            | {"head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [1]},
            "vision_config": VISION
            | {
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "pixel_shuffle_ratio": 0.5,
                "intermediate_size": 128,
            },
        },
    ),
    "Kimi_K25ForConditionalGeneration": (
        "Kimi_K25Config",
        {
            "text_config": EXPERTS | LATENT | {"model_type": "deepseek_v3"},
            "vision_config": {
                "patch_size": 8,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "pos_emb_time": 1,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
            },
            "projection_hidden_size": 32,
            "image_token_id": 63,
            "video_token_id": 62,
            "vision_start_token_id": 61,
            "vision_end_token_id": 60,
        },
    ),
    "Gemma4ForConditionalGeneration": (
        "Gemma4Config",
        {
            "text_config": HEADS
            | {
                "global_head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": 64,
                "hidden_size_per_layer_input": 8,
            },
            "vision_config": VISION
            | {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "position_embedding_size": 16,
                "pooling_kernel_size": 2,
            },
            "audio_config": None,
            "image_token_id": 63,
        },
    ),
    "Idefics3ForConditionalGeneration": (
        "Idefics3Config",
        {"text_config": _LLAMA, "vision_config": VISION, "image_token_id": 63},
    ),
    "SmolVLMForConditionalGeneration": (
        "SmolVLMConfig",
        {"text_config": _LLAMA, "vision_config": VISION, "image_token_id": 63},
    ),
    "GotOcr2ForConditionalGeneration": (
        "GotOcr2Config",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "mlp_dim": 48,
                "global_attn_indexes": [1],
                "window_size": 2,
            },
            "image_token_index": 63,
        },
    ),
    "BlipForConditionalGeneration": (
        "BlipConfig",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 32},
    ),
    "Blip2ForConditionalGeneration": (
        "Blip2Config",
        {
            "text_config": TEXT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            "vision_config": VISION,
            "qformer_config": TEXT | {"encoder_hidden_size": 32},
            "num_query_tokens": 4,
            "image_token_index": 63,
        },
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": (
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": LLAMA
            | {
                "moe_intermediate_size": [16, 16],
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_num_shared_experts": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 8,
                "intermediate_size": 48,
            },
            "image_token_id": 63,
            "video_token_id": 62,
            "image_start_token_id": 61,
            "image_end_token_id": 60,
            "video_start_token_id": 59,
            "video_end_token_id": 58,
        },
    ),
    "Cohere2VisionForConditionalGeneration": (
        "Cohere2VisionConfig",
        {
            "text_config": LLAMA | {"model_type": "cohere2"},
            "vision_config": _SIGLIP,
            "image_token_id": 63,
            "alignment_intermediate_size": 32,
        },
    ),
}
