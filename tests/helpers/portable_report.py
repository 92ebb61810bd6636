"""Compile the portable kernels for a GPU that is not present and print the results as JSON.

This is a separate program, because Triton decides whether to interpret kernels when it defines
them, and because `tl.gather` can abort the process.

    python tests/helpers/portable_report.py 90
    python tests/helpers/portable_report.py gfx942 64
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.compiled import compile_for_amd, compile_launch, disassemble, recorded
from spallm_kernels.triton import decode, linear, portable, portable_tenants, set_blocks

KERNELS = (
    (decode, "decode_kernel"),
    (linear, "dequantize_units_kernel", "dequantize_any_kernel", "table_grad_kernel"),
)
ROWS, COLUMNS, GROUPS = 4096, 4096, 4


def main() -> None:
    launches = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(recorded(set_blocks, "sort_tokens_kernel"))
        recordings = [stack.enter_context(recorded(*kernels)) for kernels in KERNELS]
        for name, call in cases():
            call()
            (launches[name],) = (launch for each in recordings for launch in each)
            for each in recordings:
                each.clear()
    facts = compiled(list(launches.values()), *sys.argv[1:])
    report = {
        name: found
        | {"kernel": launch.kernel.__name__, "assembly": launch.options.get("ASM", False)}
        for (name, launch), found in zip(launches.items(), facts, strict=True)
    }
    json.dump(report, sys.stdout, indent=1)


def compiled(launches, chip, threads_of_a_warp=None):
    if threads_of_a_warp is not None:
        threads = int(threads_of_a_warp)
        return [asdict(compile_for_amd(launch, chip, threads)) for launch in launches]
    codes = [compile_launch(launch, int(chip)) for launch in launches]
    return [
        {
            "spilled": code.spilled_bytes,
            "shared_bytes": code.shared_bytes,
            "matrix_instructions": sum("HMMA" in text for text in instructions),
        }
        for code, instructions in zip(codes, disassemble(codes, int(chip)), strict=True)
    ]


def cases():
    """Yield launches by name, those of narrow layers too, whose programs have fewer warps."""
    for bits in (2, 3, 4):
        for tokens, columns, groups, hash_seed in (
            (1, COLUMNS, GROUPS, None),
            (16, COLUMNS, GROUPS, None),
            (1, COLUMNS, GROUPS, 7),
            (1, 96, 1, None),
            (1, 192, 1, None),
        ):
            codes = "hashed" if hash_seed is not None else "stored"
            index_map, table = sketch(bits, columns, groups, torch.bfloat16)
            x = torch.empty(tokens, columns, dtype=torch.bfloat16)
            yield (
                f"decode, {bits} bits, {tokens} tokens, {columns} columns, {codes}",
                lambda: portable.decode(x, index_map, table, hash_seed=hash_seed),  # noqa: B023
            )
        index_map, table = sketch(bits, COLUMNS, GROUPS, torch.bfloat16)
        x, sets = torch.empty(16, COLUMNS, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int64)
        given = x, sets, index_map, table, torch.empty(3, *table.shape, dtype=torch.bfloat16)
        yield (
            f"decode of tenants, {bits} bits",
            lambda: portable_tenants.decode(*given),  # noqa: B023
        )
        index_map, table = sketch(bits, COLUMNS, GROUPS, torch.float16)
        yield (
            f"dequantize, {bits} bits",
            lambda: portable.dequantize(index_map, table, COLUMNS),  # noqa: B023
        )
        weight_grad = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
        yield (
            f"table_grad, {bits} bits",
            lambda: portable.table_grad(weight_grad, index_map, table),  # noqa: B023
        )


def sketch(bits, columns, groups, dtype):
    row_bytes = -(-columns * bits // 128) * 16
    index_map = torch.empty(ROWS, row_bytes, dtype=torch.uint8)
    return index_map, torch.empty(ROWS, groups, 1 << bits, dtype=dtype)


if __name__ == "__main__":
    main()
