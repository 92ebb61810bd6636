"""Calibrated sketching of a whole model: block after block, each kept on disk when it is done.

A later run finds the blocks that are there and lets the text through those before the last that is
not, which costs two runs of each instead of the sketching. At any time one block, twice, is in
memory, with the hidden states of the text and the sums over the inputs of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.config import SketchConfig
from spallm_convert.progress import Progress
from spallm_convert.sketch.plan import Plan
from spallm_kernels import look_up

from .sketching import replay_block, sketch_block
from .store import CalibratedModule, CalibratedModules


def calibrate(
    blocks: Blocks, plan: Plan, config: SketchConfig, folder: Path, progress: Progress
) -> CalibratedModules:
    """Sketches every module of a plan on a text; goes on with what `folder` holds.

    Raises CalibrationError for activations that are not finite, or a layer that cannot be sketched.
    """
    assert config.calibration is not None
    without = config.calibration.without
    done = CalibratedModules(folder)
    names_in = [plan.by_block(blocks.path_of(number)) for number in range(len(blocks))]
    modules = [{n: plan.metadata.modules[n] for n in names.values()} for names in names_in]
    missing = [number for number in range(len(blocks)) if not done.has(modules[number])]
    if missing:  # tables were healed for all of the blocks, and would let another text through
        done.forget_healed()
    inputs = blocks.take_inputs()
    streams = Streams(inputs, list(inputs))
    for number, names in enumerate(names_in):
        if number in missing:
            done.write(number, _sketch(blocks, number, names, plan, without, streams, progress))
            continue
        if missing and number < missing[-1]:  # a later block needs what comes out of this one
            _replay(blocks, number, names, plan, done, streams)
        for name, module in modules[number].items():
            progress.advance(module.weights, name)
    return done


def _sketch(
    blocks: Blocks,
    number: int,
    names: dict[str, str],
    plan: Plan,
    without: Sequence[str],
    streams: Streams,
    progress: Progress,
) -> dict[str, CalibratedModule]:
    """A block's modules by their names in the checkpoint; `names` has those by the ones in it."""
    layers = {inner: plan.metadata.modules[name] for inner, name in names.items()}
    found: dict[str, CalibratedModule] = {}
    for inner, layer in sketch_block(blocks, number, layers, streams, plan.metadata, without):
        error, norm = layer.rows.sums.sum(axis=0).tolist()
        found[names[inner]] = CalibratedModule(
            layer.rows.index_map, layer.rows.table, (error, norm, *layer.output_sums)
        )
        progress.advance(layers[inner].weights, names[inner])
    return found


def _replay(
    blocks: Blocks,
    number: int,
    names: dict[str, str],
    plan: Plan,
    done: CalibratedModules,
    streams: Streams,
) -> None:
    weights = {}
    for inner, name in names.items():
        module, shape = done.read(name), plan.metadata.modules[name]
        table, codes = module.wide_table(shape, plan.metadata), module.codes(shape, plan.metadata)
        weights[inner] = look_up(table, codes)
    replay_block(blocks, number, weights, streams)
