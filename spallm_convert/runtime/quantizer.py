"""Load and save sketched checkpoints with transformers: a config class and a quantizer.

Importing this module registers both under `quant_method: "spallm"`.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spallm_convert.errors import FormatError
from spallm_formats import QUANT_METHOD, SketchMetadata

from .affine import without_affine
from .checking import check_dtype, check_files
from .conversions import keep_sizes_of_one, wanted_dtypes, with_tables
from .evaluation_mode import keep_in_evaluation
from .kept_dtypes import restore_dtypes, table_dtypes
from .linear import train_tables_only
from .parameters import sketched_pairs
from .replacing import densify, replace_weights
from .resolving import resolve
from .tables import attach_set_tables
from .tying import fit_model, tied_parameters

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
    """Replace linear layers and experts by sketched ones before weights are loaded."""

    requires_calibration = True
    serialized_names = {"weight": ["weight", "weight_table"]}  # noqa: RUF012
    quantization_config: SpallmConfig
    _tables: dict[str, torch.dtype]
    _expected: dict[str, tuple[torch.Size, torch.dtype]]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return the changes that transformers makes while loading, with those of tables."""
        whole_names = bool(model)  # see `conversions.py`
        return with_tables(weight_conversions) if whole_names else weight_conversions

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        check_dtype(dtype)
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        metadata = self.quantization_config.metadata
        check_files(checkpoint_files, metadata, model)
        sketches, problems = resolve(model, metadata)
        if problems:
            raise FormatError(problems)
        # Tables stored in float32 stay in float32 for training, whatever the dtype of the model.
        replace_weights(
            model, sketches, torch.float32 if metadata.table_dtype == "float32" else None
        )
        keep_in_evaluation(model)
        self._tables = table_dtypes(model)
        dtypes = wanted_dtypes(model, model.dtype)
        self._expected = {
            name: (parameter.shape, dtypes[name]) for name, parameter in model.named_parameters()
        }

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        self._check_parameters(model)
        self._cast_parameters(model)
        restore_dtypes(model, self._tables)
        keep_sizes_of_one(getattr(model, "_weight_conversions", None))
        train_tables_only(model)
        attach_set_tables(model)
        fit_model(model)
        self._describe_tables(_table_dtypes(model))
        return model

    def _check_parameters(self, model: PreTrainedModel) -> None:
        """Raise FormatError if a parameter has got a tensor of another kind than it had."""
        problems = []
        for name, parameter in model.named_parameters():
            shape, dtype = self._expected.get(name, (parameter.shape, torch.float32))
            # transformers 5.0 sets parameters of any shape if a model has a quantizer.
            if parameter.shape != shape:
                problems.append(
                    f"tensor {name!r} has the shape {list(parameter.shape)}, the model expects "
                    f"{list(shape)}"
                )
            elif dtype.is_floating_point and not (
                parameter.is_floating_point() or parameter.is_complex()
            ):
                problems.append(
                    f"tensor {name!r} has the dtype {parameter.dtype}, the model expects floats"
                )
        if problems:
            raise FormatError(problems)

    def _cast_parameters(self, model: PreTrainedModel) -> None:
        """Cast what transformers has loaded in another dtype than the model has."""
        for name, parameter in model.named_parameters():
            _, dtype = self._expected.get(name, (None, parameter.dtype))
            if parameter.is_floating_point() and not parameter.is_meta and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Return the state dict that `save_pretrained`, the caller, saves, and its metadata.

        The format has one dtype for all tables, so tables of several dtypes are cast to the widest.
        Tied sketches are saved once, under the name that the config has. Shifts and scales of an
        affine set are applied to the tables.
        """
        given = _given_state_dict(sys._getframe(1))
        endings = {pair.table.name for pair in sketched_pairs(model)}
        tables = [v for name, v in (given or {}).items() if name.rpartition(".")[2] in endings]
        # Without tables, as in all processes of FSDP but the first, the config is not saved either.
        kinds = {table.dtype for table in tables} or _table_dtypes(model)
        self._describe_tables(kinds)  # the config is saved after this
        kind = _widest(kinds)
        tied = tied_parameters(model)
        has_affine = any(pair.affine for pair in sketched_pairs(model))
        if kinds <= {kind} and not (tied or has_affine):
            return given, {}
        if torch.float64 in kinds:
            warnings.warn("float64 sketch tables are saved rounded to float32", stacklevel=3)
        state_dict = model.state_dict() if given is None else given
        return {
            name: value.to(kind) if name.rpartition(".")[2] in endings else value
            for name, value in without_affine(state_dict).items()
            if name not in tied
        }, {}

    def _describe_tables(self, kinds: set[torch.dtype]) -> None:
        """Write the dtype that tables of these dtypes are saved in to the config.

        The dtype of the checkpoint that was loaded may be another one.
        """
        if kinds:
            self.quantization_config.metadata = dataclasses.replace(
                self.quantization_config.metadata,
                table_dtype=str(_widest(kinds)).removeprefix("torch."),
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

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        # Saving a model leaves the name of its dtype in its config.
        densify(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


def _table_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {pair.table.parameter.dtype for pair in sketched_pairs(model)}


def _widest(kinds: set[torch.dtype]) -> torch.dtype:
    """Return the dtype of the format to save tables of these dtypes in; float32 is the widest."""
    kind = next(iter(kinds), torch.float32)
    for other in kinds:
        kind = torch.promote_types(kind, other)
    return kind if kind in (torch.bfloat16, torch.float16) else torch.float32


def _given_state_dict(caller: FrameType) -> dict[str, torch.Tensor] | None:
    """Return the state dict that `save_pretrained` was given.

    transformers replaces it by what the quantizer returns, without showing it to the quantizer.
    Trainer has gathered it from all shards, so it must not be lost.
    """
    if caller.f_code.co_name != "save_pretrained" or "state_dict" not in caller.f_locals:
        raise RuntimeError(
            f"transformers {transformers.__version__} saves models in a way that spallm-convert "
            f"does not know, and would lose trained tables: save them with save_tables"
        )
    found: dict[str, torch.Tensor] | None = caller.f_locals["state_dict"]
    return found
