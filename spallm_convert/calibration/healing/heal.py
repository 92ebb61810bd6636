"""Healing: the tables of a calibrated sketch tuned until the model does what the dense one does.

Index maps stay as they are; nothing but text is needed, and no labels. First block by block on the
outputs of each (`reconstruction.py`), then all together on the predictions (`distillation.py`).
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
from spallm_convert.calibration.store import CalibratedModules
from spallm_convert.config import SketchConfig
from spallm_convert.devices import peak_memory
from spallm_convert.progress import Progress
from spallm_convert.runtime.linear import SketchedLinear
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import store_rows
from spallm_formats import SketchMetadata, read_bytes, to_float32

from .distillation import STEP_TOKENS, Distilled, distill
from .reconstruction import reconstruct
from .tuning import HELD_OUT

#: Of the text at most so many tokens are used, again and again if there are more steps: two hidden
#: states of each are in memory.
MOST_TOKENS = 1 << 17


def samples_for(steps: int, seqlen: int) -> int:
    """Samples of the text that healing would use, if there are so many; at least two."""
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
    """Tunes the tables of all modules and keeps them in `done`, as they will be stored.

    blocks: opened with `tokens`, int64 [samples, seqlen], in two batches or more. Deterministic for
    the seed of `config`, if the model's gradients are; no global random state is used. Raises
    CalibrationError for a model whose outputs on the text are not finite.
    """
    begin = time.monotonic()
    distilled = _tuned(blocks, plan, config, tokens, done, progress.say)
    layers = plan.by_path
    tables = {
        layers[path].name: _stored(layers[path], table.cpu().numpy(), plan.metadata, done)
        for path, table in distilled.tables.items()
    }
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
    config: SketchConfig,
    tokens: Tensor,
    done: CalibratedModules,
    say: Callable[[str], None],
) -> Distilled:
    assert config.calibration is not None
    layers = plan.by_path
    dtype: torch.dtype = getattr(torch, plan.metadata.table_dtype)
    seed = config.seed

    def sketched(path: str, dense: nn.Linear) -> SketchedLinear | None:
        return _trainable(layers[path], dense, plan.metadata, done) if path in layers else None

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
        steps=config.calibration.heal,
        dtype=dtype,
        seed=seed,
        say=say,
    )


def _trainable(
    layer: Layer, dense: nn.Linear, metadata: SketchMetadata, done: CalibratedModules
) -> SketchedLinear:
    """Return a calibrated layer with a float32 table, to take the place of its dense layer."""
    kept = done.read(layer.name)
    hash_seed = metadata.hash_seed if metadata.mapping == "hash" else None
    made = SketchedLinear(
        layer.module, bias=dense.bias, table_dtype=torch.float32, hash_seed=hash_seed
    )
    made.weight.data = torch.from_numpy(kept.index_map)
    made.weight_table.data = torch.from_numpy(kept.wide_table(layer.module, metadata))
    return made.to(dense.weight.device)


def _stored(
    layer: Layer, table: np.ndarray[Any, Any], metadata: SketchMetadata, done: CalibratedModules
) -> tuple[np.ndarray[Any, Any], Sequence[float]]:
    """Return a layer's table as it goes to disk, and the layer's squared error and norm with it."""
    codes = done.read(layer.name).codes(layer.module, metadata)
    weight = layer.weight
    raw = read_bytes(weight, 0, weight.nbytes)
    dense = to_float32(raw, weight.dtype).reshape(weight.shape)
    rows = store_rows(dense, table, lambda _: codes, layer.module, metadata)
    return rows.table, rows.sums.sum(axis=0).tolist()
