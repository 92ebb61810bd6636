"""Healing: tune the tables of a calibrated sketch towards the dense model.

Index maps stay as they are. Healing needs text, but no labels. First the tables of each block are
tuned on the outputs of the block (`reconstruction.py`). Then all tables are tuned together on the
model's predictions (`distillation.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.stages import Streams
from spallm_convert.calibration.blocks.targets import Target
from spallm_convert.calibration.store import CalibratedModules
from spallm_convert.config import SketchConfig
from spallm_convert.devices import peak_memory
from spallm_convert.errors import CalibrationError
from spallm_convert.progress import Progress
from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.row_blocks import row_blocks
from spallm_convert.sketch.rows import store_rows

from .distillation import STEP_TOKENS, Distilled, distill
from .layers import tables_of_layers, trainable_layer
from .reconstruction import reconstruct
from .tuning import HELD_OUT

#: Most tokens of the text that are used; with more steps they are used several times. Two hidden
#: states of each token are in memory.
MOST_TOKENS = 1 << 17


def samples_for(steps: int, seqlen: int) -> int:
    """Return the number of samples that healing uses if the text has enough, at least two.

    Args:
        steps: Number of optimizer steps.
        seqlen: Tokens per sample.
    """
    trained = steps * max(1, STEP_TOKENS // seqlen)
    most = max(2, MOST_TOKENS // seqlen)
    return min(math.ceil(trained * HELD_OUT / (HELD_OUT - 1)), most)


def heal(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    tokens: Tensor,
    done: CalibratedModules,
    progress: Progress,
) -> None:
    """Tune the tables of all modules and write them to `done`, in their stored dtype.

    The result depends on the seed of `config` alone, if the model's gradients are deterministic. No
    global random state is used.

    Args:
        blocks: The dense model, opened with `tokens` in two batches or more.
        plan: The modules that are sketched.
        config: Options of the conversion, with calibration.
        tokens: The text, int64 [samples, seqlen].
        done: The calibrated modules. They get the healed tables.
        progress: Gets lines on the work, and a remark with the result.

    Raises:
        CalibrationError: Outputs or predictions of the model are not finite.
    """
    begin = time.monotonic()
    targets = _targets(blocks, plan)
    distilled = _tuned(blocks, plan, targets, config, tokens, done, progress.say)
    found = {path: table.cpu().numpy() for path, table in distilled.tables.items()}
    by_layer = tables_of_layers([(targets[path], table) for path, table in found.items()])
    tables = {layer.name: _stored(layer, table, plan, done) for layer, table in by_layer}
    done.write_healed(tables, {"kl_before": distilled.before, "kl_after": distilled.after})
    memory = peak_memory(blocks.device)
    progress.remark(
        f"healed: {distilled.before:.4f} -> {distilled.after:.4f} nats per token from the dense "
        f"model, {time.monotonic() - begin:.0f} s"
        + ("" if memory is None else f", peak memory so far {memory / 1e9:.1f} GB")
    )


def _tuned(
    blocks: Blocks,
    plan: Plan,
    targets: dict[str, Target],
    config: SketchConfig,
    tokens: Tensor,
    done: CalibratedModules,
    say: Callable[[str], None],
) -> Distilled:
    """Reconstruct all blocks, then distill the whole model."""
    text = config.text_options
    assert text is not None
    dtype: torch.dtype = getattr(torch, plan.metadata.table_dtype)
    seed = config.seed

    def sketched(path: str, dense: nn.Module) -> SketchedLinear | None:
        if path not in targets:
            return None
        return trainable_layer(targets[path], dense, plan.metadata, done).to(blocks.device)

    inputs = blocks.take_inputs()
    streams = Streams(inputs, list(inputs))
    tables: dict[str, Tensor] = {}
    for number in range(len(blocks)):
        found, before, after = reconstruct(
            blocks, number, sketched, streams, dtype=dtype, seed=seed
        )
        tables |= found
        say(
            f"healing: block {number + 1} of {len(blocks)}, squared error of outputs "
            f"{before:.5f} -> {after:.5f}"
        )
    streams.sketched.clear()
    model = blocks.assemble(sketched)
    return distill(
        blocks,
        model,
        tables,
        tokens,
        streams.dense,
        steps=text.heal or 0,
        dtype=dtype,
        seed=seed,
        say=say,
    )


def _targets(blocks: Blocks, plan: Plan) -> dict[str, Target]:
    """Return the parameters that are sketched, by path in the model."""
    layers = plan.layers.values()
    by_block = (blocks.targets(number, layers) for number in range(len(blocks)))
    return {target.path: target for targets in by_block for target in targets.values()}


def _stored(
    layer: Layer, table: np.ndarray[Any, Any], plan: Plan, done: CalibratedModules
) -> tuple[np.ndarray[Any, Any], Sequence[float]]:
    """Return a layer's table in its stored dtype, and the layer's squared error and norm.

    Raises:
        CalibrationError: A value is too large for the stored dtype.
    """
    module, metadata = layer.module, plan.metadata
    codes = done.read(layer.name).codes(module, metadata)
    found = []
    for block in row_blocks(layer, module.weights):
        place = slice(block.first, block.first + len(block.weights))

        def choose(_: Any, place: slice = place) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return codes[place]

        try:
            rows = store_rows(
                block.weights, table[place], choose, module, metadata, block.first, plan.limit
            )
        except OverflowError as error:
            raise CalibrationError(
                f"{layer.path} has {error}; use --table-dtype float32"
            ) from error
        found.append(rows)
    _, spec = module.tensors(layer.name, metadata.mapping, metadata.table_dtype)
    stored = np.concatenate([rows.table for rows in found]).reshape(spec.shape)
    return stored, np.concatenate([rows.sums for rows in found]).sum(axis=0).tolist()
