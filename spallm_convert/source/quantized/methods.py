"""Tell from a config how the weights of a checkpoint are quantized, and refuse what is not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spallm_convert.errors import SourceError
from spallm_formats import shown

from .building import Finder
from .compressed import find_compressed, unreadable_part
from .fp8 import find_fp8
from .mxfp4 import find_mxfp4

_COMPRESSED = "compressed-tensors"
#: Finder of the weights of each method that can be read, by the name that configs give it.
FINDERS: dict[str, Finder] = {
    "fp8": find_fp8,
    "mxfp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "mxfp4": find_mxfp4,
    _COMPRESSED: find_compressed,
}
#: Keys of a config under which its weights are described. The second one is older.
DESCRIPTION_KEYS = ("quantization_config", "compression_config")
#: Parts of a config that may hold these keys for the whole checkpoint.
_PARTS = ("text_config", "llm_config", "language_config")
#: Methods whose models transformers can dequantize.
_DEQUANTIZED_BY_TRANSFORMERS = ("bitsandbytes", "higgs")


def description_of(config: Mapping[str, Any]) -> Any:
    """Return how a config describes its quantized weights, None if they are dense.

    Args:
        config: The parsed `config.json`.
    """
    parts = [config.get(name) for name in _PARTS]
    for part in (config, *(part for part in parts if isinstance(part, dict))):
        for key in DESCRIPTION_KEYS:
            if part.get(key):
                return part[key]
    return None


def without_description(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as that of a dense model has it.

    Args:
        config: The parsed `config.json`. It is not changed.
    """
    dense = {key: value for key, value in config.items() if key not in DESCRIPTION_KEYS}
    for name in _PARTS:
        if isinstance(dense.get(name), dict):
            dense[name] = {
                key: value for key, value in dense[name].items() if key not in DESCRIPTION_KEYS
            }
    return dense


def method_of(description: Any) -> str:
    """Return the name of the method in a description, "unknown" if there is none."""
    if not isinstance(description, dict):
        return str(description)
    method = description.get("quant_method")
    if method is None and any(description.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    return "unknown" if method is None else str(method)


def refuse_unreadable(config: Mapping[str, Any], where: str) -> None:
    """Raise SourceError if weights are quantized by a method that is not read.

    Args:
        config: The parsed `config.json`.
        where: The file, for the message.
    """
    description = description_of(config)
    if description is None:
        return
    method = method_of(description)
    if method not in FINDERS or not isinstance(description, dict):
        raise SourceError(
            f"{where}: already quantized ({shown(method)[1:-1]}), expected dense weights, FP8, "
            f"MXFP4 or compressed-tensors; {_remedy(method)}"
        )
    part = unreadable_part(description) if method == _COMPRESSED else None
    if part is not None:
        raise SourceError(
            f"{where}: already quantized ({method}), with {part}, which is not read; "
            f"{_remedy(method)}"
        )


def _remedy(method: str) -> str:
    """Return the command that gives dense weights."""
    if any(method.startswith(name) for name in _DEQUANTIZED_BY_TRANSFORMERS):
        return (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('MODEL').dequantize().save_pretrained('dense')\""
        )
    return "convert the original model instead, base_model in the card: spallm-convert BASE_MODEL"
