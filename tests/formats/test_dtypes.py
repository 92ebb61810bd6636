"""Rounding to the stored dtypes matches torch."""

import numpy as np
import torch

from spallm_formats import from_float32, to_float32

VALUES = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(10_000).astype(np.float32),
        np.random.default_rng(1).integers(0, 2**32, 10_000, dtype=np.uint32).view(np.float32),
        np.array([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 65504, 65520, 1e-8], np.float32),
    ]
)
VALUES = VALUES[np.isfinite(VALUES)]


def test_rounding_is_torchs():
    for dtype, torch_dtype in [("BF16", torch.bfloat16), ("F16", torch.float16)]:
        ours = from_float32(VALUES, dtype)
        theirs = torch.from_numpy(VALUES).to(torch_dtype)
        assert ours.tobytes() == theirs.view(torch.int16).numpy().tobytes()
        np.testing.assert_array_equal(to_float32(ours.tobytes(), dtype), theirs.float().numpy())


def test_nan_stays_nan():
    assert np.isnan(to_float32(from_float32([np.nan], "BF16").tobytes(), "BF16")).all()
