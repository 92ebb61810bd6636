"""Models of speech and sound."""

from .sizes import BART, LLAMA, TEXT, TOKENS

_WHISPER = BART | {"max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 8}
_ENCODER = {
    "d_model": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 4,
    "num_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 8,
    "num_mel_bins": 8,
}
_WAVES = TEXT | {
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
}

AUDIO = {
    "WhisperForConditionalGeneration": ("WhisperConfig", _WHISPER),
    "Speech2TextForConditionalGeneration": (
        "Speech2TextConfig",
        BART
        | {
            "max_source_positions": 32,
            "max_target_positions": 32,
            "input_feat_per_channel": 8,
            "conv_channels": 16,
        },
    ),
    "MoonshineForConditionalGeneration": (
        "MoonshineConfig",
        TOKENS
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
    ),
    "Wav2Vec2Model": ("Wav2Vec2Config", _WAVES),
    "HubertModel": ("HubertConfig", _WAVES),
    "Qwen2AudioForConditionalGeneration": (
        "Qwen2AudioConfig",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "audio_config": _ENCODER,
            "audio_token_index": 63,
            "audio_token_id": 63,
        },
    ),
    "VoxtralForConditionalGeneration": (
        "VoxtralConfig",
        {
            "text_config": LLAMA | {"model_type": "llama", "head_dim": 8},
            "audio_config": _ENCODER
            | {"head_dim": 8, "intermediate_size": 128, "encoder_ffn_dim": 128},
            "audio_token_id": 63,
        },
    ),
}
