"""GGUF files, through transformers: dequantized once into an ordinary bf16 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spallm_convert.errors import SourceError, SpallmError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DONE = "dequantized"


def dequantized(path: Path, scratch: Path) -> Path:
    """A folder below `scratch` with the model of a GGUF file as bf16 safetensors.

    Made only once: a resumed conversion finds it. Takes as much memory as the dense model.
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
    except Exception as error:  # whatever its readers make of a file that is damaged
        reason = one_line(error)
        raise SourceError(f"{path.name}: transformers cannot read it ({reason})") from error
    _forget_quantizer(model)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise SpallmError(f"{folder}: cannot be written ({one_line(error)})") from error
    (scratch / f"{_DONE}.complete").touch()
    return folder


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GGUF file with dense weights of a dtype."""
    import transformers

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep GGUF blocks unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, **options
    )
    return model


def _forget_quantizer(model: object) -> None:
    """The weights are dense now; left in place, GGUF's quantizer would refuse to save them."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
