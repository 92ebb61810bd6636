"""Convert a model: make a plan and carry it out, shard by shard.

A complete shard is never written twice, so an interrupted conversion continues where it stopped.
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
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.extra_files import extra_files
from spallm_convert.source.hub import remote_checkpoint
from spallm_convert.source.locate import Source, find_here, locate
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    Staging,
    check_output_folder,
    check_replaceable,
    index_json,
    is_unfinished,
    remove_leftovers,
    sha256,
    summary,
    to_json,
)

from .card import CARD_FILE, model_card
from .identity import identity
from .loadable import check_source
from .report import REPORT_FILE, Report, make_report
from .shards import kept_record, write_shard
from .texts import Texts, draw_texts
from .unchanged import SourceWatch

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
    """Sketch a model and write the sketched checkpoint to a folder.

    The same source, options, device and versions give the same bytes for any number of threads.
    With calibration, the last digits of matrix products may differ between numbers of threads.

    Args:
        model: A model on the Hub ("ORG/NAME"), a local folder, or a GGUF file.
        output: The folder to write. A folder that is not empty is refused, unless `resume` or
            `overwrite` is set.
        config: Options of the conversion. Default: `SketchConfig()`, 4 bits without calibration.
        revision: Branch, tag or commit on the Hub. Default: the main branch.
        resume: Continue an interrupted conversion in `output`. If the conversion is complete,
            return its report. Default: False.
        overwrite: Replace the checkpoint in `output`. Default: False.
        trust_remote_code: Run Python code that comes with the model, if its architecture needs it.
            Read the code first. Default: False.
        threads: Number of CPU threads. Default: all for numba, and torch's own number for torch.
        device: Where calibration computes: "cpu", "cuda", "cuda:1" and so on, or "auto", which
            takes a GPU if there is one. Without calibration, everything is done on the CPU.
            Default: "auto".
        progress: Is told how far the work is. Default: nothing is reported.

    Returns:
        The report, as it stands in `conversion.json`.

    Raises:
        CalibrationError: The model cannot be run block by block, or values are not finite.
        OptionError: An option, or a combination of options, cannot be used.
        SourceError: The model or the text cannot be found or read, on this machine or on the Hub.
        SpallmError: The output folder cannot be used or has not enough space, or memory runs out.
            All errors above are subclasses.
        OSError: The disk fails.
    """
    config = config or SketchConfig()
    place = _find_place(device, config)
    folder = user_path(output)
    if resume and overwrite:
        raise OptionError("resume and overwrite contradict each other: set only one of them")
    with cpu_threads(threads):
        is_whole = (folder / CONFIG_FILE).exists() and not is_unfinished(folder)
        if not (resume and is_whole):
            check_output_folder(folder, resume=resume, overwrite=overwrite)
        source = locate(os.fspath(model), revision)
        if folder.exists() and folder.samefile(source.path):
            raise OptionError(f"output {folder} is the source itself: choose another folder")
        watch = SourceWatch(source)
        job = _Job(source, config, place, trust_remote_code, progress or Silent(), watch)
        if left := source.left_behind():
            job.progress.remark(f"not copied: {summary(left, ', ')}")
        # Planning is cheap compared with hashing the source, so errors of the plan come first.
        ready = None if source.is_gguf else job.planned(folder)
        texts = job.texts()
        about = source.identity(ready[0] if ready else None)
        watch.expect(about["files"])
        same = identity(config, about, texts, place)
        older = _older_report(folder)
        if resume and is_whole and older and older.has_identity(same):
            _check_files(folder, older)
            remove_leftovers(folder)
            return older
        with Staging(folder, same, resume=resume, overwrite=overwrite) as staging:
            warning = None
            if staging.is_published:
                staging.finish_publishing()
                report = Report.read(folder)  # which the interrupted run wrote
                assert report is not None
            else:
                checkpoint, plan = ready or job.planned(staging.scratch("source"))
                written = [shard.filename for shard in plan.shards]
                if len(written) > 1:
                    written.append(INDEX_FILE)
                check_replaceable(folder, written, _hashes(older))
                plan, report = _carry_out(job, staging, checkpoint, plan, texts, same)
                _publish(job, staging, checkpoint, plan, report, older)
                warning = plan.dense_warning
    if warning is not None:
        job.progress.remark(warning)
    if config.mapping == "hash" and "healing" not in report.document:
        job.progress.remark(_HASHED)
    return report


def plan_conversion(
    model: str | os.PathLike[str],
    config: SketchConfig | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = AUTO_DEVICE,
) -> Plan:
    """Plan a conversion without carrying it out.

    Only headers of weights are read, and only headers are fetched from the Hub. GGUF files are the
    exception: transformers dequantizes them into a temporary folder.

    Args:
        model: A model on the Hub ("ORG/NAME"), a local folder, or a GGUF file.
        config: Options of the conversion, without `target_bits`. Default: `SketchConfig()`.
        revision: Branch, tag or commit on the Hub. Default: the main branch.
        trust_remote_code: Run Python code that comes with the model, if its architecture needs it.
            Read the code first. Default: False.
        device: The device that `convert` would get. It is only checked. Default: "auto".

    Returns:
        The plan that `convert` would carry out.

    Raises:
        OptionError: An option cannot be used. `target_bits` is refused, because bits are only
            chosen when the text has been run through the model.
        SourceError: The model cannot be found or read, on this machine or on the Hub, or it has no
            layer to sketch.
    """
    config = config or SketchConfig()
    _find_place(device, config)
    if config.target_bits is not None:
        raise OptionError(
            f"target_bits {config.target_bits:g}: bits are chosen by running the model on the text "
            f"and are not known in advance; plan with bits 2, 3 or 4 instead"
        )
    source = find_here(os.fspath(model), revision)
    if source is None:
        checkpoint = remote_checkpoint(os.fspath(model), revision)
        return _checked_plan(checkpoint, config, trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        return _checked_plan(source.open(Path(scratch)), config, trust_remote_code)


def _checked_plan(
    checkpoint: DenseCheckpoint, config: SketchConfig, trust_remote_code: bool
) -> Plan:
    """Plan a conversion, and check that its result will load."""
    plan = make_plan(checkpoint, config, trust_remote_code=trust_remote_code)
    check_source(checkpoint, plan, trust_remote_code=trust_remote_code)
    return plan


def _find_place(device: str, config: SketchConfig) -> torch.device:
    """Return the device to compute on. Raise OptionError if the conversion cannot use it."""
    if config.calibration is not None:
        return find_device(device)
    place = find_device(CPU if device == AUTO_DEVICE else device)
    if place.type != CPU:
        raise OptionError(
            f"device {device}: only for a conversion with calibration, others are done on the CPU; "
            f"leave out --device, or add --calibration"
        )
    return place


@dataclass(frozen=True)
class _Job:
    """A source and how to convert it.

    place: the device that calibration computes on; watch: notices changes of the source.
    """

    source: Source
    config: SketchConfig
    place: torch.device
    trust_remote_code: bool
    progress: Progress
    watch: SourceWatch

    def planned(self, scratch: Path) -> tuple[DenseCheckpoint, Plan]:
        checkpoint = self.source.open(scratch)
        return checkpoint, _checked_plan(checkpoint, self.config, self.trust_remote_code)

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
    """Calibrate if there are texts, and write the shards. Return the final plan and the report."""
    job.progress.start(plan.sketched_weights)
    sketches: CalibratedModules | None = None
    notes: dict[str, Any] = {}
    if texts is not None:
        with clear_memory_errors(job.place), full_float32():
            plan, sketches, notes = _calibrated(job, staging, checkpoint, plan, texts)
    return plan, _write_shards(job, staging, plan, same | notes, sketches)


def _calibrated(
    job: _Job, staging: Staging, checkpoint: DenseCheckpoint, plan: Plan, texts: Texts
) -> tuple[Plan, CalibratedModules | None, dict[str, Any]]:
    """Calibrate every module. With `fallback`, return None if the model cannot be calibrated.

    Return the plan with the bits that were chosen, the calibrated modules, and notes for the report
    (predicted losses, or the reason why the model is not calibrated).
    """
    folder = staging.scratch(_CALIBRATED, worth_keeping=True)
    config, progress = job.config, job.progress
    assert config.calibration is not None
    try:
        blocks = job.blocks(checkpoint, plan, texts.calibration)
        if texts.healing is not None or config.target_bits is not None:
            blocks.check_predictions()
    except CalibrationError as error:
        if not config.calibration.fallback:
            if config.calibration.heal or config.target_bits is not None:
                raise  # these options do not allow --fallback
            remedy = "--fallback sketches the weights without calibration"
            raise CalibrationError(f"{error}; {remedy}") from error
        progress.remark(f"not calibrated: {error}")
        return plan, None, {"not_calibrated": str(error)}
    notes: dict[str, Any] = {}
    if config.target_bits is not None:
        allocation = allocate(
            blocks, plan, config, texts.calibration, folder, progress, check=job.watch.check
        )
        plan = reallocate(plan, allocation.choices, checkpoint, config)
        notes["predicted_loss"] = allocation.predicted_loss
    needed = calibrated_bytes(plan.metadata, healed=texts.healing is not None)
    _check_space(staging, plan, max(0, needed - kept_bytes(folder)))
    sketches = calibrate(blocks, plan, config, folder, progress, check=job.watch.check)
    if texts.healing is not None and sketches.healing is None:
        blocks = job.blocks(checkpoint, plan, texts.healing, to_heal=True)
        heal(blocks, plan, config, texts.healing, sketches, progress)
    return plan, sketches, notes


def _write_shards(
    job: _Job,
    staging: Staging,
    plan: Plan,
    same: dict[str, Any],
    sketches: CalibratedModules | None,
) -> Report:
    """Write every shard that is missing, and return the report on all of them."""
    _check_space(staging, plan)
    records = {}
    for shard in plan.shards:
        record = kept_record(staging, shard, plan, calibrated=sketches is not None)
        if record is None:
            record = write_shard(staging, shard, plan, sketches, job.progress, job.watch.check)
        elif sketches is None:
            for name in record["modules"]:
                job.progress.advance(plan.layers[name].module.weights, name)
        records[shard.filename] = record
    return make_report(plan, same, records, sketches.healing if sketches else None)


def _publish(
    job: _Job,
    staging: Staging,
    checkpoint: DenseCheckpoint,
    plan: Plan,
    report: Report,
    older: Report | None,
) -> None:
    """Write all files but the shards, and replace the older checkpoint by the new one."""
    config = checkpoint.config | {"quantization_config": plan.metadata.to_json()}
    documents = {
        CARD_FILE: model_card(report, checkpoint.config).encode(),
        CONFIG_FILE: to_json(config),
    }
    if len(plan.shards) > 1:
        documents[INDEX_FILE] = index_json(plan.shards)
    files = report.files
    source = job.source
    for name in extra_files(checkpoint.folder) if source.is_gguf else source.extra_files:
        files[name] = staging.copy_file(checkpoint.folder / name, name)
    for name, data in documents.items():
        files[name] = staging.write_file(name, data)
    staging.write_file(REPORT_FILE, to_json(report.document))
    job.watch.check()
    staging.publish([*files, REPORT_FILE], _hashes(older))


def _hashes(older: Report | None) -> dict[str, str]:
    """Return the SHA-256 of the files that an older conversion wrote into the folder, by name."""
    return {name: file["sha256"] for name, file in older.files.items()} if older else {}


def _older_report(folder: Path) -> Report | None:
    """Return the report of the checkpoint in the folder, None if there is none or it is damaged."""
    try:
        return Report.read(folder)
    except FormatError:
        return None


def _check_files(folder: Path, report: Report) -> None:
    """Raise SpallmError if a file of a complete conversion is missing or has changed."""
    for name, about in report.files.items():
        file = folder / name
        if not file.is_file() or sha256(file) != about["sha256"]:
            raise SpallmError(
                f"{folder}: {name} is missing or has changed since the conversion; use --overwrite "
                f"to convert again"
            )


def _check_space(staging: Staging, plan: Plan, more: int = 0) -> None:
    """Raise SpallmError if the disk cannot hold the missing shards and `more` bytes."""
    needed = more + sum(shard.nbytes for shard in plan.shards if not staging.has(shard))
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise SpallmError(
            f"{staging.folder} needs {needed:,} more bytes for the sketched model, its disk has "
            f"{free:,} free; free some space, or choose a folder on another disk"
        )
