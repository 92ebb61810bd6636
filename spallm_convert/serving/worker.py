"""Swap all tables of a running engine, for one tuned model at a time.

    vllm serve ORG/NAME --worker-extension-cls spallm_convert.serving.worker.TablesExtension

vLLM adds these methods to its workers; `collective_rpc` calls them. Stop the requests and empty the
prefix cache around a swap: cached keys and values belong to the tables that made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .served import find_layers
from .set_file import open_set
from .sets import own_tables, put, read_set

#: The name of the tables that the engine started with.
BASE = "base"


class TablesExtension:
    """Load sets of tables into a worker, and put one of them into its layers."""

    model_runner: Any

    def load_tables(self, folder: str, name: str = "tuned") -> str:
        """Read a set of tables, and put it into the layers.

        Args:
            folder: Folder that `save_tables` wrote.
            name: Name of the set, except "base". A set with this name is replaced.

        Returns:
            The name.

        Raises:
            FileNotFoundError: If the folder holds no tables.
            ValueError: If the tables do not belong to the model, or the name is "base".
        """
        if name == BASE:
            raise ValueError(
                f"the name {BASE!r} belongs to the tables that the engine started with"
            )
        layers = [layer for _, layer in find_layers(self.model_runner.get_model())]
        stored = self.model_runner.vllm_config.quant_config.stored
        with open_set(Path(folder)) as file:
            tables = read_set(file, Path(folder), stored, layers)
        sets = self._sets()
        if BASE not in sets:
            sets[BASE] = own_tables(layers)
        sets[name] = tables
        return self.set_tables(name)

    def set_tables(self, name: str = BASE) -> str:
        """Put a set that was loaded into the layers.

        Args:
            name: Its name; "base" for the tables that the engine started with.

        Returns:
            The name.

        Raises:
            ValueError: If no set has this name.
        """
        sets = self._sets()
        if name not in sets and name != BASE:
            raise ValueError(
                f"no set of tables is called {name!r}, found {', '.join(sets) or BASE}"
            )
        if name in sets:
            put([layer for _, layer in find_layers(self.model_runner.get_model())], sets[name])
        return name

    def _sets(self) -> dict[str, dict[tuple[int, int], Tensor]]:
        found: dict[str, dict[tuple[int, int], Tensor]] = self.__dict__.setdefault(
            "_sketch_table_sets", {}
        )
        return found
