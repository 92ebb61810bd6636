"""Open the blocks of a dense checkpoint as calibration does."""

import torch

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.source.locate import find_here
from spallm_convert.source.skeleton import build_empty, read_skeleton


def open_blocks(folder, tokens, batch=2):
    checkpoint = find_here(str(folder)).open(folder)
    linears = linear_paths(checkpoint)
    model = build_empty(checkpoint.folder, checkpoint.config)
    return Blocks(model, checkpoint.tensors, linears, tokens, batch=batch)


def linear_paths(checkpoint):
    """Return the paths of the linear layers in the blocks of a model."""
    skeleton = read_skeleton(checkpoint.folder, checkpoint.config)
    return [parameter.removesuffix(".weight") for parameter in skeleton.weights]


@torch.no_grad()
def run_through(blocks):
    """Return the first batch's hidden states after the last block."""
    hidden = blocks.inputs[0]
    for number in range(len(blocks)):
        hidden = blocks.run(number, blocks.load(number), hidden)
        blocks.unload(number)
    return hidden
