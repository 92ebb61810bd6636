"""Sketch a whole model with calibration, block by block, and keep each finished block on disk.

A resumed run does not sketch finished blocks again. If a later block is missing, the text is run
through the finished blocks before it, which takes two runs of each block. In memory there are two
copies of one block, the hidden states of the text, and the sums over the inputs of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.blocks.targets import Target
from spallm_convert.config import SketchConfig
from spallm_convert.progress import Progress
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import reduction_note
from spallm_formats import SketchMetadata

from .experts import SeenExperts
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
    """Sketch the modules of a plan in blocks that the text of `blocks` runs through.

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
    done = CalibratedModules(folder, check)
    found = [
        _Part(listed, number, listed.targets(number, plan.layers.values()))
        for listed in blocks.lists
        for number in range(len(listed))
    ]
    missing = [
        number for number, part in enumerate(found) if not done.has(part.layers, plan.metadata)
    ]
    if missing:  # healed tables belong to the blocks as they were; later blocks need the originals
        done.forget_healed()
    inputs = blocks.take_inputs()
    streams = Streams(inputs, list(inputs))
    for number, part in enumerate(found):
        if part.number == 0 and number and missing and number <= missing[-1]:
            streams = Streams(*part.blocks.enter(*streams))
        if number in missing:
            sketched, seen = _sketch(part, plan, config, streams, progress)
            done.write(number, sketched, (len(seen.few), len(seen.seen)))
            continue
        if missing and number < missing[-1]:  # a later block needs the outputs of this one
            _replay(part, plan.metadata, done, streams)
        for layer in part.layers:
            progress.advance(layer.module.weights, layer.name)
    return done


class _Part(NamedTuple):
    """A block of the model.

    Attributes:
        blocks: The blocks of its list.
        number: Its number in the list.
        targets: The parameters to sketch, by name in the block.
    """

    blocks: Blocks
    number: int
    targets: dict[str, Target]

    @property
    def layers(self) -> list[Layer]:
        """Return the stored weights to sketch."""
        layers = (layer for target in self.targets.values() for layer in target.layers)
        return list({layer.name: layer for layer in layers}.values())


def _sketch(
    part: _Part, plan: Plan, config: SketchConfig, streams: Streams, progress: Progress
) -> tuple[dict[str, CalibratedModule], SeenExperts]:
    """Sketch the layers of a block; return them by name in the checkpoint, and its experts."""
    text = config.text_options
    assert text is not None
    found: dict[str, CalibratedModule] = {}
    seen, metadata = SeenExperts(), plan.metadata
    without = text.without
    made = sketch_block(
        part.blocks, part.number, part.targets, streams, metadata, without, plan.limit, seen
    )
    for sketched in made:
        name, module = sketched.layer.name, sketched.layer.module
        codes, table = module.tensors(name, metadata.mapping, metadata.table_dtype)
        found[name] = CalibratedModule(
            sketched.index_map.reshape(codes.shape),
            sketched.table.reshape(table.shape),
            sketched.sums,
        )
        if plan.limit is not None and sketched.reduced:
            progress.remark(reduction_note(name, sketched.reduced, plan.limit))
        progress.advance(module.weights, name)
    return found, seen


def _replay(
    part: _Part, metadata: SketchMetadata, done: CalibratedModules, streams: Streams
) -> None:
    """Run the streams through a block that an earlier run has sketched."""

    def read(layer: Layer) -> np.ndarray[Any, Any]:
        return done.read(layer.name).dense(layer.module, metadata)

    replay_block(part.blocks, part.number, part.targets, read, streams)
