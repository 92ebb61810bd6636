"""Read GGUF files through transformers, which dequantizes them into a bfloat16 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spallm_convert.errors import SourceError, SpallmError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DONE = "dequantized"


def dequantized(path: Path, scratch: Path) -> Path:
    """Dequantize a GGUF file into a folder of bfloat16 safetensors, with its tokenizer.

    This takes the memory of the dense model and of about three more copies of its largest tensor,
    in float32. If the folder is complete already, it is used again, for example by a resumed
    conversion.

    Args:
        path: The GGUF file.
        scratch: Folder to write to.

    Returns:
        The folder of the dense model, below `scratch`.

    Raises:
        SourceError: If the package `gguf` is missing or transformers cannot read the file.
        SpallmError: If the folder cannot be written.
    """
    folder = scratch / _DONE
    if (scratch / f"{_DONE}.complete").exists():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"reading {path.name} needs the package {error.name!r}: "
            f"pip install 'spallm-convert[gguf]'"
        ) from error
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        model = load_gguf(path, torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a damaged file may raise anything
        reason = one_line(error)
        raise SourceError(
            f"{path.name}: transformers cannot read it ({reason}); if the file is damaged, get it "
            f"again"
        ) from error
    _forget_quantizer(model)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise SpallmError(
            f"{folder}: cannot be written ({one_line(error)}); check the free space of its disk"
        ) from error
    (scratch / f"{_DONE}.complete").touch()
    return folder


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the model of a GGUF file with dense weights of a dtype."""
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep weights quantized by default
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, **options
    )
    return model


def _forget_quantizer(model: object) -> None:
    """Remove GGUF's quantizer from a model that is dense now: it would refuse to save it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
