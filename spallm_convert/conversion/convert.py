"""Convert a model: make a plan and carry it out, shard by shard.

A complete shard is never written twice, so an interrupted conversion continues where it stopped.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from spallm_convert.config import SketchConfig
from spallm_convert.devices import AUTO_DEVICE, CPU, cpu_threads, find_device
from spallm_convert.errors import OptionError
from spallm_convert.paths import user_path
from spallm_convert.progress import Progress, Silent
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.extra_files import extra_files
from spallm_convert.source.hub import remote_checkpoint
from spallm_convert.source.locate import find_here, locate
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    Staging,
    check_output_folder,
    check_replaceable,
    index_json,
    is_unfinished,
    remove_leftovers,
    summary,
    to_json,
)

from .card import CARD_FILE, model_card
from .identity import identity
from .job import Job, carry_out
from .loadable import checked_plan
from .older import check_files, older_report, written_hashes, written_report
from .report import REPORT_FILE, Report
from .unchanged import SourceWatch

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
        config: Options of the conversion. Default: `SketchConfig()`, 4 bits at effort "normal".
        revision: Branch, tag or commit on the Hub. Default: the main branch.
        resume: Continue an interrupted conversion in `output`. If the conversion is complete,
            return its report. Default: False.
        overwrite: Replace the checkpoint in `output`. Default: False.
        trust_remote_code: Run Python code that comes with the model, if its architecture needs it.
            Read the code first. Default: False.
        threads: Number of CPU threads. Default: all for numba, and torch's own number for torch.
        device: Where the model is run: "cpu", "cuda", "cuda:1" and so on, or "auto", which takes a
            GPU if there is one. With effort "fast", everything is done on the CPU. Default: "auto".
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
        job = Job(source, config, place, trust_remote_code, progress or Silent(), watch)
        if left := source.left_behind():
            job.progress.remark(f"not copied: {summary(left, ', ')}")
        # Planning is cheap compared with hashing the source, so errors of the plan come first.
        ready = None if source.is_gguf else job.planned(folder)
        texts, missing = job.texts()
        about = source.identity(ready[0] if ready else None)
        watch.expect(about["files"])
        same = identity(config, about, texts, place)
        older = older_report(folder)
        if resume and is_whole and older and older.has_identity(same):
            check_files(folder, older)
            remove_leftovers(folder)
            return older
        with Staging(folder, same, resume=resume, overwrite=overwrite) as staging:
            remarks: list[str] = []
            if staging.is_published:
                staging.finish_publishing()
                report = written_report(folder)
            else:
                checkpoint, plan = ready or job.planned(staging.scratch("source"))
                written = [shard.filename for shard in plan.shards]
                if len(written) > 1:
                    written.append(INDEX_FILE)
                check_replaceable(folder, written, written_hashes(older))
                plan, report = carry_out(job, staging, checkpoint, plan, texts, missing, same)
                _publish(job, staging, checkpoint, plan, report, older)
                remarks += [*plan.notes, *filter(None, [plan.dense_warning])]
    for remark in remarks:
        job.progress.remark(remark)
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
            layer to sketch, or `config.strict` forbids what would stay dense.
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
        return checked_plan(checkpoint, config, trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        return checked_plan(source.open(Path(scratch)), config, trust_remote_code)


def _find_place(device: str, config: SketchConfig) -> torch.device:
    """Return the device to compute on. Raise OptionError if the conversion cannot use it."""
    if config.level.reads_text:
        return find_device(device)
    place = find_device(CPU if device == AUTO_DEVICE else device)
    if place.type != CPU:
        raise OptionError(
            f"device {device}: effort {config.level.name!r} is done on the CPU; leave out "
            f"--device, or choose another effort"
        )
    return place


def _publish(
    job: Job,
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
    staging.publish([*files, REPORT_FILE], written_hashes(older))
