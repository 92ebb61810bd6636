"""Give each request its own set of tables, by vLLM's requests for low-rank adapters (LoRA).

A `LoRARequest` names a folder that `save_tables` wrote. vLLM's scheduler, HTTP server, prefix cache
and slots stay as they are. Replaced are how an adapter is read and where its tensors go: vLLM keeps
the slot of each token in a buffer, and the products of sketched layers read it.
"""

from __future__ import annotations

from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker import lora_model_runner_mixin

from spallm_formats import QUANT_METHOD

from .config import SketchedConfig
from .served import served_layers
from .set_file import RefusedTablesError, open_set
from .sets import ServedLayer, TableSet, fill, own_tables, read_set

logger = init_logger("vllm.spallm_convert")

#: Files of sets that stay open, so that a set can be read again after its folder has changed. vLLM
#: forgets sets when it has `max_cpu_loras` of them.
_OPEN_FILES = 256


class TableSetManager(LRUCacheLoRAModelManager):
    """Keep sets of tables, and copy those in use into the slots of the layers."""

    served: list[ServedLayer]

    def _create_lora_modules(self) -> None:
        """Make slots beside the tables of the layers. vLLM would wrap its layers here."""
        self.served = served_layers(self.model, self._get_punica_wrapper, self.lora_slots)

    def _add_adapter(self, lora: TableSet) -> None:
        self._registered_adapters[lora.id] = lora

    def create_dummy_lora(self, lora_id: int, *rest: Any) -> TableSet:
        """Return a set with the tables of the base, for vLLM to try a step with."""
        return TableSet(lora_id, None)

    def activate_adapter(self, lora_id: int) -> bool:
        """Copy a set into a free slot, or into that of the set used longest ago."""
        if lora_id in self._active_adapters:
            self._active_adapters.touch(lora_id)
            return False
        if len(self._active_adapters) >= self.lora_slots:
            self._active_adapters.remove_oldest()
        slot = self.lora_index_to_id.index(None)
        fill(self.served, slot, self._registered_adapters[lora_id].tables)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        return True


class TableSetWorkerManager(LRUCacheWorkerLoRAManager):
    """Read sets of tables when vLLM asks for adapters."""

    _manager_cls = TableSetManager

    def __init__(self, vllm_config: Any, *rest: Any, **options: Any) -> None:
        super().__init__(vllm_config, *rest, **options)
        self._config = vllm_config.quant_config
        assert isinstance(self._config, SketchedConfig)
        self._files: OrderedDict[int, tuple[BufferedReader, Path]] = OrderedDict()
        self._known: set[int] = set()
        self._is_running = False

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        number = lora_request.lora_int_id
        if number in self.list_adapters():
            return False
        return bool(self._adapter_manager.add_adapter(TableSet(number, None)))

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        """Prepare the sets of a step. An error here would end the engine."""
        self._is_running = True
        try:
            super()._apply_adapters(lora_requests)
        finally:
            self._is_running = False

    def _load_adapter(self, lora_request: Any) -> TableSet:
        number = lora_request.lora_int_id
        if self._is_running and number in self._known:
            return TableSet(number, self._again(lora_request))
        file, folder = self._open(lora_request)
        try:
            tables = self._read(file, folder)
        except RefusedTablesError:
            file.close()
            raise
        self._keep(number, file, folder)
        self._known.add(number)
        return TableSet(number, tables)

    def _open(self, lora_request: Any) -> tuple[BufferedReader, Path]:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        try:
            return open_set(folder), folder
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(
                lora_request.lora_name, lora_request.lora_path
            ) from error

    def _read(self, file: BufferedReader, folder: Path) -> dict[tuple[int, int], torch.Tensor]:
        return read_set(file, folder, self._config.stored, self._adapter_manager.served)

    def _keep(self, number: int, file: BufferedReader, folder: Path) -> None:
        former = self._files.pop(number, None)
        if former is not None:
            former[0].close()
        self._files[number] = (file, folder)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1][0].close()

    def _again(self, lora_request: Any) -> dict[tuple[int, int], torch.Tensor]:
        """Read a set again that vLLM had forgotten.

        The file that was read at first is still open, so the set is the same. If that fails, an
        error here would end the engine, with the requests of all sets. So the requests of this one
        get nonsense: tables of zeros. (NaN would reach other requests by the cache of keys.)
        """
        try:
            if lora_request.lora_int_id in self._files:
                return self._read(*self._files[lora_request.lora_int_id])
            file, folder = self._open(lora_request)
            with file:
                return self._read(file, folder)
        except (RefusedTablesError, LoRAAdapterNotFoundError) as error:
            logger.error(
                "the answers of %s are nonsense from now on: %s; unload it and load it again",
                lora_request.lora_name,
                error,
            )
            tables = own_tables(self._adapter_manager.served)
            return {key: torch.zeros_like(table) for key, table in tables.items()}


def install() -> None:
    """Let sketched models have these managers when `--enable-lora` is given."""
    stock = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    if getattr(stock, "serves_sketches", False):
        return

    def choose(vllm_config: Any, *rest: Any, **options: Any) -> Any:
        is_sketched = vllm_config.model_config.quantization == QUANT_METHOD
        kind = TableSetWorkerManager if is_sketched else stock
        return kind(vllm_config, *rest, **options)

    choose.serves_sketches = True  # type: ignore[attr-defined]
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = choose
