"""Turn the tensors of a quantized checkpoint into the dense tensors that they stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spallm_convert.errors import SourceError
from spallm_formats import StoredTensor, shown, summary

from .building import Found
from .encodings import FP8
from .methods import FINDERS, description_of, method_of, without_description
from .weights import DequantizedTensor

#: Tensors that quantized checkpoints hold besides weights: scales of activations and of the cache,
#: and scales of weights that are dense.
_EXTRA = re.compile(
    r"(.*\.)?"
    r"((input|output|activation|weight|[qkv]|kv|prob|[qkv]_proj)"
    r"_(scale|scale_inv|scale_ub|zero_point|global_scale|shape|g_idx)|qscale_act)"
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class SourceQuantization:
    """Describe how a source is quantized, for the report.

    Attributes:
        method: Name of the method in the config, such as "fp8".
        scheme: How weights are stored, such as "FP8 in blocks of 128 x 128".
        weights: Number of weights that are stored quantized.
        stored_bytes: Bytes of all tensors in the files.
        dropped: Names of the tensors that are not copied, such as scales of activations.
    """

    method: str
    scheme: str
    weights: int
    stored_bytes: int
    dropped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the part of the report, without the names of dropped tensors."""
        return {
            "method": self.method,
            "scheme": self.scheme,
            "weights": self.weights,
            "stored_bytes": self.stored_bytes,
            "dropped": len(self.dropped),
        }

    def remarks(self) -> list[str]:
        """Return what to tell the user, in one line each."""
        lines = [_remark(self.scheme)]
        if self.dropped:
            kinds = sorted({name.rpartition(".")[2] for name in self.dropped})
            lines.append(
                f"{len(self.dropped):,} tensors that only quantized models use are not copied: "
                f"{summary(kinds, ', ')}"
            )
        return lines


def dense_form(
    config: dict[str, Any], tensors: dict[str, StoredTensor], folder: Path
) -> tuple[dict[str, Any], dict[str, StoredTensor], SourceQuantization | None]:
    """Return the dense model that a checkpoint stands for. Only headers are needed.

    Args:
        config: The parsed `config.json`, which `refuse_unreadable` lets pass.
        tensors: Every tensor by name.
        folder: Folder of the checkpoint, for messages.

    Returns:
        The config without a description of quantized weights, the dense tensors by name, and how
        they are stored. Weights that are stored quantized are `DequantizedTensor`s; they have the
        dtype that the config names, or BF16. A dense checkpoint is returned as it is, with None.

    Raises:
        SourceError: If there are no quantized weights, one of them lacks its scales, or its parts
            do not fit each other.
    """
    description = description_of(config)
    if description is None:
        return config, tensors, None
    method = method_of(description)
    found = FINDERS[method](tensors, description, _dense_dtype(config))
    plain = {name: tensor for name, tensor in tensors.items() if name not in found.used}
    kept = {name: tensor for name, tensor in plain.items() if not _EXTRA.fullmatch(name)}
    if problems := found.problems + _unclear(found, kept):
        raise SourceError(f"{folder}: {summary(problems)}; get the weights again")
    if not found.weights:
        raise SourceError(
            f"{folder}: the config says that weights are quantized ({method}), but none are; "
            f"remove quantization_config from config.json"
        )
    about = SourceQuantization(
        method=method,
        scheme=_scheme(found.weights.values()),
        weights=len(found.weights),
        stored_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dropped=tuple(name for name in plain if name not in kept),
    )
    return without_description(config), kept | found.weights, about


def quantization_remark(tensors: Iterable[StoredTensor]) -> str | None:
    """Return a remark on the quantized weights among tensors, None if all are stored dense."""
    weights = [tensor for tensor in tensors if isinstance(tensor, DequantizedTensor)]
    return _remark(_scheme(weights)) if weights else None


def _remark(scheme: str) -> str:
    return f"the source is quantized ({scheme}): its weights are dequantized as they are read"


def _scheme(weights: Iterable[DequantizedTensor]) -> str:
    """Return how weights are stored: the three most usual forms, if there are more."""
    counts = Counter(weight.scheme for weight in weights)
    return summary(sorted(counts, key=lambda scheme: (-counts[scheme], scheme)), ", ")


def _unclear(found: Found, kept: Mapping[str, StoredTensor]) -> list[str]:
    """Return the tensors that are in FP8 without scales, or that are stored dense as well."""
    without = [
        f"{tensor.file.name}: tensor {shown(name)} is {tensor.dtype} and has no scales"
        for name, tensor in kept.items()
        if tensor.dtype in FP8
    ]
    twice = [
        f"{kept[name].file.name}: tensor {shown(name)} is stored both dense and quantized"
        for name in found.weights
        if name in kept
    ]
    return without + twice


def _dense_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype of dense weights: the one that the config names, or BF16."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            named = part.get(key)
            if isinstance(named, str):
                return _DTYPES.get(named.removeprefix("torch."), "BF16")
    return "BF16"
