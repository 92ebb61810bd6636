"""Encoders of text, and encoders with decoders."""

from .sizes import BART, LLAMA, T5, TEXT, TOKENS

_GEMMA = LLAMA | {"head_dim": 8}

ENCODERS = {
    "BertModel": ("BertConfig", TEXT),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "BertForPreTraining": ("BertConfig", TEXT),
    "RobertaForMaskedLM": ("RobertaConfig", TEXT),
    "XLMRobertaModel": ("XLMRobertaConfig", TEXT),
    "CamembertForMaskedLM": ("CamembertConfig", TEXT),
    "ElectraForMaskedLM": ("ElectraConfig", TEXT | {"embedding_size": 32}),
    "DebertaV2ForMaskedLM": (
        "DebertaV2Config",
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "MPNetModel": ("MPNetConfig", TEXT),
    "EsmForMaskedLM": ("EsmConfig", TEXT | {"mask_token_id": 3}),
    "AlbertModel": ("AlbertConfig", TEXT | {"embedding_size": 16}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        TOKENS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    "ModernBertModel": ("ModernBertConfig", TEXT),
    "ModernBertForMaskedLM": ("ModernBertConfig", TEXT),
    "NomicBertModel": ("NomicBertConfig", TEXT),
    "EuroBertModel": ("EuroBertConfig", LLAMA),
    "JinaEmbeddingsV3Model": ("JinaEmbeddingsV3Config", TEXT),
    "GteModel": ("GteConfig", TEXT),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "T5EncoderModel": ("T5Config", T5),
    "MT5ForConditionalGeneration": ("MT5Config", T5),
    "UMT5ForConditionalGeneration": ("UMT5Config", T5),
    "LongT5ForConditionalGeneration": ("LongT5Config", T5),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        T5
        | {
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 16,
        },
    ),
    "T5GemmaForConditionalGeneration": (
        "T5GemmaConfig",
        {"encoder": _GEMMA, "decoder": _GEMMA, "vocab_size": 64},
    ),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "MBartForConditionalGeneration": ("MBartConfig", BART),
    "PegasusForConditionalGeneration": ("PegasusConfig", BART),
    "BlenderbotForConditionalGeneration": ("BlenderbotConfig", BART),
    "M2M100ForConditionalGeneration": ("M2M100Config", BART),
    "MarianMTModel": ("MarianConfig", BART | {"decoder_vocab_size": 64}),
    "NllbMoeForConditionalGeneration": (
        "NllbMoeConfig",
        BART
        | {
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "expert_capacity": 16,
        },
    ),
}
