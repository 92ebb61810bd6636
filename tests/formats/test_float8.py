"""Every code of every 8-bit and 4-bit float, compared with torch."""

import numpy as np
import pytest
import torch

from spallm_formats import FLOAT8_DTYPES, ITEM_BYTES, float4_to_float32, float8_to_float32

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("dtype", FLOAT8_DTYPES)
def test_all_codes_are_those_of_torch(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(TORCH[dtype]).float().numpy()
    found = float8_to_float32(codes.numpy().tobytes(), dtype)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[:128]), np.signbit(expected[:128]))
    assert found.dtype == np.float32


def test_all_8_bit_floats_that_a_header_may_name_are_decoded():
    assert {name for name in ITEM_BYTES if name.startswith("F8_")} == set(FLOAT8_DTYPES)


def test_fp4_has_the_lower_half_of_a_byte_first():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    found = float4_to_float32(bytes(range(256)))
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    np.testing.assert_array_equal(found, np.array(pairs, np.float32).reshape(-1))
    assert float4_to_float32(b"").size == 0
