"""Sort float32 values by radix, each with a float32 of payload.

Values are sorted byte by byte from the least significant, with a stable counting sort. A byte that
all values share is skipped. So bf16 data, whose lower half is zero, takes two passes over the row
instead of four.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]


@numba.njit(cache=True, nogil=True)
def sort_with_payload(
    values: Singles, payload: Singles, keys: Words, carried: Singles
) -> tuple[Singles, Singles]:
    """Sort values in ascending order, and the payload with them.

    Args:
        values: float32 [n], finite.
        payload: float32 [n].
        keys: Scratch, uint32 [2, n].
        carried: Scratch, float32 [2, n].

    Returns:
        The sorted values and the payload in the same order, as views of the scratch arrays.
    """
    n = len(values)
    counts = np.zeros((4, 256), np.int32)
    bits = values.view(np.uint32)
    for i in range(n):
        # Flip so that unsigned order is numeric order: negative values fall as their bits rise.
        word = bits[i]
        word = ~word if word >> np.uint32(31) else word | np.uint32(0x80000000)
        keys[0, i] = word
        carried[0, i] = payload[i]
        for byte in range(4):
            counts[byte, (word >> np.uint32(8 * byte)) & np.uint32(255)] += 1
    source = 0
    for byte in range(4):
        shift = np.uint32(8 * byte)
        if counts[byte, (keys[source, 0] >> shift) & np.uint32(255)] == n:
            continue
        position = 0
        for digit in range(256):
            count = counts[byte, digit]
            counts[byte, digit] = position
            position += count
        for i in range(n):
            word = keys[source, i]
            digit = (word >> shift) & np.uint32(255)
            at = counts[byte, digit]
            counts[byte, digit] = at + 1
            keys[1 - source, at] = word
            carried[1 - source, at] = carried[source, i]
        source = 1 - source
    ordered = keys[source]
    for i in range(n):
        word = ordered[i]
        ordered[i] = word & np.uint32(0x7FFFFFFF) if word >> np.uint32(31) else ~word
    return ordered.view(np.float32), carried[source]
