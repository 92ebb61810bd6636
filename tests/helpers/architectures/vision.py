"""Models of images, and of images with texts side by side."""

from .sizes import TEXT
from .sizes import VISION as SIZES

_BOTH = {"text_config": TEXT | {"projection_dim": 32}, "vision_config": SIZES, "projection_dim": 32}

VISION = {
    "ViTModel": ("ViTConfig", SIZES),
    "ViTForImageClassification": ("ViTConfig", SIZES),
    "DeiTModel": ("DeiTConfig", SIZES),
    "BeitModel": ("BeitConfig", SIZES),
    "ViTMAEModel": ("ViTMAEConfig", SIZES | {"mask_ratio": 0.0}),
    "Dinov2Model": ("Dinov2Config", SIZES),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", SIZES),
    "DINOv3ViTModel": ("DINOv3ViTConfig", SIZES),
    "IJepaModel": ("IJepaConfig", SIZES),
    "SwinModel": (
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 2,
        },
    ),
    "SegformerModel": (
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
        },
    ),
    "ConvNextV2Model": (
        "ConvNextV2Config",
        {
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_stages": 2,
            "patch_size": 4,
            "image_size": 16,
        },
    ),
    "VideoMAEModel": ("VideoMAEConfig", SIZES | {"num_frames": 2, "tubelet_size": 2}),
    "PixtralVisionModel": ("PixtralVisionConfig", SIZES),
    "CLIPModel": ("CLIPConfig", _BOTH),
    "CLIPTextModel": ("CLIPTextConfig", TEXT),
    "CLIPVisionModel": ("CLIPVisionConfig", SIZES),
    "SiglipModel": ("SiglipConfig", _BOTH),
    "SiglipVisionModel": ("SiglipVisionConfig", SIZES),
    "Siglip2Model": (
        "Siglip2Config",
        {
            "text_config": TEXT | {"projection_size": 32},
            "vision_config": SIZES | {"num_patches": 4},
        },
    ),
    "AltCLIPModel": (
        "AltCLIPConfig",
        {"text_config": TEXT | {"project_dim": 32}, "vision_config": SIZES, "projection_dim": 32},
    ),
    "ChineseCLIPModel": ("ChineseCLIPConfig", _BOTH),
}
