"""Instructions for AMX: results with tile registers that are emulated, and compiled code."""

import re

import numpy as np
import pytest
import torch

from helpers.sketches import random, random_sketch
from helpers.tile_registers import TileRegisters
from helpers.unit_machine import Machine, x86_assembly
from spallm_formats import pack
from spallm_kernels.cpu import matrix_tiles
from spallm_kernels.cpu.bfloat16_steps import KINDS, WIDE_STEP, BFloat16Sketch, lane_columns
from spallm_kernels.cpu.matrix_tiles import MOST_BLOCKS, ROWS, emit_configure, emit_multiply
from spallm_kernels.cpu.packing import TOKENS, emit_pack
from spallm_kernels.cpu.vector_units import AMX, available_units

BITS = [2, 3, 4]
#: Columns and groups: whole steps, more of them than are looked up at once, last steps, no whole
#: step.
SHAPES = [(64, 1), (352, 1), (192, 3), (47, 1), (5, 1), (160, 2), (560, 2)]
ALL_ROWS = 37
needs_lookups = pytest.mark.skipif(
    "avx512" not in available_units(), reason="needs the vector instructions of AVX-512"
)


def bodies(bits, kind):
    """Return functions that pack inputs, and that multiply one to three blocks of tokens."""

    def multiply(builder, given, blocks):
        codes, code_stride, table, groups, width, *places = given
        sketch = BFloat16Sketch(codes, code_stride, groups, width, bits, kind)
        emit_configure(builder)
        emit_multiply(builder, sketch, table, places, blocks)
        matrix_tiles._amx(builder, "tilerelease")

    made = {"pack": (5, lambda builder, given: emit_pack(builder, given, bits))}
    for blocks in range(1, MOST_BLOCKS + 1):
        made[f"multiply_{blocks}"] = (
            12,
            lambda builder, given, blocks=blocks: multiply(builder, given, blocks),
        )
    return made


@pytest.fixture
def registers(monkeypatch):
    emulated = TileRegisters()
    monkeypatch.setattr(matrix_tiles, "_amx", emulated.emit)
    return emulated


def words(tensor):
    """Return the elements of a tensor as integers, in memory of their own."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize]).numpy()


def packed(machine, x, bits, groups):
    """Return blocks of 16 tokens, int16 [blocks, groups, steps, 16, 16, 2]."""
    tokens, columns = x.shape
    width, lines = columns // groups, words(x)
    shape = (-(-tokens // TOKENS), groups, -(-width // WIDE_STEP), 16, TOKENS, 2)
    found = np.full(shape, -1, np.int16)
    for block, target in enumerate(found):
        first = block * TOKENS
        machine.run("pack", lines[first:], min(TOKENS, tokens - first), groups, width, target)
    return found


@needs_lookups
@pytest.mark.parametrize("bits", BITS)
def test_packed_inputs_are_in_the_order_of_the_weights(bits):
    machine = Machine("avx512", {"pack": bodies(bits, "bfloat16")["pack"]})
    for columns, groups in SHAPES:
        for tokens in (1, 16, 21):
            x = random(tokens, columns, dtype=torch.bfloat16).bfloat16()
            found = packed(machine, x, bits, groups)
            blocks, _, steps, pairs, _, _ = found.shape
            padded = torch.zeros(blocks * TOKENS, groups, steps * WIDE_STEP, dtype=torch.bfloat16)
            padded[:tokens, :, : columns // groups] = x.view(tokens, groups, -1)
            ordered = padded.view(blocks, TOKENS, groups, steps, WIDE_STEP)[..., lane_columns(bits)]
            expected = ordered.view(blocks, TOKENS, groups, steps, pairs, 2)
            assert (found == words(expected.permute(0, 2, 3, 4, 1, 5))).all()


@needs_lookups
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_products_of_every_number_of_blocks(registers, bits, kind):
    machine = Machine("avx512", bodies(bits, kind))
    for columns, groups in SHAPES:
        sketch = random_sketch(bits, groups, ALL_ROWS, columns)
        table = sketch.table.bfloat16() if kind == "bfloat16" else sketch.table.float()
        dense = sketch.dense(table.bfloat16().double())
        for tokens in (1, 16, 20, 45):
            x = random(tokens, columns, dtype=torch.bfloat16).bfloat16()
            expected = (x.double() @ dense.T).numpy()
            inputs = packed(machine, x, bits, groups)
            # All rows, some of them more than once, and not the first nor the last one.
            for row, last in ((1, 16), (17, 35), (33, 35)):
                y = np.full((tokens, ALL_ROWS), 1e9, np.float32)
                index_map = sketch.index_map.numpy()
                machine.run(
                    f"multiply_{len(inputs)}",
                    *(index_map, index_map.shape[1], words(table), groups, columns // groups),
                    *(row, last, inputs, inputs[0].nbytes, y, 4 * ALL_ROWS, tokens),
                )
                assert not registers.configured
                inside = slice(row, min(row + ROWS, last + 1))
                error = np.abs(y[:, inside] - expected[:, inside]).max()
                assert error < 1e-6 * np.abs(expected).max()
                assert (np.delete(y, np.r_[inside], axis=1) == 1e9).all()


@needs_lookups
@pytest.mark.parametrize("bits", BITS)
def test_columns_that_do_not_exist_count_for_nothing(registers, bits):
    """Not even if the entry that is looked up for them is infinite."""
    machine = Machine("avx512", bodies(bits, "bfloat16"))
    sketch = random_sketch(bits, 1, ROWS, 40)
    table = sketch.table.bfloat16()
    table[..., 0] = torch.inf
    index_map = pack(sketch.codes.numpy() | 1, bits)
    inputs = packed(machine, torch.ones(1, 40, dtype=torch.bfloat16), bits, 1)
    y = np.zeros((1, ROWS), np.float32)
    machine.run(
        "multiply_1",
        *(index_map, index_map.shape[1], words(table), 1, 40),
        *(0, ROWS - 1, inputs, inputs[0].nbytes, y, 4 * ROWS, 1),
    )
    assert np.isfinite(y).all()
    assert (y != 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_code_for_amx(bits):
    """Compiled on any machine. The tables of 16 rows stay in registers while steps pass by."""
    text = x86_assembly(AMX.features, bodies(bits, "bfloat16"))
    assert text.count("\ttdpbf16ps") == sum(3 * blocks for blocks in range(1, MOST_BLOCKS + 1))
    loops = [block for block in text.split("\n.LBB") if block.count("\tvpsrlvw") == ROWS]
    assert len(loops) == MOST_BLOCKS
    for loop in loops:
        assert len(re.findall(r"\tvpermw\t%zmm\d+, %zmm\d+, %zmm\d+", loop)) == ROWS
        assert len(re.findall(r"\tvmovdqa64\t%zmm\d+, .*\(", loop)) == ROWS
        assert not re.findall(r"\tv.*\(%rsp", loop)
