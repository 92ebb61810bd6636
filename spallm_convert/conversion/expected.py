"""Tell in advance which level of effort a conversion will run, from headers and names of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spallm_convert.calibration.blocks.opening import check_reads_text
from spallm_convert.config import SketchConfig
from spallm_convert.effort import FAST, NORMAL
from spallm_convert.errors import SpallmError
from spallm_convert.sketch.plan import Plan
from spallm_convert.source.checkpoint import read_config
from spallm_convert.source.hub_files import list_files
from spallm_convert.source.locate import find_here
from spallm_convert.source.reading import stored_parts
from spallm_convert.source.skeleton import find_model_class
from spallm_convert.source.text import BUILTIN
from spallm_convert.source.tokenizer import has_tokenizer_files, load_tokenizer, no_tokenizer
from spallm_formats import CONFIG_FILE

from .memory import check_memory


def expected_effort(
    model: str,
    plan: Plan,
    config: SketchConfig,
    device: torch.device,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[str, str | None]:
    """Return the level of effort that will run, and why it is not the level of the options.

    A conversion may still find later that the model cannot be run block by block.

    Args:
        model: The model, as `convert` takes it.
        plan: Its plan.
        config: Options of the conversion.
        device: The device that the model would be run on.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run Python code that comes with the model.
    """
    asked, text = config.level.name, config.text_options
    is_normal = asked == NORMAL
    if text is None:
        return asked, None
    try:
        if is_normal and text.text == BUILTIN:
            _check_tokenizer(model, revision, trust_remote_code)
        if text.fallback:
            _check_class(plan, trust_remote_code)
        if text.fallback and is_normal:
            check_memory(plan, device)
    except SpallmError as error:
        return FAST, str(error)
    return asked, None


def model_config(plan: Plan) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder and the config of the model of a plan; None for a GGUF file.

    The folder to which a GGUF file was dequantized for the plan is gone.
    """
    layer = next(iter(plan.layers.values()))
    folder = stored_parts(layer.weight)[0].file.parent
    path = folder / CONFIG_FILE
    return (folder, read_config(path)) if path.exists() else None


def _check_tokenizer(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Raise SourceError if there is no tokenizer."""
    source = find_here(model, revision)
    if source is not None:
        if source.is_gguf or has_tokenizer_files(path.name for path in source.path.iterdir()):
            return
        load_tokenizer(source, trust_remote_code=trust_remote_code)  # of bytes, without a file
        return
    listing = list_files(model, revision)
    if listing is not None and not has_tokenizer_files(listing.names):
        raise no_tokenizer(model, "no tokenizer files in the repository")


def _check_class(plan: Plan, trust_remote_code: bool) -> None:
    """Raise CalibrationError if the model reads something else than text."""
    if (found := model_config(plan)) is not None:
        model_class = find_model_class(*found, trust_remote_code)
        check_reads_text(model_class.__name__, model_class.main_input_name)
