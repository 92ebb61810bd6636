"""Make tiny models of many kinds that read text, with a tokenizer, to calibrate them."""

from pathlib import Path

import torch

from helpers.training import word_tokenizer
from spallm_convert import load_sketched

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
}
_LLAMA = _SIZES | {"num_key_value_heads": 2}
_EXPERTS = _LLAMA | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_MANY = {
    "num_experts": 16,
    "num_local_experts": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
_TOWER = _VISION | {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
_ENCODER_DECODER = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
_BART = {
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
}
_BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
}

#: Config class and options, by model class.
MODELS = {
    "MixtralForCausalLM": ("MixtralConfig", _EXPERTS | {"max_position_embeddings": 128}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", _EXPERTS | _MANY),
    "GptOssForCausalLM": ("GptOssConfig", _EXPERTS | {"head_dim": 8}),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": _LLAMA | {"model_type": "llama"},
            "vision_config": _TOWER | {"model_type": "clip_vision_model"},
        },
    ),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": _SIZES, "vision_config": _TOWER, "projection_dim": 16},
    ),
    "BertModel": ("BertConfig", _SIZES),
    "T5ForConditionalGeneration": ("T5Config", _ENCODER_DECODER | {"vocab_size": 128}),
    "BartForConditionalGeneration": (
        "BartConfig",
        {"d_model": 32, "vocab_size": 128, "pad_token_id": 0} | _BART,
    ),
    "BambaForCausalLM": ("BambaConfig", _LLAMA | _BAMBA),
    "MambaForCausalLM": ("MambaConfig", _SIZES | {"state_size": 4}),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        _LLAMA
        | {
            "head_dim": 8,
            "num_kv_shared_layers": 1,
            "intermediate_size": [48, 48],
            "layer_types": ["full_attention"] * 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
}


def save_model(name: str, folder: Path) -> Path:
    """Save a random model of `MODELS` with a tokenizer; return the folder."""
    import transformers

    config, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def output_error(name: str, source: Path, folder: Path, tokens: torch.Tensor) -> float:
    """Return the relative error of a sketched model's outputs on tokens [samples, seqlen]."""
    import transformers

    dense = getattr(transformers, name).from_pretrained(source, dtype=torch.float32)
    outputs = []
    for model in (dense, load_sketched(folder, dtype=torch.float32)):
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        reader = getattr(model, "text_model", model)  # of CLIP, which needs images too
        with torch.no_grad():
            found = reader.eval()(tokens, **more)
        outputs.append(found.logits if "logits" in found else found.last_hidden_state)
    expected, found = outputs
    return ((found - expected).norm() / expected.norm()).item()
