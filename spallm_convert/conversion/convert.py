"""`convert`: carries out a plan, shard by shard.

A shard that is whole is never written twice, so a killed conversion goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spallm_convert.calibration.allocation.allocate import allocate
from spallm_convert.calibration.blocks.blocks import Blocks
from spallm_convert.calibration.blocks.opening import open_blocks
from spallm_convert.calibration.calibrate import calibrate
from spallm_convert.calibration.healing.heal import heal
from spallm_convert.calibration.store import CalibratedModules, calibrated_bytes, kept_bytes
from spallm_convert.config import SketchConfig
from spallm_convert.devices import (
    AUTO_DEVICE,
    CPU,
    clear_memory_errors,
    cpu_threads,
    find_device,
    full_float32,
)
from spallm_convert.errors import CalibrationError, FormatError, OptionError, SpallmError
from spallm_convert.paths import user_path
from spallm_convert.progress import Progress, Silent
from spallm_convert.sketch.plan import Plan, make_plan, reallocate
from spallm_convert.source.checkpoint import DenseCheckpoint, extra_files
from spallm_convert.source.hub import remote_checkpoint
from spallm_convert.source.locate import Source, find_here, locate
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    Staging,
    check_output_folder,
    index_json,
    is_unfinished,
    remove_leftovers,
    to_json,
)

from .card import CARD_FILE, model_card
from .identity import identity
from .report import REPORT_FILE, Report, make_report
from .shards import write_shard
from .texts import Texts, draw_texts

_CALIBRATED = "calibrated"
_HASHED = (
    "a hashed index map keeps only the mean of the weights that collide: without training, "
    "perplexity is above 10,000 at every width; train the tables before you use this model"
)


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SketchConfig | None = None,
    *,
    revision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    device: str = AUTO_DEVICE,
    progress: Progress | None = None,
) -> Report:
    """Sketches a model: Hub id, local folder or GGUF file -> the folder `output`.

    device: where calibration computes, "cpu", "cuda", "cuda:1", ... or "auto" for a GPU if there is
    one; without calibration everything is done on the CPU.
    Same source, options, device and versions give the same bytes, whatever the number of threads
    (with calibration: but for the last digits of matrix products). An output folder that holds
    something is refused unless `resume` (go on with an interrupted conversion) or `overwrite`
    (replace a checkpoint) is set.
    Raises SpallmError, or OSError when the disk fails.
    """
    config = config or SketchConfig()
    place = _find_place(device, config)
    folder = user_path(output)
    if resume and overwrite:
        raise OptionError("resume and overwrite contradict each other")
    with cpu_threads(threads):
        is_whole = (folder / CONFIG_FILE).exists() and not is_unfinished(folder)
        if not (resume and is_whole):
            check_output_folder(folder, resume=resume, overwrite=overwrite)
        source = locate(os.fspath(model), revision)
        if folder.exists() and folder.samefile(source.path):
            raise OptionError(f"output {folder} is the source itself: choose another folder")
        job = _Job(source, config, place, trust_remote_code, progress or Silent())
        # A plan costs nothing beside hashing the source, so what cannot work is refused first.
        ready = None if source.is_gguf else job.planned(folder)
        texts = job.texts()
        about = source.identity(ready[0] if ready else None)
        same = identity(config, about, texts, place)
        older = _older_report(folder)
        if resume and is_whole and older and older.has_identity(same):
            _check_files(folder, older)
            remove_leftovers(folder)
            return older
        with Staging(folder, same, resume=resume, overwrite=overwrite) as staging:
            if staging.is_published:
                staging.finish_publishing()
                report = Report.read(folder)  # which the interrupted run wrote
                assert report is not None
            else:
                checkpoint, plan = ready or job.planned(staging.scratch("source"))
                plan, report = _carry_out(job, staging, checkpoint, plan, texts, same)
                _publish(staging, checkpoint, plan, report, older)
    if progress is not None and config.mapping == "hash" and "healing" not in report.document:
        progress.remark(_HASHED)
    return report


def plan_conversion(
    model: str | os.PathLike[str],
    config: SketchConfig | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = AUTO_DEVICE,
) -> Plan:
    """What `convert` would do, from headers alone: of weights on the Hub nothing else is fetched.

    A GGUF file is the exception: transformers dequantizes it into a temporary folder. Raises
    OptionError for `target_bits`: bits are chosen when the text has gone through the model; and for
    a `device` that `convert` would not take.
    """
    config = config or SketchConfig()
    _find_place(device, config)
    if config.target_bits is not None:
        raise OptionError(
            f"target_bits {config.target_bits:g} chooses bits by what the model makes of the text, "
            f"so they are not known in advance; plan for bits of 2, 3 or 4 instead"
        )
    source = find_here(os.fspath(model), revision)
    if source is None:
        checkpoint = remote_checkpoint(os.fspath(model), revision)
        return make_plan(checkpoint, config, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = source.open(Path(scratch))
        return make_plan(checkpoint, config, trust_remote_code=trust_remote_code)


def _find_place(device: str, config: SketchConfig) -> torch.device:
    """Where a conversion computes. Raises OptionError for a device that it cannot use."""
    if config.calibration is not None:
        return find_device(device)
    place = find_device(CPU if device == AUTO_DEVICE else device)
    if place.type != CPU:
        raise OptionError(
            f"device {device}: only for a conversion with calibration; others are done on the CPU"
        )
    return place


@dataclass(frozen=True)
class _Job:
    """What is to be converted, and how; place: where calibration computes."""

    source: Source
    config: SketchConfig
    place: torch.device
    trust_remote_code: bool
    progress: Progress

    def planned(self, scratch: Path) -> tuple[DenseCheckpoint, Plan]:
        checkpoint = self.source.open(scratch)
        trust = self.trust_remote_code
        return checkpoint, make_plan(checkpoint, self.config, trust_remote_code=trust)

    def texts(self) -> Texts | None:
        if self.config.calibration is None:
            return None
        return draw_texts(self.source, self.config, trust_remote_code=self.trust_remote_code)

    def blocks(
        self, checkpoint: DenseCheckpoint, plan: Plan, tokens: Tensor, *, to_heal: bool = False
    ) -> Blocks:
        return open_blocks(
            checkpoint,
            plan,
            tokens,
            device=self.place,
            trust_remote_code=self.trust_remote_code,
            to_heal=to_heal,
        )


def _carry_out(
    job: _Job,
    staging: Staging,
    checkpoint: DenseCheckpoint,
    plan: Plan,
    texts: Texts | None,
    same: dict[str, Any],
) -> tuple[Plan, Report]:
    """Calibrates if there are texts, and writes the shards; the plan as it came to be."""
    job.progress.start(plan.sketched_weights)
    sketches: CalibratedModules | None = None
    notes: dict[str, Any] = {}
    if texts is not None:
        with clear_memory_errors(job.place), full_float32():
            plan, sketches, notes = _calibrated(job, staging, checkpoint, plan, texts)
    return plan, _write_shards(staging, plan, same | notes, sketches, job.progress)


def _calibrated(
    job: _Job, staging: Staging, checkpoint: DenseCheckpoint, plan: Plan, texts: Texts
) -> tuple[Plan, CalibratedModules | None, dict[str, Any]]:
    """Every module sketched for the text; None for a model that is not fit, if that is fine. The
    plan with the bits that were chosen, and notes for the report on that, or on why not."""
    folder = staging.scratch(_CALIBRATED, worth_keeping=True)
    config, progress = job.config, job.progress
    assert config.calibration is not None
    try:
        blocks = job.blocks(checkpoint, plan, texts.calibration)
        if texts.healing is not None or config.target_bits is not None:
            blocks.check_predictions()
    except CalibrationError as error:
        if not config.calibration.fallback:
            raise _with_remedy(error, config) from error
        progress.remark(f"not calibrated: {error}")
        return plan, None, {"not_calibrated": str(error)}
    notes: dict[str, Any] = {}
    if config.target_bits is not None:
        allocation = allocate(blocks, plan, config, texts.calibration, folder, progress)
        plan = reallocate(plan, allocation.choices, checkpoint, config)
        notes["predicted_loss"] = allocation.predicted_loss
    needed = calibrated_bytes(plan.metadata, healed=texts.healing is not None)
    _check_space(staging, plan, max(0, needed - kept_bytes(folder)))
    sketches = calibrate(blocks, plan, config, folder, progress)
    if texts.healing is not None and sketches.healing is None:
        blocks = job.blocks(checkpoint, plan, texts.healing, to_heal=True)
        heal(blocks, plan, config, texts.healing, sketches, progress)
    return plan, sketches, notes


def _with_remedy(error: CalibrationError, config: SketchConfig) -> CalibrationError:
    """Return an error that names --fallback, or the same error if that option is not possible."""
    assert config.calibration is not None
    if config.calibration.heal or config.target_bits is not None:
        return error
    return CalibrationError(f"{error}; --fallback sketches the weights without calibration")


def _write_shards(
    staging: Staging,
    plan: Plan,
    same: dict[str, Any],
    sketches: CalibratedModules | None,
    progress: Progress,
) -> Report:
    """Writes every shard that is not there yet; returns the report on all of them."""
    _check_space(staging, plan)
    records = {}
    for shard in plan.shards:
        record = staging.record(shard)
        if record is None:
            record = write_shard(staging, shard, plan, sketches, progress)
        elif sketches is None:
            for name in record["modules"]:
                progress.advance(plan.layers[name].module.weights, name)
        records[shard.filename] = record
    return make_report(plan, same, records, sketches.healing if sketches else None)


def _publish(
    staging: Staging,
    checkpoint: DenseCheckpoint,
    plan: Plan,
    report: Report,
    older: Report | None,
) -> None:
    """Writes everything but the shards, and puts the checkpoint in place of the older one."""
    config = checkpoint.config | {"quantization_config": plan.metadata.to_json()}
    documents = {
        CARD_FILE: model_card(report, checkpoint.config).encode(),
        CONFIG_FILE: to_json(config),
    }
    if len(plan.shards) > 1:
        documents[INDEX_FILE] = index_json(plan.shards)
    files = report.files
    for name in extra_files(checkpoint.folder):
        files[name] = staging.copy_file(checkpoint.folder / name, name)
    for name, data in documents.items():
        files[name] = staging.write_file(name, data)
    staging.write_file(REPORT_FILE, to_json(report.document))
    staging.publish([*files, REPORT_FILE], obsolete=list(older.files) if older else [])


def _older_report(folder: Path) -> Report | None:
    """The report of the checkpoint that lies in the folder; None when it has none that is sound."""
    try:
        return Report.read(folder)
    except FormatError:
        return None


def _check_files(folder: Path, report: Report) -> None:
    """Raises SpallmError unless every file of a conversion that was finished is still there."""
    for name, about in report.files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != about.get("bytes"):
            raise SpallmError(
                f"{folder}: {name} is not the one that was converted; use --overwrite to convert "
                f"again"
            )


def _check_space(staging: Staging, plan: Plan, more: int = 0) -> None:
    needed = more + sum(shard.nbytes for shard in plan.shards if not staging.has(shard))
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise SpallmError(
            f"{staging.folder} needs {needed:,} more bytes for the sketched model, its disk has "
            f"{free:,} free"
        )
