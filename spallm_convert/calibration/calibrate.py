"""Calibrated sketching of a whole model: block after block, each kept on disk when it is done.

A later run finds the blocks that are there and lets the text through them once more, which costs
two runs of each instead of the sketching. At any time one block, twice, is in memory, with the
hidden states of the text and the sums over the inputs of one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError, OptionError
from spallm_convert.plan import Plan
from spallm_convert.skeleton import build_empty
from spallm_convert.sketch import SketchedRows, store_rows
from spallm_convert.source import DenseCheckpoint, Source
from spallm_formats import read_bytes, to_float32

from .store import CalibratedModule, CalibratedModules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spallm_convert.progress import Progress

    from .blocks import Blocks
    from .sketching import Streams

#: Tokens that go through a block at once.
_BATCH_TOKENS = 4096


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
    checkpoint: DenseCheckpoint,
    plan: Plan,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Blocks:
    """The blocks of a model, to be gone through with a text on a device.

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
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise OptionError(
            f"token {int(tokens.max())} is beyond the model's {vocabulary} embeddings: is the "
            f"tokenizer its own?"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < seqlen:
        raise OptionError(f"seqlen {seqlen} is more than the {positions} positions of the model")
    batch = max(n for n in range(1, samples + 1) if samples % n == 0 and _fits(n, seqlen))
    paths = plan.paths.values()
    return Blocks(model, checkpoint.tensors, paths, tokens, batch=batch, device=device)


def calibrate(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    tokens: Tensor,
    folder: Path,
    progress: Progress,
) -> CalibratedModules:
    """Sketches every module of a plan on a text; goes on with what `folder` holds.

    Raises CalibrationError for activations that are not finite, or a layer that cannot be sketched.
    """
    from .sketching import Streams

    done = CalibratedModules(folder)
    streams = Streams(blocks.inputs, list(blocks.inputs))
    blocks.inputs = []
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
                progress.advance(module.weights, name)
        else:
            found = _sketch(blocks, number, names, plan, config, streams, progress)
            done.write(number, found)
    if config.heal and done.healing is None:
        _heal(blocks, plan, config, tokens, done, streams, progress)
    return done


def _heal(
    blocks: Blocks,
    plan: Plan,
    config: SketchConfig,
    tokens: Tensor,
    done: CalibratedModules,
    streams: Streams,
    progress: Progress,
) -> None:
    """Tunes the tables of all modules together, and keeps them as they will be stored."""
    import torch

    from spallm_convert.linear import SketchedLinear

    from .healing import heal

    names = {path: name for name, path in plan.paths.items()}
    hash_seed = plan.metadata.hash_seed if plan.metadata.mapping == "hash" else None

    def sketched(path: str, dense: torch.nn.Linear) -> SketchedLinear | None:
        if path not in names:
            return None
        module, shape = done.read(names[path]), plan.metadata.modules[names[path]]
        layer = SketchedLinear(
            shape, bias=dense.bias, table_dtype=torch.float32, hash_seed=hash_seed
        )
        layer.weight.data = torch.from_numpy(module.index_map)
        layer.weight_table.data = torch.from_numpy(module.wide_table(shape, plan.metadata))
        return layer.to(dense.weight.device)

    healed = heal(
        blocks,
        sketched,
        tokens,
        streams.dense,
        steps=config.heal,
        seed=config.seed,
        say=progress.say,
    )
    rows = {
        names[path]: _stored(names[path], table.cpu().numpy(), plan, done)
        for path, table in healed.tables.items()
    }
    done.write_healed(rows, {"kl_before": healed.before, "kl_after": healed.after})


def _stored(
    name: str, table: np.ndarray[Any, Any], plan: Plan, done: CalibratedModules
) -> SketchedRows:
    """A module with another table, as it goes to disk, and its error."""
    module, tensor = plan.metadata.modules[name], plan.weights[name]
    codes = done.read(name).codes(module, plan.metadata)
    weights = to_float32(read_bytes(tensor, 0, tensor.nbytes), tensor.dtype).reshape(tensor.shape)
    return store_rows(weights, table, lambda _: codes, module, plan.metadata)


def _sketch(
    blocks: Blocks,
    number: int,
    names: dict[str, str],
    plan: Plan,
    config: SketchConfig,
    streams: Streams,
    progress: Progress,
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
    from spallm_kernels import look_up

    from .sketching import replay_block

    weights = {}
    for inner, name in names.items():
        module, shape = done.read(name), plan.metadata.modules[name]
        table, codes = module.wide_table(shape, plan.metadata), module.codes(shape, plan.metadata)
        weights[inner] = look_up(table, codes)
    replay_block(blocks, number, weights, streams)


def _fits(samples: int, seqlen: int) -> bool:
    """Whether so many samples go through a block at once; one always does."""
    return samples == 1 or samples * seqlen <= _BATCH_TOKENS
