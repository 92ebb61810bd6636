"""Sketch a whole model with calibration, block by block, and keep each finished block on disk.

A resumed run does not sketch finished blocks again. If a later block is missing, the text is run
through the finished blocks before it, which takes two runs of each block. In memory there are two
copies of one block, the hidden states of the text, and the sums over the inputs of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.config import SketchConfig
from spallm_convert.progress import Progress
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import reduction_note
from spallm_formats import SketchMetadata
from spallm_kernels import look_up

from .sketching import replay_block, sketch_block
from .store import CalibratedModule, CalibratedModules


def calibrate(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    folder: Path,
    progress: Progress,
    *,
    check: Callable[[], None] = lambda: None,
) -> CalibratedModules:
    """Sketch every module of a plan on the text that `blocks` were opened with.

    Args:
        blocks: The dense model. Its `inputs` are taken.
        plan: The modules to sketch.
        config: Options of the conversion, with calibration.
        folder: Finished blocks are written here. Blocks that an earlier run left are reused.
        progress: Is told about every module.
        check: Called before a block is kept. It raises an error if the source has changed.

    Returns:
        The calibrated modules, in files below `folder`.

    Raises:
        CalibrationError: Activations are not finite, or a layer cannot be sketched.
    """
    assert config.calibration is not None
    without = config.calibration.without
    done = CalibratedModules(folder, check)
    layers_of = [plan.in_block(blocks.path_of(number)) for number in range(len(blocks))]
    missing = [
        number
        for number, layers in enumerate(layers_of)
        if not done.has(layers.values(), plan.metadata)
    ]
    if missing:  # healed tables belong to the blocks as they were; later blocks need the originals
        done.forget_healed()
    inputs = blocks.take_inputs()
    streams = Streams(inputs, list(inputs))
    for number, layers in enumerate(layers_of):
        if number in missing:
            sketched = _sketch(blocks, number, layers, plan, without, streams, progress)
            done.write(number, sketched)
            continue
        if missing and number < missing[-1]:  # a later block needs the outputs of this one
            _replay(blocks, number, layers, plan.metadata, done, streams)
        for layer in layers.values():
            progress.advance(layer.module.weights, layer.name)
    return done


def _sketch(
    blocks: Blocks,
    number: int,
    layers: dict[str, Layer],
    plan: Plan,
    without: Sequence[str],
    streams: Streams,
    progress: Progress,
) -> dict[str, CalibratedModule]:
    """Sketch the layers of a block, by their names in it; return them by name in the checkpoint."""
    found: dict[str, CalibratedModule] = {}
    made = sketch_block(blocks, number, layers, streams, plan.metadata, without, plan.limit)
    for inner, sketched in made:
        error, norm = sketched.rows.sums.sum(axis=0).tolist()
        name = layers[inner].name
        found[name] = CalibratedModule(
            sketched.rows.index_map, sketched.rows.table, (error, norm, *sketched.output_sums)
        )
        if plan.limit is not None and sketched.rows.reduced:
            progress.remark(reduction_note(name, sketched.rows.reduced, plan.limit))
        progress.advance(layers[inner].module.weights, name)
    return found


def _replay(
    blocks: Blocks,
    number: int,
    layers: dict[str, Layer],
    metadata: SketchMetadata,
    done: CalibratedModules,
    streams: Streams,
) -> None:
    """Run the streams through a block that an earlier run has sketched."""
    weights = {}
    for inner, layer in layers.items():
        kept = done.read(layer.name)
        table = kept.wide_table(layer.module, metadata)
        weights[inner] = look_up(table, kept.codes(layer.module, metadata))
    replay_block(blocks, number, weights, streams)
