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
from spallm_convert.sketch.plan import Plan
from spallm_convert.sketch.rows import store_rows
from spallm_formats import read_bytes, to_float32

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
    name_of = plan.name_of
    tables = {
        name_of[path]: _stored(name_of[path], table.cpu().numpy(), plan, done)
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
    name_of = plan.name_of
    dtype: torch.dtype = getattr(torch, plan.metadata.table_dtype)
    seed = config.seed

    def sketched(path: str, dense: nn.Linear) -> SketchedLinear | None:
        return _layer(name_of[path], dense, plan, done) if path in name_of else None

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


def _layer(name: str, dense: nn.Linear, plan: Plan, done: CalibratedModules) -> SketchedLinear:
    """A calibrated module with a float32 table, in the place of its dense layer."""
    module, shape = done.read(name), plan.metadata.modules[name]
    hash_seed = plan.metadata.hash_seed if plan.metadata.mapping == "hash" else None
    layer = SketchedLinear(shape, bias=dense.bias, table_dtype=torch.float32, hash_seed=hash_seed)
    layer.weight.data = torch.from_numpy(module.index_map)
    layer.weight_table.data = torch.from_numpy(module.wide_table(shape, plan.metadata))
    return layer.to(dense.weight.device)


def _stored(
    name: str, table: np.ndarray[Any, Any], plan: Plan, done: CalibratedModules
) -> tuple[np.ndarray[Any, Any], Sequence[float]]:
    """A table of a module as it goes to disk, and the module's squared error and norm with it."""
    module, tensor = plan.metadata.modules[name], plan.weights[name]
    codes = done.read(name).codes(module, plan.metadata)
    weights = to_float32(read_bytes(tensor, 0, tensor.nbytes), tensor.dtype).reshape(tensor.shape)
    rows = store_rows(weights, table, lambda _: codes, module, plan.metadata)
    return rows.table, rows.sums.sum(axis=0).tolist()
