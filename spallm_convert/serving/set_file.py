"""Open the file of a set of tables, check that it belongs to the base, and read tables from it.

An affine set holds a shift and a scale for each table. Here it becomes the tables that it stands
for: shift + scale * table of the base.
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from spallm_convert.errors import FormatError
from spallm_convert.runtime.tables_file import DTYPES, StoredTables, stored_tables
from spallm_formats import TABLES_FILE, open_regular, shown

from .labels import StoredWeights

#: Begins every message, so that the HTTP server can tell faults of a set from faults of its own.
REFUSED = "sketch tables refused: "


class RefusedTablesError(ValueError):
    """Report a set of tables that cannot be served."""

    def __init__(self, problem: object) -> None:
        super().__init__(REFUSED + " ".join(str(problem).split()))


def open_set(folder: Path) -> BufferedReader:
    """Open the tables file of a folder.

    Raises:
        FileNotFoundError: If there is none.
        RefusedTablesError: If it cannot be opened.
    """
    try:
        return open_regular(folder / TABLES_FILE)
    except FileNotFoundError:
        raise
    except (FormatError, OSError) as error:
        raise RefusedTablesError(error) from error


class SetFile:
    """Hold the open file of a set that has been checked against its base.

    Args:
        file: The file.
        folder: Its folder, for messages.
        stored: The weights of the base.

    Raises:
        FormatError: If the set does not belong to the base, or holds other tensors than it needs.
        OSError: If the file cannot be read.
    """

    def __init__(self, file: BufferedReader, folder: Path, stored: StoredWeights) -> None:
        file.seek(0)
        self._found: StoredTables = stored_tables(file, folder)
        self._stored = stored
        self._check_base()
        self._check_tensors()

    def table(self, weight: str) -> Tensor:
        """Return the tables of a stored module, float [..., rows, groups, 2^bits].

        Args:
            weight: Name of its index map.

        Raises:
            FormatError: If they have values that are not finite, or the file is truncated.
        """
        name, module = self._stored.modules[weight]
        if not self._found.metadata.is_affine:
            return self._read(module.table_name(name))
        shift, scale = map(self._read, module.affine_names(name))
        base = self._stored.table(weight)
        dtype = torch.promote_types(base.dtype, shift.dtype)
        return shift.unsqueeze(-1).to(dtype) + scale.unsqueeze(-1).to(dtype) * base.to(dtype)

    def _read(self, name: str) -> Tensor:
        values = self._found.read(name)
        if not values.isfinite().all():
            raise FormatError(f"{name} has values that are not finite")
        return values

    def _check_base(self) -> None:
        metadata, own = self._found.metadata, self._stored.fingerprint
        if metadata.fingerprint != own:
            raise FormatError(
                f"made for index maps {metadata.fingerprint[:12]}, but this model has {own[:12]}; "
                f"serve the model that the tables were trained on"
            )
        if metadata.base_tables not in (None, self._stored.tables_digest):
            raise FormatError(
                f"affine numbers for tables {metadata.base_tables[:12]}, but the base of this "
                f"model has {self._stored.tables_digest[:12]}; serve the model that they were "
                f"trained on"
            )

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for name, module in self._stored.modules.values():
            if self._found.metadata.is_affine:
                expected |= dict.fromkeys(module.affine_names(name), module.affine_shape)
            else:
                expected[module.table_name(name)] = module.table_shape
        tensors = self._found.tensors
        problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
        if others := [name for name in tensors if name not in expected]:
            more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
            problems.append(
                f"{shown(others[0])}{more} no tables; only tables are served by request, so train "
                f"without norms, or serve the model as a checkpoint of its own"
            )
        for name, spec in tensors.items():
            if name in others:
                continue
            if spec.shape != expected[name]:
                problems.append(
                    f"{name} has the shape {list(spec.shape)}, expected {list(expected[name])}"
                )
            elif spec.dtype not in DTYPES:
                problems.append(f"{name} is {spec.dtype}, expected one of {', '.join(DTYPES)}")
        if problems:
            raise FormatError(problems[:3])
