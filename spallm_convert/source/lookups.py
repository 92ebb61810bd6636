"""Prove what an embedding does with the rows that it has looked up.

Classes of transformers multiply them by a number (Gemma) or normalize them. Others have more
vectors than those of their weight, or replace some rows. Names do not tell which is which. So the
model's own code runs on a few random rows, and its output is compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORM = "embed_norm"
_SCALES = ("scalar_embed_scale", "embed_scale")
#: Attributes with which the lookup of an `nn.Embedding` would do more than read rows.
_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")
_DTYPES = (torch.bfloat16, torch.float32)
_ROWS = 5


@dataclass(frozen=True)
class Finish:
    """Describe what an embedding does with the rows that it has looked up.

    Attributes:
        scale: The number to multiply them by. None: they are not multiplied.
        is_rounded: Whether the number is first rounded to the dtype of the rows.
        is_normed: Whether they go through the module `embed_norm` of the embedding.
    """

    scale: float | None = None
    is_rounded: bool = False
    is_normed: bool = False

    def factor(self, dtype: torch.dtype) -> float | None:
        """Return the number to multiply rows of a dtype by, None if there is none."""
        if self.scale is None or not self.is_rounded:
            return self.scale
        return float(torch.tensor(self.scale, dtype=dtype, device="cpu"))


def find_finish(embedding: nn.Embedding) -> Finish | str:
    """Find what an embedding does with its rows.

    Args:
        embedding: The embedding. Its weight may be on the meta device.

    Returns:
        What it does. If a sketched embedding cannot do the same, the reason.
    """
    options = [name for name in _OPTIONS if getattr(embedding, name)]
    if options:
        return f"its embedding has the option {options[0]}"
    if type(embedding) is nn.Embedding:
        return Finish()
    kind = type(embedding).__name__
    unknown = f"{kind} does more than look rows up"
    plain = vars(nn.Embedding(1, 1, device="meta"))
    more = set(vars(embedding)) - set(plain) - set(_SCALES)
    parts = [*embedding._parameters, *embedding._buffers, *embedding._modules]
    if more or set(parts) - {"weight", "embed_scale", NORM}:
        return unknown
    scale = next((vars(embedding)[name] for name in _SCALES if name in vars(embedding)), None)
    scale = float(scale) if isinstance(scale, int | float) else None
    for is_rounded in (False, True):
        found = Finish(scale, is_rounded, NORM in embedding._modules)
        if all(_does(embedding, found, dtype) for dtype in _DTYPES):
            return found
    return unknown


def finished(rows: Tensor, finish: Finish, norm: Any, factors: dict[torch.dtype, Any]) -> Tensor:
    """Do with rows what the embedding does.

    Args:
        rows: The rows that were looked up, float [..., columns].
        finish: What to do.
        norm: The module `embed_norm`, None if there is none.
        factors: `finish.factor` by dtype.

    Returns:
        The output of the embedding, in the same shape and dtype.
    """
    factor = factors[rows.dtype]
    if factor is not None:
        rows = rows * factor
    if finish.is_normed:
        result: Tensor = norm(rows)
        return result
    return rows


def _does(embedding: nn.Embedding, finish: Finish, dtype: torch.dtype) -> bool:
    """Return whether an embedding does just this with rows of a dtype."""
    weight = _numbers(_ROWS * embedding.embedding_dim).view(_ROWS, -1).to(dtype)
    probe: Any = copy.deepcopy(embedding)  # cheap: its weight has no data
    probe.weight = nn.Parameter(weight, requires_grad=False)
    probe.num_embeddings = _ROWS
    if "embed_scale" in probe._buffers:
        probe._buffers["embed_scale"] = torch.tensor(
            finish.scale or 0.0, dtype=torch.float32, device="cpu"
        )
    norm = probe._modules.get(NORM)
    if norm is not None:
        probe._modules[NORM] = norm = norm.to_empty(device="cpu").to(dtype)
        for parameter in norm.parameters():
            parameter.data = _numbers(parameter.numel()).view_as(parameter).to(dtype)
    ids = torch.arange(_ROWS, device="cpu")
    try:
        with torch.no_grad():
            expected = probe(ids)
            found = finished(weight, finish, norm, {dtype: finish.factor(dtype)})
    except Exception:  # a model's code may raise anything
        return False
    return torch.equal(found, expected)


def _numbers(count: int) -> Tensor:
    """Return numbers that differ, whatever torch's default dtype and device are."""
    return torch.arange(count, dtype=torch.float32, device="cpu").cos()
