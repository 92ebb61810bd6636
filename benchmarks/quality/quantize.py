"""Quantize the layers of a dense model with any method of the quality benchmark.

Every method returns float32 weights, however it stores them. So all methods are measured in the
same dense model, with the same products.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spallm_convert import CalibrationConfig, SketchConfig, convert
from spallm_convert.calibration.blocks.opening import open_blocks
from spallm_convert.calibration.calibrate import calibrate
from spallm_convert.calibration.healing.heal import heal
from spallm_convert.cli.terminal import ConversionProgress
from spallm_convert.conversion.texts import draw_texts
from spallm_convert.devices import full_float32
from spallm_convert.effort import FAST, NORMAL
from spallm_convert.sketch.layer import Layer
from spallm_convert.sketch.plan import Plan, make_plan
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.locate import locate
from spallm_convert.source.tokenizer import load_tokenizer
from spallm_formats import SketchedCheckpoint, read_bytes, to_float32, unpack
from spallm_kernels import hash_codes, look_up

from . import llamacpp, peers
from .guided import guide, quantize_layers
from .leanquant import quantize_blocks
from .methods import GPTQ_GROUP, HEAL_STEPS, RTN_GROUP, Method, affine_bits, table_bits

Singles = npt.NDArray[np.float32]

#: A file that marks the blocks of a calibrated run as complete.
_COMPLETE = "complete"


class Quantized(NamedTuple):
    """Hold the result of a method.

    stored_bits: bits of all layers on disk. weights: float32 [out_features, in_features] by path in
    the model; can be iterated once. continues: the kind of the run whose results this run
    continued. predicted_loss: if bits are allocated, the loss that `convert` predicted, in nats.
    stored_types: how many weights llama.cpp stored in which type.
    """

    stored_bits: int
    weights: Iterable[tuple[str, Tensor]]
    continues: str | None = None
    predicted_loss: dict[str, float] | None = None
    stored_types: dict[str, int] | None = None


@dataclass(frozen=True)
class Subject:
    """Hold a dense model to quantize.

    plan: names its layers. calibration: a text file, of which `samples` times `seqlen` tokens are
    drawn. scratch: a folder for the files of a method. kept: a folder that passes the blocks of
    calibrated sketches on to healing.
    """

    checkpoint: DenseCheckpoint
    plan: Plan
    calibration: Path
    samples: int
    seqlen: int
    seed: int
    scratch: Path
    kept: Path

    def layers(self) -> Iterator[tuple[str, Singles]]:
        """Yield the path in the model and the dense weight of every layer to quantize."""
        for layer in self.plan.layers.values():
            weight = layer.weight
            raw = read_bytes(weight, 0, weight.nbytes)
            yield layer.path, to_float32(raw, weight.dtype).reshape(weight.shape)

    def model(self) -> Any:
        """Return the dense model in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint.folder, dtype=torch.float32)

    def sketch_config(self, method: Method, **options: Any) -> SketchConfig:
        return SketchConfig(
            bits=method.bits, groups_per_row=method.groups, seed=self.seed, **options
        )

    def calibrated_config(self, method: Method, **options: Any) -> SketchConfig:
        """Return the config of a method. options: further ones of calibration."""
        return self.sketch_config(method, calibration=self.calibration_config(**options))

    def calibration_config(self, **options: Any) -> CalibrationConfig:
        return CalibrationConfig(
            text=str(self.calibration), samples=self.samples, seqlen=self.seqlen, **options
        )

    def tokens(self, method: Method) -> Tensor:
        """Return the calibration tokens, int64 [samples, seqlen], the same for every method."""
        source, config = locate(str(self.checkpoint.folder)), self.calibrated_config(method)
        return draw_texts(source, config, trust_remote_code=False).calibration


def open_subject(
    dense: Path, scratch: Path, kept: Path, calibration: Path, **drawn: int
) -> Subject:
    """Open the model of a folder, with all linear layers inside its blocks to be quantized."""
    checkpoint = locate(str(dense)).open(scratch)
    plan = make_plan(checkpoint, SketchConfig(effort="fast", groups_per_row=1))
    return Subject(checkpoint, plan, calibration, scratch=scratch, kept=kept, **drawn)


def quantize(method: Method, subject: Subject) -> Quantized:
    """Run a method in full float32, as `convert` does."""
    with full_float32():
        return KINDS[method.kind](method, subject)


def _dense(method: Method, subject: Subject) -> Quantized:
    return Quantized(16 * subject.plan.sketched_weights, ())


def _rtn(method: Method, subject: Subject) -> Quantized:
    found = {}
    for path, weights in subject.layers():
        found[path] = torch.from_numpy(round_to_nearest(weights, method.bits, RTN_GROUP))
    return Quantized(
        sum(affine_bits(*w.shape, method.bits, RTN_GROUP) for w in found.values()), found.items()
    )


def round_to_nearest(weights: Singles, bits: int, group: int) -> Singles:
    """Round rows to integers of `bits` bits, asymmetric, by groups of columns.

    Scales are float16. Zeros are integers of the same number of bits, so that 0 stays 0.
    """
    top = 2**bits - 1
    found = np.empty_like(weights)
    for first in range(0, weights.shape[1], group):
        part = weights[:, first : first + group]
        low = np.minimum(part.min(axis=1, keepdims=True), 0)
        high = np.maximum(part.max(axis=1, keepdims=True), 0)
        scale = ((high - low) / top).astype(np.float16).astype(np.float32)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low / scale), 0, top)
        codes = np.clip(np.rint(part / scale) + zero, 0, top)
        found[:, first : first + group] = (codes - zero) * scale
    return found


def _layerwise(quantizer: Callable[[Tensor, int], tuple[Tensor, int]]) -> Any:
    """Run a method that takes one float32 weight and returns it with its stored bytes."""

    def run(method: Method, subject: Subject) -> Quantized:
        found, stored = {}, 0
        for path, weights in subject.layers():
            found[path], nbytes = quantizer(torch.from_numpy(weights), method.bits)
            stored += nbytes
        return Quantized(8 * stored, found.items())

    return run


def _whole(quantizer: Callable[..., None], group: int) -> Any:
    """Run a method that quantizes a whole model in place, to integers in groups."""

    def run(method: Method, subject: Subject) -> Quantized:
        model, tokens = subject.model(), subject.tokens(method)
        tokenizer = load_tokenizer(locate(str(subject.checkpoint.folder)))
        quantizer(model, tokenizer, tokens, method.bits, subject.seed)
        found = {
            path: model.get_submodule(path).weight.detach().float() for path in subject.plan.by_path
        }
        return Quantized(
            sum(affine_bits(*w.shape, method.bits, group) for w in found.values()), found.items()
        )

    return run


def _llamacpp(method: Method, subject: Subject) -> Quantized:
    assert method.mixture is not None
    folder, tokens = subject.checkpoint.folder, subject.tokens(method)
    text = llamacpp.decoded(load_tokenizer(locate(str(folder))), tokens)
    shape = (subject.samples, subject.seqlen)
    path = llamacpp.quantize(folder, text, shape, method.mixture, subject.scratch)
    found = llamacpp.read(path, subject.plan.by_path)
    return Quantized(
        8 * sum(layer.nbytes for layer in found.values()),
        llamacpp.weights(found),
        stored_types=llamacpp.sizes_by_type(found),
    )


def _leanquant(method: Method, subject: Subject) -> Quantized:
    tokens = subject.tokens(method)
    blocks = open_blocks(subject.checkpoint, subject.plan, tokens)
    found = dict(quantize_blocks(blocks, list(subject.plan.by_path), method.bits))
    return Quantized(sum(table_bits(*w.shape, method.bits) for w in found.values()), found.items())


def _guided(method: Method, subject: Subject) -> Quantized:
    model = subject.model()
    sums = guide(model, list(subject.plan.by_path), subject.tokens(method))
    found = dict(quantize_layers(model, sums, method.bits))
    return Quantized(sum(table_bits(*w.shape, method.bits) for w in found.values()), found.items())


def _sketch(method: Method, subject: Subject) -> Quantized:
    mapping = "hash" if method.kind == "hash" else "cluster"
    return _converted(subject, subject.sketch_config(method, effort=FAST, mapping=mapping))


def _sketch_normal(method: Method, subject: Subject) -> Quantized:
    """Sketch as the plain command does: with the built-in text, whatever text others get."""
    return _converted(subject, subject.sketch_config(method, effort=NORMAL))


def _converted(subject: Subject, config: SketchConfig) -> Quantized:
    folder = subject.scratch / "sketched"
    report = convert(subject.checkpoint.folder, folder, config)
    sketched = SketchedCheckpoint.open(folder)
    stored = sum(spec.nbytes for spec in sketched.metadata.tensors().values())
    return Quantized(
        8 * stored,
        _read_sketched(sketched, subject.plan),
        predicted_loss=report.document.get("predicted_loss"),
    )


def _sketch_calibrated(method: Method, subject: Subject) -> Quantized:
    """Sketch as `convert` does, but keep the blocks for a run that heals them."""
    folder = _kept(method, subject)
    shutil.rmtree(folder, ignore_errors=True)
    found = _calibrated(method, subject, folder, heal_steps=0)
    (folder / _COMPLETE).touch()
    return found


def _sketch_healed(method: Method, subject: Subject) -> Quantized:
    """Heal the blocks of a calibrated run; make new ones unless all of them exist."""
    folder, kept = subject.scratch / "calibrated", _kept(method, subject)
    continues = (kept / _COMPLETE).exists()
    if continues:
        shutil.copytree(kept, folder)
    found = _calibrated(method, subject, folder, heal_steps=HEAL_STEPS)
    return found._replace(continues="sketch-calibrated" if continues else None)


def _sketch_allocated(method: Method, subject: Subject) -> Quantized:
    config = SketchConfig(
        seed=subject.seed,
        calibration=subject.calibration_config(target_bits=method.target),
    )
    return _converted(subject, config)


def _kept(method: Method, subject: Subject) -> Path:
    return subject.kept / f"{method.bits}bit-gpr{method.groups}"


def _calibrated(method: Method, subject: Subject, folder: Path, *, heal_steps: int) -> Quantized:
    config = subject.calibrated_config(method, heal=heal_steps)
    plan = make_plan(subject.checkpoint, config)
    source = locate(str(subject.checkpoint.folder))
    shown, for_healing = draw_texts(source, config, trust_remote_code=False)
    folder.mkdir(parents=True, exist_ok=True)
    with ConversionProgress() as progress:
        progress.start(plan.sketched_weights)
        blocks = open_blocks(subject.checkpoint, plan, shown)
        modules = calibrate(blocks, plan, config, folder, progress)
        if for_healing is not None:
            blocks = open_blocks(subject.checkpoint, plan, for_healing, to_heal=True)
            heal(blocks, plan, config, for_healing, modules, progress)
    specs = plan.metadata.tensors()

    def dense(layer: Layer) -> Tensor:
        found = modules.read(layer.name)
        table = found.wide_table(layer.module, plan.metadata)
        return torch.from_numpy(look_up(table, found.codes(layer.module, plan.metadata)))

    weights = ((layer.path, dense(layer)) for layer in plan.layers.values())
    return Quantized(8 * sum(spec.nbytes for spec in specs.values()), weights)


def _read_sketched(sketched: SketchedCheckpoint, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    metadata = sketched.metadata
    for name, module in metadata.modules.items():
        rows, columns, bits = module.out_features, module.in_features, module.bits
        if metadata.mapping == "hash":
            codes = hash_codes(rows, columns, bits, metadata.hash_seed)
        else:
            codes = unpack(sketched.index_map(name), bits, columns)
        yield plan.layers[name].path, torch.from_numpy(look_up(sketched.table(name), codes))


#: By the kind that a method names.
KINDS: dict[str, Callable[[Method, Subject], Quantized]] = {
    "dense": _dense,
    "rtn": _rtn,
    "nf4": _layerwise(peers.nf4),
    "hqq": _layerwise(peers.hqq),
    "gptq": _whole(peers.gptq, GPTQ_GROUP),
    "autoround": _whole(peers.autoround, RTN_GROUP),
    "leanquant": _leanquant,
    "guided": _guided,
    "llamacpp": _llamacpp,
    "hash": _sketch,
    "sketch": _sketch,
    "sketch-normal": _sketch_normal,
    "sketch-calibrated": _sketch_calibrated,
    "sketch-healed": _sketch_healed,
    "sketch-allocated": _sketch_allocated,
}
