"""Load and save sketched checkpoints with transformers: a config class and a quantizer.

Importing this module registers both under `quant_method: "spallm"`.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spallm_convert.errors import FormatError
from spallm_convert.source.skeleton import resolve_modules
from spallm_formats import QUANT_METHOD, SketchMetadata

from .linear import SketchedLinear, train_tables_only
from .tables import attach_set_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class SpallmConfig(QuantizationConfigMixin):
    """Hold the `quantization_config` of a sketched checkpoint; refuse unknown keys."""

    def __init__(self, **document: Any) -> None:
        self.metadata = SketchMetadata.from_json({"quant_method": QUANT_METHOD} | document)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # not in transformers' enum

    def to_dict(self) -> dict[str, Any]:
        return self.metadata.to_json()


@register_quantizer(QUANT_METHOD)
class SpallmQuantizer(HfQuantizer):
    """Replace linear layers by sketched layers before weights are loaded."""

    requires_calibration = True
    serialized_names = {"weight": ["weight", "weight_table"]}  # noqa: RUF012
    quantization_config: SpallmConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        metadata = self.quantization_config.metadata
        seed = metadata.hash_seed if metadata.mapping == "hash" else None
        # Tables stored in float32 stay in float32 for training, whatever the dtype of the model.
        table_dtype = torch.float32 if metadata.table_dtype == "float32" else None
        linears = {
            name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
        }
        paths, problems = resolve_modules(
            metadata,
            {name: (dense.out_features, dense.in_features) for name, dense in linears.items()},
            base_prefix=model.base_model_prefix,
            model_name=type(model).__name__,
        )
        if problems:
            raise FormatError(problems)
        for stored, path in paths.items():
            dense = linears[path]
            sketched = SketchedLinear(
                metadata.modules[stored],
                bias=dense.bias,
                table_dtype=table_dtype or dense.weight.dtype,
                hash_seed=seed,
                device=dense.weight.device,
                stored_name=stored,
            )
            model.set_submodule(path, sketched)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        train_tables_only(model)
        attach_set_tables(model)
        self._describe_tables(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Return the state dict that `save_pretrained`, the caller, saves, and its metadata.

        It is the state dict that `save_pretrained` was given, read from the caller's frame. Trainer
        has gathered it from all shards, and transformers would otherwise drop it.
        """
        # Update the config before it is saved: FSDP2's mixed precision makes the tables float32.
        self._describe_tables(model)
        return sys._getframe(1).f_locals.get("state_dict"), {}

    def _describe_tables(self, model: PreTrainedModel) -> None:
        """Write the present dtype of the tables to the config; the stored dtype may differ."""
        kinds = {m.weight_table.dtype for m in model.modules() if isinstance(m, SketchedLinear)}
        for kind in kinds:
            self.quantization_config.metadata = dataclasses.replace(
                self.quantization_config.metadata, table_dtype=str(kind).removeprefix("torch.")
            )

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        sketched = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SketchedLinear)
        }
        for name, module in sketched.items():
            dense = nn.Linear(module.in_features, module.out_features, device="meta")
            dense.weight = nn.Parameter(module.dense_weight().to(dtype), requires_grad=False)
            dense.bias = module.bias
            model.set_submodule(name, dense)
        return model
