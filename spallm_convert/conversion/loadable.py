"""Check from headers alone that transformers can load a sketched checkpoint.

transformers itself loads the checkpoint, but on the meta device, where tensors have shapes and no
data. So it renames, fuses and ties tensors as it does when `load_sketched` is called, and its own
report says which tensors of the model are missing and which have other shapes.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from spallm_convert.config import SketchConfig
from spallm_convert.errors import FormatError, SourceError, one_line
from spallm_convert.runtime import quantizer  # noqa: F401  registers the quantizer
from spallm_convert.runtime.checking import check_generation_config
from spallm_convert.sketch.plan import Plan, make_plan
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.layer_count import layer_count_problem
from spallm_convert.source.parsed_config import parsed_config
from spallm_convert.source.skeleton import find_model_class, remote_class
from spallm_formats import CONFIG_FILE, SketchMetadata, TensorSpec, shown, summary

#: Safetensors' names of dtypes, and torch's. One kind of integers stands for most; all other dtypes
#: count as float32.
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    **dict.fromkeys(("BOOL", "I8", "I16", "I32", "I64", "U16", "U32", "U64"), torch.int32),
    "U8": torch.uint8,
}
#: Key of the config with the number of blocks that a checkpoint may hold after those of the model.
#: They predict further tokens, and transformers leaves them out.
_EXTRA_BLOCKS = "num_nextn_predict_layers"
_FAILED_LINE = re.compile(r"^(.+?)\s*\|\s*CONVERSION\b", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def checked_plan(
    checkpoint: DenseCheckpoint, config: SketchConfig, trust_remote_code: bool
) -> Plan:
    """Plan a conversion, and check that its result will load.

    Args:
        checkpoint: The dense checkpoint. Only its headers are read.
        config: Options of the conversion.
        trust_remote_code: Whether Python code in the folder may be run.

    Raises:
        OptionError: As in `make_plan`.
        SourceError: As in `make_plan` and `check_source`.
    """
    plan = make_plan(checkpoint, config, trust_remote_code=trust_remote_code)
    check_source(checkpoint, plan, trust_remote_code=trust_remote_code)
    return plan


def check_source(
    checkpoint: DenseCheckpoint, plan: Plan, *, trust_remote_code: bool = False
) -> None:
    """Check that the sketched checkpoint will load, before any weight is read.

    Args:
        checkpoint: The dense checkpoint.
        plan: The plan to sketch it.
        trust_remote_code: Whether Python code in the folder may be run.

    Raises:
        SourceError: If the source lacks tensors of its model, or has tensors of other shapes, or
            blocks that the model does not have.
    """
    try:
        check_generation_config(checkpoint.folder)
    except FormatError as error:
        raise SourceError(str(error)) from error
    tensors = [spec for shard in plan.shards for spec in shard.tensors.values()]
    found = loading_problems(
        checkpoint.folder,
        checkpoint.config,
        plan.metadata,
        tensors,
        trust_remote_code=trust_remote_code,
        refuse_more_blocks=True,
    )
    if found:
        raise SourceError(
            f"{checkpoint.folder}: {summary(found)}; use the {CONFIG_FILE} that belongs to these "
            f"weights, or get the weights again"
        )


def loading_problems(
    folder: Path,
    config: dict[str, Any],
    metadata: SketchMetadata,
    tensors: Collection[TensorSpec],
    *,
    trust_remote_code: bool = False,
    refuse_more_blocks: bool = False,
) -> list[str]:
    """Return what keeps transformers from loading a sketched checkpoint.

    Args:
        folder: Folder with `config.json`, and with the model's code if it comes with any.
        config: The parsed `config.json`.
        metadata: The `quantization_config` of the checkpoint.
        tensors: Every tensor of the checkpoint.
        trust_remote_code: Whether Python code in the folder may be run.
        refuse_more_blocks: Whether blocks that the model does not have are a problem.

    Returns:
        Every problem, in one line each. None are found if the architecture is code in the folder
        and `trust_remote_code` is False.
    """
    if too_many := layer_count_problem(config, len(tensors)):
        return [too_many]
    name = config["architectures"][0]
    try:
        loaded_class = find_model_class(folder, config, trust_remote_code)
    except SourceError as error:
        is_code = remote_class(config.get("auto_map"), name)
        return [] if is_code else [str(error)]  # the code may not be run
    with _quiet() as report:
        try:
            model, found = _load_empty(loaded_class, folder, metadata, tensors, trust_remote_code)
        except FormatError as error:
            return error.problems
        except Exception as error:  # transformers, and a model's code, may raise anything
            return _failed(name, error, "\n".join(report), trust_remote_code)
    problems = []
    if missing := sorted(found["missing_keys"]):
        problems.append(f"no tensor for {summary(missing, ', ')}, expected by {name}")
    wrong = sorted((key, list(has), list(needs)) for key, has, needs in found["mismatched_keys"])
    if wrong:
        sizes = [f"{shown(key)} is {has}, expected {needs}" for key, has, needs in wrong]
        problems.append(f"other sizes than those of {name}: {summary(sizes)}")
    if refuse_more_blocks and (more := _more_blocks(model, config, found["unexpected_keys"])):
        problems.append(f"{name} has no block for {summary(more, ', ')}")
    return problems


def _load_empty(
    loaded_class: Any,
    folder: Path,
    metadata: SketchMetadata,
    tensors: Iterable[TensorSpec],
    trust_remote_code: bool,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a checkpoint on the meta device; return the model and transformers' report."""
    config = parsed_config(folder, trust_remote_code=trust_remote_code)
    config.quantization_config = metadata.to_json()
    empty = {
        spec.name: torch.empty(
            spec.shape, dtype=_DTYPES.get(spec.dtype, torch.float32), device="meta"
        )
        for spec in tensors
    }
    with torch.random.fork_rng(devices=[]):  # DiffLlama draws random numbers when built
        model, found = loaded_class.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            dtype="auto",
            ignore_mismatched_sizes=True,  # all of them are listed in the report then
            output_loading_info=True,
        )
    return model, found


def _failed(name: str, error: Exception, report: str, trust_remote_code: bool) -> list[str]:
    """Return the problem that an error of transformers shows."""
    if lines := _FAILED_LINE.findall(_COLOURS.sub("", report)):
        found = summary([line.strip() for line in lines], ", ")
        return [f"tensors that {name} fuses or splits do not fit each other: {found}"]
    if trust_remote_code:  # this code may load well on other devices
        return []
    return [f"transformers cannot load {name}: {one_line(error)}"]


def _more_blocks(model: nn.Module, config: dict[str, Any], unexpected: Iterable[str]) -> list[str]:
    """Return the tensors of a checkpoint that belong to blocks after the model's last one."""
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    extra = config.get(_EXTRA_BLOCKS)
    extra = extra if isinstance(extra, int) else 0
    found = []
    for name in sorted(unexpected):
        parts = name.split(".")
        paths = [(".".join(parts[:place]), part) for place, part in enumerate(parts)]
        counts = [(lists[path], part) for path, part in paths if lists.get(path)]
        if any(part.isdecimal() and int(part) >= count + extra for count, part in counts):
            found.append(name)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Yield a list that gets what transformers logs about loading, which is not printed."""
    log = logging.getLogger("transformers.modeling_utils")
    bars: Any = transformers.utils.logging
    level, had_bars = log.level, bars.is_progress_bar_enabled()
    said: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    log.addFilter(take)
    log.setLevel(logging.INFO)  # with WARNING, transformers also checks its plan to split tensors
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        log.removeFilter(take)
        log.setLevel(level)
        if had_bars:
            bars.enable_progress_bar()
