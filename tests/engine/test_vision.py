"""A vision-language model, with a sketched vision tower and an image in the prompt."""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.engine_runs import image, job, run_jobs
from helpers.tiny_tokenizer import tiny_tokenizer
from spallm_convert import SketchConfig, convert, load_sketched

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.3}
TEXT = SIZES | {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    },
}
VISION = SIZES | {
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 32,
    "fullatt_block_indexes": [1],
}


def save_model(folder):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    picture, video, start, end = tokenizer.convert_tokens_to_ids(MARKS)
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=picture,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    processor.save_pretrained(folder)
    return processor, [10, 11, start, picture, end, 20, 21], picture


def test_an_image_is_seen_as_in_transformers(tmp_path):
    processor, prompt, mark = save_model(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sketched", SketchConfig(effort="fast"))
    paths = [Path(__file__).parent / "site", Path(sys.prefix) / "torchvision"]
    ((answers,), output) = run_jobs(
        [
            job(
                tmp_path / "sketched",
                [[(prompt, None, (32, 48))]],
                limit_mm_per_prompt={"image": 1},
            )
        ],
        tmp_path,
        PYTHONPATH=":".join(map(str, paths)),
    )
    assert isinstance(answers, list), answers
    assert "served dense" not in output
    (answer,) = answers
    assert answer["prompt"].count(mark) == 6  # 4 x 6 patches, merged by fours

    model = load_sketched(tmp_path / "sketched", dtype=torch.float32).eval()
    seen = processor(images=[Image.fromarray(image(32, 48))], return_tensors="pt")
    ids = torch.tensor([answer["prompt"] + answer["tokens"]])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            mm_token_type_ids=(ids == mark).int(),
        ).logits[0, len(answer["prompt"]) - 1 : -1]
    expected = logits.log_softmax(-1)
    found = expected[torch.arange(len(answer["tokens"])), torch.tensor(answer["tokens"])]
    assert (expected.max(-1).values - found).max() < 1e-3
    assert np.abs(found.numpy() - answer["logprobs"]).max() < 1e-3
