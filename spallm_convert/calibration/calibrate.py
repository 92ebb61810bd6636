"""Calibrated sketching of a whole model: block after block, each kept on disk when it is done.

A later run finds the blocks that are there and lets the text through them once more, which costs
two runs of each instead of the sketching. At any time one block, twice, is in memory, with the
hidden states of the text and the sums over the inputs of one layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError, OptionError
from spallm_convert.plan import Plan
from spallm_convert.skeleton import build_empty
from spallm_convert.source import DenseCheckpoint, Source
from spallm_formats import (
    INDEX_MAP_SUFFIX,
    TABLE_DTYPES,
    TABLE_SUFFIX,
    SketchedModule,
    to_float32,
    unpack,
)
from spallm_formats.durable import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from .blocks import Blocks
    from .sketching import Streams

#: Tokens that go through a block at once.
_BATCH_TOKENS = 4096
_SUMS = "sums"

Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class CalibratedModule:
    """A sketched module as it goes to disk, and its sums: squared error and norm of the weights,
    then of the outputs on the calibration text."""

    index_map: np.ndarray[Any, np.dtype[np.uint8]]
    table: np.ndarray[Any, Any]
    sums: tuple[float, float, float, float]


class CalibratedModules:
    """The sketched modules of a model, in files of one block each below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._homes: dict[str, Path] = {}
        for path in sorted(folder.glob("block-*.safetensors")):
            self._homes |= dict.fromkeys(_read_sums(path), path)

    def has(self, modules: dict[str, SketchedModule]) -> bool:
        return modules.keys() <= self._homes.keys()

    def read(self, name: str) -> CalibratedModule:
        """A module by its name in the checkpoint."""
        from safetensors import safe_open

        path = self._homes[name]
        with safe_open(path, framework="numpy") as file:
            index_map = file.get_tensor(name + INDEX_MAP_SUFFIX)
            table = file.get_tensor(name + TABLE_SUFFIX)
        return CalibratedModule(index_map, table, _read_sums(path)[name])

    def write(self, number: int, modules: dict[str, CalibratedModule]) -> None:
        """Keeps the modules of a block, all or none of them."""
        from safetensors.numpy import save

        tensors: dict[str, Any] = {}
        for name, module in modules.items():
            tensors[name + INDEX_MAP_SUFFIX] = module.index_map
            tensors[name + TABLE_SUFFIX] = module.table
        sums = {name: module.sums for name, module in modules.items()}
        path = self._folder / f"block-{number:05d}.safetensors"
        write_atomic(path, save(tensors, metadata={_SUMS: json.dumps(sums)}))
        self._homes |= dict.fromkeys(modules, path)


def draw_tokens(source: Source, config: SketchConfig, *, trust_remote_code: bool) -> Tensor:
    """The calibration text of a conversion, int64 [samples, seqlen], by the source's tokenizer."""
    from spallm_convert.opening import load_tokenizer

    from .text import calibration_tokens

    assert config.calibration is not None
    return calibration_tokens(
        load_tokenizer(source, trust_remote_code=trust_remote_code),
        config.calibration,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
    )


def open_blocks(
    checkpoint: DenseCheckpoint, plan: Plan, tokens: Tensor, *, trust_remote_code: bool = False
) -> Blocks:
    """The blocks of a model, to be gone through with a text.

    Raises CalibrationError when that cannot be done, or the model is no causal language model;
    OptionError for samples that are longer than the model takes.
    """
    from spallm_convert.evaluation import predicts_next_token

    from .blocks import Blocks

    model = build_empty(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
    if not predicts_next_token(model):
        raise CalibrationError(
            f"{type(model).__name__} is no causal language model, and calibration needs one"
        )
    samples, seqlen = tokens.shape
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < seqlen:
        raise OptionError(f"seqlen {seqlen} is more than the {positions} positions of the model")
    batch = max(n for n in range(1, samples + 1) if samples % n == 0 and _fits(n, seqlen))
    return Blocks(model, checkpoint.tensors, plan.paths.values(), tokens, batch=batch)


def calibrate(
    blocks: Blocks, plan: Plan, config: SketchConfig, folder: Path, advance: Advance
) -> CalibratedModules:
    """Sketches every module of a plan on a text; goes on with the blocks that `folder` holds.

    advance: is told the weights and name of every module that is done.
    Raises CalibrationError for activations that are not finite, or a layer that cannot be sketched.
    """
    from .sketching import Streams

    done = CalibratedModules(folder)
    streams = Streams(list(blocks.inputs), list(blocks.inputs))
    for number in range(len(blocks)):
        prefix = blocks.path_of(number) + "."
        names = {
            path.removeprefix(prefix): name
            for name, path in plan.paths.items()
            if path.startswith(prefix)
        }
        modules = {name: plan.metadata.modules[name] for name in names.values()}
        if done.has(modules):
            _replay(blocks, number, names, plan, done, streams)
            for name, module in modules.items():
                advance(module.weights, name)
        else:
            found = _sketch(blocks, number, names, plan, config, streams, advance)
            done.write(number, found)
    return done


def _sketch(
    blocks: Blocks,
    number: int,
    names: dict[str, str],
    plan: Plan,
    config: SketchConfig,
    streams: Streams,
    advance: Advance,
) -> dict[str, CalibratedModule]:
    """A block's modules by their names in the checkpoint; `names` has those by the ones in it."""
    from .sketching import sketch_block

    layers = {inner: plan.metadata.modules[name] for inner, name in names.items()}
    found: dict[str, CalibratedModule] = {}
    for inner, layer in sketch_block(
        blocks, number, layers, streams, plan.metadata, config.without
    ):
        error, norm = layer.rows.sums.sum(axis=0).tolist()
        found[names[inner]] = CalibratedModule(
            layer.rows.index_map, layer.rows.table, (error, norm, *layer.output_sums)
        )
        advance(layers[inner].weights, names[inner])
    return found


def _replay(
    blocks: Blocks,
    number: int,
    names: dict[str, str],
    plan: Plan,
    done: CalibratedModules,
    streams: Streams,
) -> None:
    from spallm_kernels import look_up

    from .sketching import replay_block

    weights = {}
    for inner, name in names.items():
        module, shape = done.read(name), plan.metadata.modules[name]
        stored = TABLE_DTYPES[plan.metadata.table_dtype]
        table = to_float32(module.table.tobytes(), stored).reshape(shape.table_shape)
        weights[inner] = look_up(table, unpack(module.index_map, shape.bits, shape.in_features))
    replay_block(blocks, number, weights, streams)


def _fits(samples: int, seqlen: int) -> bool:
    """Whether so many samples go through a block at once; one always does."""
    return samples == 1 or samples * seqlen <= _BATCH_TOKENS


def _read_sums(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        sums: dict[str, Any] = json.loads(file.metadata()[_SUMS])
    return sums
