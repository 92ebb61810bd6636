"""What is known to fall short: each entry says why, and goes when it is mended."""

_CAST = "the code casts inputs to the dtype of `wo.weight`"
_FLOAT32 = "transformers keeps a part of it in float32"
_CHANGED = "transformers joins and splits tensors in its own way while loading"

#: Least share of the linear weights that is sketched, and why no more is, by model class. Parts
#: that are small in real models have a large share in tiny ones.
SHARES: dict[str, tuple[float, str]] = {
    "DeepseekV4ForCausalLM": (0.89, _FLOAT32),
    "RwkvForCausalLM": (0.68, "the code divides two weights of a block in place"),
    "T5ForConditionalGeneration": (0.83, _CAST),
    "T5EncoderModel": (0.78, _CAST),
    "MT5ForConditionalGeneration": (0.85, _CAST),
    "UMT5ForConditionalGeneration": (0.85, _CAST),
    "LongT5ForConditionalGeneration": (0.83, _CAST),
    "SwitchTransformersForConditionalGeneration": (0.72, _CAST),
    "Kimi_K25ForConditionalGeneration": (0.79, _CHANGED),
}

#: What fails after the conversion, by model class.
FAULTS: dict[str, str] = {}
