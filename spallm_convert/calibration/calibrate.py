"""Calibrated sketching of a whole model: block after block, each kept on disk when it is done.

A later run finds the blocks that are there and lets the text through those before the last that is
not, which costs two runs of each instead of the sketching. At any time one block, twice, is in
memory, with the hidden states of the text and the sums over the inputs of one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from spallm_convert.config import SketchConfig
from spallm_convert.errors import CalibrationError, SourceError
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.locate import Source
from spallm_convert.source.skeleton import build_empty

from .store import CalibratedModule, CalibratedModules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spallm_convert.calibration.blocks.blocks import Blocks
    from spallm_convert.progress import Progress

    from .sketching import Streams

#: Tokens that go through a block at once.
_BATCH_TOKENS = 4096
#: For healing there are at least so many batches, if there are as many samples.
_HEALING_BATCHES = 8


class Texts(NamedTuple):
    """What a model is shown, int64 [samples, seqlen] each: to be sketched for, and to be healed on
    if it is."""

    calibration: Tensor
    healing: Tensor | None


def draw_texts(source: Source, config: SketchConfig, *, trust_remote_code: bool) -> Texts:
    """Both texts of a conversion, from `config.calibration` by the source's tokenizer.

    For healing it is as much as there is and its steps would use; of many samples as many as make
    whole batches, since those that run at once divide their number. Raises SourceError for a text
    that is too short.
    """
    from spallm_convert.calibration.healing.heal import samples_for
    from spallm_convert.source.tokenizer import load_tokenizer

    from .windows import CalibrationText

    assert config.calibration is not None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    text = CalibrationText(tokenizer, config.calibration)
    seqlen, seed = config.seqlen, config.seed
    shown = text.draw(samples=config.samples, seqlen=seqlen, seed=seed)
    if not config.heal:
        return Texts(shown, None)
    most = samples_for(config.heal, seqlen)
    healing = text.draw(samples=most, seqlen=seqlen, seed=seed, or_fewer=True)
    if len(healing) < 2:
        raise SourceError(
            f"text {config.calibration!r} is too short: healing takes at least 2 samples of "
            f"{seqlen} tokens, to train on and to leave out"
        )
    batch = _at_once(seqlen)
    if len(healing) >= _HEALING_BATCHES * batch:
        healing = healing[: len(healing) // batch * batch]
    return Texts(shown, healing)


def open_blocks(
    checkpoint: DenseCheckpoint,
    plan: Plan,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    to_heal: bool = False,
) -> Blocks:
    """The blocks of a model, to be gone through with a text on a device.

    to_heal: in more batches, so that some can be left out.

    Raises CalibrationError when that cannot be done, or the model is no causal language model;
    OptionError for samples that are longer than the model takes.
    """
    from spallm_convert.calibration.blocks.blocks import Blocks
    from spallm_convert.source.causal import check_tokens, predicts_next_token

    model = build_empty(checkpoint.folder, checkpoint.config, trust_remote_code=trust_remote_code)
    if not predicts_next_token(model):
        raise CalibrationError(
            f"{type(model).__name__} is no causal language model, and calibration needs one"
        )
    samples, seqlen = tokens.shape
    check_tokens(model, tokens, seqlen, f"seqlen {seqlen}")
    most = samples // min(samples, _HEALING_BATCHES) if to_heal else samples
    batch = max(n for n in range(1, min(most, _at_once(seqlen)) + 1) if samples % n == 0)
    paths = plan.paths.values()
    return Blocks(model, checkpoint.tensors, paths, tokens, batch=batch, device=device)


def calibrate(
    blocks: Blocks, plan: Plan, config: SketchConfig, folder: Path, progress: Progress
) -> CalibratedModules:
    """Sketches every module of a plan on a text; goes on with what `folder` holds.

    Raises CalibrationError for activations that are not finite, or a layer that cannot be sketched.
    """
    from .sketching import Streams

    done = CalibratedModules(folder)
    inside = [plan.inside(blocks.path_of(number)) for number in range(len(blocks))]
    modules = [{n: plan.metadata.modules[n] for n in names.values()} for names in inside]
    missing = [number for number in range(len(blocks)) if not done.has(modules[number])]
    if missing:  # tables were healed for all of the blocks, and would let another text through
        done.forget_healed()
    streams = Streams(blocks.inputs, list(blocks.inputs))
    blocks.inputs = []
    for number, names in enumerate(inside):
        if number in missing:
            done.write(number, _sketch(blocks, number, names, plan, config, streams, progress))
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


def _at_once(seqlen: int) -> int:
    """Samples that may go through a block at once."""
    return max(1, _BATCH_TOKENS // seqlen)
