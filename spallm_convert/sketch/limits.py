"""Find the largest table value that is still finite when transformers loads the checkpoint.

transformers loads tables in the dtype that the config names, except for float32 tables, which stay
in float32. float16 ends at 65,504, and a bfloat16 table may hold more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spallm_formats import TABLE_DTYPES, from_float32, to_float32

_HALF = "float16"
_LARGEST_HALF = float(np.finfo(np.float16).max)
#: Keys of the config that name the dtype of the model, the present one first.
_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Limit:
    """Hold the range of a dtype that a model is loaded in.

    Attributes:
        dtype: The dtype, such as "float16".
        largest: The largest value that it holds.
        largest_entry: The largest value of the tables' dtype that is not larger than `largest`.
    """

    dtype: str
    largest: float
    largest_entry: float

    def finite_rows(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return the rows whose values all stay finite in this dtype, bool [rows]."""
        with np.errstate(over="ignore"):
            finite: npt.NDArray[np.bool_] = np.isfinite(values.astype(self.dtype))
        return np.asarray(finite.all(axis=1))


def loading_limit(
    config: Mapping[str, Any], stored: Iterable[str], table_dtype: str
) -> Limit | None:
    """Return the limit of table values, None if every finite value of the tables can be loaded.

    Args:
        config: The parsed `config.json`.
        stored: Dtypes of the tensors that stay dense, as safetensors names them. They count if the
            config names no dtype, because transformers then takes the dtype of a tensor.
        table_dtype: The dtype of the tables on disk.
    """
    if table_dtype == "float32":
        return None
    nested = config.get("text_config")
    named = _named(config) or (_named(nested) if isinstance(nested, Mapping) else None)
    is_half = named == _HALF if named else TABLE_DTYPES[_HALF] in stored
    if not is_half:
        return None
    return Limit(_HALF, _LARGEST_HALF, _largest_below(_LARGEST_HALF, TABLE_DTYPES[table_dtype]))


def _named(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a config names, None if it names none."""
    found = next((config[key] for key in _KEYS if isinstance(config.get(key), str)), None)
    return None if found is None else found.removeprefix("torch.")


def _largest_below(limit: float, dtype: str) -> float:
    """Return the largest value of a dtype that is not larger than a limit."""
    rounded = from_float32(np.float32(limit), dtype)
    if to_float32(rounded.tobytes(), dtype)[0] > limit:
        rounded = (rounded.view(np.uint16) - np.uint16(1)).view(rounded.dtype)
    return float(to_float32(rounded.tobytes(), dtype)[0])
