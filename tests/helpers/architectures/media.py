"""Describe the images and sounds that tiny models take beside a text, or in place of one."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Media:
    """Hold the images or sounds for a text of two samples.

    Attributes:
        tokens: Number of tokens in each sample that stand for its image or sound.
        random: Shapes of the arguments that are drawn at random, by their names.
        fixed: Values of the other arguments, by their names.
        types: Name of the argument that says which tokens stand for an image, if there is one.
    """

    tokens: int = 0
    random: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    types: str = ""


_IMAGE = {"pixel_values": (2, 3, 16, 16)}
#: Patches of two images of 4 x 4 patches, two of them in time; four make one token.
_PATCHES = {
    "random": {"pixel_values": (32, 384)},
    "fixed": {"image_grid_thw": [[1, 4, 4]] * 2},
    "tokens": 4,
    "types": "mm_token_type_ids",
}
_SIZES = {"image_sizes": [[16, 16]] * 2}

#: By class. A model without an entry that reads no text gets one image of 16 x 16 pixels.
MEDIA = {
    "CLIPModel": Media(random=_IMAGE),
    "AltCLIPModel": Media(random=_IMAGE),
    "ChineseCLIPModel": Media(random=_IMAGE),
    "SiglipModel": Media(random=_IMAGE),
    "Siglip2Model": Media(
        random={"pixel_values": (2, 4, 192)},
        fixed={"pixel_attention_mask": [[1] * 4] * 2, "spatial_shapes": [[2, 2]] * 2},
    ),
    "ViTMAEModel": Media(random=_IMAGE, fixed={"noise": [[0.0, 1.0, 2.0, 3.0]] * 2}),
    "VideoMAEModel": Media(random={"pixel_values": (2, 2, 3, 16, 16)}),
    "BlipForConditionalGeneration": Media(random=_IMAGE),
    "Blip2ForConditionalGeneration": Media(random=_IMAGE, tokens=4),
    "LlavaForConditionalGeneration": Media(random=_IMAGE, tokens=4),
    "VipLlavaForConditionalGeneration": Media(random=_IMAGE, tokens=4),
    "LlavaNextForConditionalGeneration": Media(
        random={"pixel_values": (2, 2, 3, 16, 16)}, fixed=_SIZES, tokens=10
    ),
    "LlavaOnevisionForConditionalGeneration": Media(
        random={"pixel_values": (2, 2, 3, 16, 16)}, fixed=_SIZES, tokens=10
    ),
    "Qwen2VLForConditionalGeneration": Media(**_PATCHES),
    "Qwen2_5_VLForConditionalGeneration": Media(**_PATCHES),
    "Qwen3VLForConditionalGeneration": Media(**_PATCHES),
    "Qwen3VLMoeForConditionalGeneration": Media(**_PATCHES),
    "Qwen3_5ForConditionalGeneration": Media(**_PATCHES),
    "Qwen3_5MoeForConditionalGeneration": Media(**_PATCHES),
    "Glm4vForConditionalGeneration": Media(**_PATCHES),
    "Ernie4_5_VLMoeForConditionalGeneration": Media(
        **_PATCHES | {"random": {"pixel_values": (32, 192)}}
    ),
    "Kimi_K25ForConditionalGeneration": Media(
        **_PATCHES | {"random": {"pixel_values": (32, 3, 8, 8)}}
    ),
    "Gemma3ForConditionalGeneration": Media(random=_IMAGE, tokens=4, types="token_type_ids"),
    "Gemma4ForConditionalGeneration": Media(
        random={"pixel_values": (2, 4, 192)},
        fixed={"image_position_ids": [[[0, 0], [1, 0], [0, 1], [1, 1]]] * 2},
        tokens=1,
        types="mm_token_type_ids",
    ),
    "PaliGemmaForConditionalGeneration": Media(random=_IMAGE, tokens=4, types="token_type_ids"),
    "Mistral3ForConditionalGeneration": Media(random=_IMAGE, fixed=_SIZES, tokens=1),
    "InternVLForConditionalGeneration": Media(random=_IMAGE, tokens=1),
    "AyaVisionForConditionalGeneration": Media(random=_IMAGE, tokens=1),
    "Cohere2VisionForConditionalGeneration": Media(random=_IMAGE, tokens=1),
    "MllamaForConditionalGeneration": Media(
        random={"pixel_values": (2, 1, 1, 3, 16, 16)},
        fixed={
            "aspect_ratio_ids": [[1]] * 2,
            "aspect_ratio_mask": [[[1]]] * 2,
            "cross_attention_mask": [[[[1]]] * 12] * 2,
        },
    ),
    "Llama4ForConditionalGeneration": Media(random=_IMAGE, tokens=1),
    "Idefics3ForConditionalGeneration": Media(random={"pixel_values": (2, 1, 3, 16, 16)}, tokens=1),
    "SmolVLMForConditionalGeneration": Media(random={"pixel_values": (2, 1, 3, 16, 16)}, tokens=1),
    "GotOcr2ForConditionalGeneration": Media(random=_IMAGE, tokens=1),
    "WhisperForConditionalGeneration": Media(random={"input_features": (2, 8, 16)}),
    "Speech2TextForConditionalGeneration": Media(random={"input_features": (2, 32, 8)}),
    "MoonshineForConditionalGeneration": Media(random={"input_values": (2, 2000)}),
    "Wav2Vec2Model": Media(random={"input_values": (2, 400)}),
    "HubertModel": Media(random={"input_values": (2, 400)}),
    "Qwen2AudioForConditionalGeneration": Media(
        random={"input_features": (2, 8, 16)},
        fixed={"feature_attention_mask": [[1] * 16] * 2},
        tokens=4,
    ),
    "VoxtralForConditionalGeneration": Media(random={"input_features": (2, 8, 16)}, tokens=2),
}
