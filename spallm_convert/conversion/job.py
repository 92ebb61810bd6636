"""Carry out the plan of a conversion: calibrate, then write the shards that are missing."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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
from spallm_convert.calibration.importance import Importance, measure_importance
from spallm_convert.calibration.notes import few_tokens_note, partly_calibrated
from spallm_convert.calibration.store import CalibratedModules, calibrated_bytes, kept_bytes
from spallm_convert.config import SketchConfig
from spallm_convert.devices import TooLittleMemoryError, clear_memory_errors, full_float32
from spallm_convert.effort import FAST, NORMAL
from spallm_convert.errors import CalibrationError, SpallmError
from spallm_convert.progress import Progress
from spallm_convert.sketch.plan import Plan, reallocate
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.locate import Source
from spallm_convert.source.text import BUILTIN
from spallm_formats import Staging, printable

from .loadable import checked_plan
from .memory import check_memory
from .report import Report, make_report
from .shards import kept_record, write_shard
from .texts import Texts, draw_texts
from .unchanged import SourceWatch

_CALIBRATED, _MEASURED = "calibrated", "measured"


@dataclass(frozen=True)
class Job:
    """Hold a source and how to convert it.

    Attributes:
        source: The source.
        config: Options of the conversion.
        place: The device that calibration computes on.
        trust_remote_code: Whether Python code in the source's folder may be run.
        progress: Is told how far the work is.
        watch: Notices changes of the source.
    """

    source: Source
    config: SketchConfig
    place: torch.device
    trust_remote_code: bool
    progress: Progress
    watch: SourceWatch

    def planned(self, scratch: Path) -> tuple[DenseCheckpoint, Plan]:
        """Open the source and plan the conversion; a GGUF file is dequantized into `scratch`."""
        checkpoint = self.source.open(scratch)
        for line in checkpoint.quantization.remarks() if checkpoint.quantization else ():
            self.progress.remark(line)
        return checkpoint, checked_plan(checkpoint, self.config, self.trust_remote_code)

    def texts(self) -> tuple[Texts | None, str | None]:
        """Draw the texts to calibrate and heal with.

        Return None without calibration. With the effort "normal", `fallback` and the built-in text,
        also return None if there is no tokenizer, and the reason.
        """
        calibration = self.config.text_options
        if calibration is None:
            return None, None
        try:
            drawn = draw_texts(self.source, self.config, trust_remote_code=self.trust_remote_code)
        except SpallmError as error:
            may_fall_back = self.config.level.name == NORMAL and calibration.fallback
            if not (may_fall_back and calibration.text == BUILTIN):
                raise
            # The report may be published, so it does not say where the model is on this machine.
            path = self.source.path
            folder = path.parent if self.source.is_gguf else path
            reason = str(error).replace(printable(str(folder)), "its folder")
            return None, reason.replace(str(folder), "its folder")
        return drawn, None

    def blocks(
        self, checkpoint: DenseCheckpoint, plan: Plan, tokens: Tensor, *, to_heal: bool = False
    ) -> Blocks:
        """Open the blocks of the model, to calibrate them on `tokens`, or to heal them."""
        return open_blocks(
            checkpoint,
            plan,
            tokens,
            device=self.place,
            trust_remote_code=self.trust_remote_code,
            to_heal=to_heal,
        )


def carry_out(
    job: Job,
    staging: Staging,
    checkpoint: DenseCheckpoint,
    plan: Plan,
    texts: Texts | None,
    missing: str | None,
    same: dict[str, Any],
) -> tuple[Plan, Report]:
    """Calibrate if there are texts, and write the shards.

    Args:
        job: What to convert.
        staging: The output folder.
        checkpoint: The opened source.
        plan: The plan to carry out.
        texts: Texts to calibrate and heal with. None: no calibration.
        missing: Why there are none although there should be.
        same: Identity of the conversion.

    Returns:
        The final plan, whose bits may have been chosen, and the report.
    """
    job.progress.start(plan.sketched_weights)
    sketches: CalibratedModules | None = None
    importance: dict[str, Importance] = {}
    notes: dict[str, Any] = {}
    if missing is not None:
        notes = _alone(job, missing)
    elif texts is not None and job.config.level.name == NORMAL:
        importance, notes = _measured(job, staging, checkpoint, plan, texts)
    elif texts is not None:
        with clear_memory_errors(job.place), full_float32():
            plan, sketches, notes = _calibrated(job, staging, checkpoint, plan, texts)
    if checkpoint.quantization is not None:
        notes["source_quantization"] = checkpoint.quantization.to_json()
    return plan, _write_shards(job, staging, plan, same | notes, sketches, importance)


def _measured(
    job: Job, staging: Staging, checkpoint: DenseCheckpoint, plan: Plan, texts: Texts
) -> tuple[dict[str, Importance], dict[str, Any]]:
    """Measure the importance of columns, if the model can be run block by block.

    Return it by name of the layer, and notes for the report.
    """
    folder = staging.scratch(_MEASURED, worth_keeping=True)
    text = job.config.text_options
    assert text is not None
    try:
        check_memory(plan, job.place)
        with clear_memory_errors(job.place), full_float32():
            blocks = job.blocks(checkpoint, plan, texts.calibration)
            partly = partly_calibrated(blocks, plan, job.config)
            importance = measure_importance(
                blocks, plan, folder, job.progress, check=job.watch.check
            )
    except SpallmError as error:
        if not text.fallback:
            raise
        # The report is the same for the same conversion, and free memory never is.
        lasting = error.lasting if isinstance(error, TooLittleMemoryError) else str(error)
        return {}, _alone(job, lasting, said=str(error))
    if partly is None:
        return importance, {}
    job.progress.remark(partly)
    return importance, {"partly_calibrated": partly}


def _alone(job: Job, reason: str, said: str | None = None) -> dict[str, Any]:
    """Say that the weights are sketched alone, and return the note for the report.

    Args:
        job: The conversion.
        reason: Why, as the report has it.
        said: Why, as the remark has it. None: the same.
    """
    job.progress.remark(f"effort {FAST} in place of {job.config.level.name}: {said or reason}")
    return {"not_calibrated": reason}


def _calibrated(
    job: Job, staging: Staging, checkpoint: DenseCheckpoint, plan: Plan, texts: Texts
) -> tuple[Plan, CalibratedModules | None, dict[str, Any]]:
    """Calibrate every module. With `fallback`, return None if the model cannot be calibrated.

    Return the plan with the bits that were chosen, the calibrated modules, and notes for the report
    (predicted losses, or the reason why the model is not calibrated).
    """
    folder = staging.scratch(_CALIBRATED, worth_keeping=True)
    config, progress = job.config, job.progress
    text = config.text_options
    assert text is not None
    try:
        blocks = job.blocks(checkpoint, plan, texts.calibration)
        if texts.healing is not None or config.target_bits is not None:
            blocks.check_predictions()
    except CalibrationError as error:
        if not text.fallback:
            if text.heal or config.target_bits is not None:
                raise  # these options do not allow --fallback
            remedy = "--fallback sketches the weights without calibration"
            raise CalibrationError(f"{error}; {remedy}") from error
        progress.remark(f"not calibrated: {error}")
        return plan, None, {"not_calibrated": str(error)}
    notes: dict[str, Any] = {}
    if (partly := partly_calibrated(blocks, plan, config)) is not None:
        notes["partly_calibrated"] = partly
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
    if (few := few_tokens_note(sketches)) is not None:
        notes["experts"] = few
    for note in (partly, few):
        if note is not None:
            progress.remark(note)
    return plan, sketches, notes


def _write_shards(
    job: Job,
    staging: Staging,
    plan: Plan,
    same: dict[str, Any],
    sketches: CalibratedModules | None,
    importance: Mapping[str, Importance],
) -> Report:
    """Write every shard that is missing, and return the report on all of them."""
    _check_space(staging, plan)
    calibrated = importance if sketches is None else sketches
    records = {}
    for shard in plan.shards:
        record = kept_record(staging, shard, plan, calibrated)
        if record is None:
            record = write_shard(
                staging, shard, plan, sketches, importance, job.progress, job.watch.check
            )
        else:
            for name in record["modules"]:
                if sketches is None or name not in sketches:
                    job.progress.advance(plan.layers[name].module.weights, name)
        records[shard.filename] = record
    return make_report(plan, same, records, sketches.healing if sketches else None)


def _check_space(staging: Staging, plan: Plan, more: int = 0) -> None:
    """Raise SpallmError if the disk cannot hold the missing shards and `more` bytes."""
    needed = more + sum(shard.nbytes for shard in plan.shards if not staging.has(shard))
    free = shutil.disk_usage(staging.folder).free
    if free < needed:
        raise SpallmError(
            f"{staging.folder} needs {needed:,} more bytes for the sketched model, its disk has "
            f"{free:,} free; free some space, or choose a folder on another disk"
        )
