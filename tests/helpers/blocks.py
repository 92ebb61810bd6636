"""Blocks of a dense checkpoint, opened as calibration does it."""

from spallm_convert.calibration.blocks import Blocks
from spallm_convert.skeleton import build_empty, read_skeleton
from spallm_convert.source import find_here


def open_blocks(folder, tokens, batch=2):
    checkpoint = find_here(str(folder)).open(folder)
    linears = read_skeleton(checkpoint.folder, checkpoint.config).linears
    model = build_empty(checkpoint.folder, checkpoint.config)
    return Blocks(model, checkpoint.tensors, linears, tokens, batch=batch)
