"""List the methods that the fine-tuning benchmark compares, and load the model that each trains.

Trained parameters and AdamW's moments are float32; frozen ones are bfloat16 or compressed. Adapters
are added to the layers that are sketched: the linear layers inside blocks. Full fine-tuning trains
every parameter, including embeddings and norms. Affine sets train a shift and a scale for each
table: 2 / 2^bits of the parameters that tables have. Adapters of ranks 1 and 4 have about as many
as affine sets of 4-bit sketches with 1 and 4 groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.dense import Linears
from spallm_convert import CalibrationConfig, SketchConfig, convert, load_sketched, set_trainable
from spallm_formats import SCALE_ENDING, TABLE_SUFFIX

#: Packages that a kind of method needs in addition to the project's.
PEERS = {"lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
#: Adapters of the matched rank have at most as many parameters as the tables of this method.
MATCHED = "sketch-4bit-gpr4"


@dataclass(frozen=True, kw_only=True)
class Method:
    """Describe a method.

    kind: "sketch", "affine", "lora", "qlora" or "full". rank: of adapters, None for the matched
    rank. calibrated: whether the sketch is calibrated on Python's documentation, a text unrelated
    to the task.
    """

    kind: str
    bits: int = 0
    groups: int = 0
    rank: int | None = None
    calibrated: bool = False

    def rank_for(self, linears: Linears) -> int:
        """Return the rank of its adapters on a model."""
        if self.rank is not None:
            return self.rank
        matched = METHODS[MATCHED]
        return matched_rank(linears, table_entries(linears, matched.bits, matched.groups))

    @property
    def is_sketched(self) -> bool:
        """Return whether it trains a sketched model."""
        return self.kind in ("sketch", "affine")

    @property
    def base(self) -> str:
        """Name the model before training: methods of the same base start with the same loss."""
        if self.is_sketched:
            return f"sketch-{self.bits}bit-gpr{self.groups}" + "-calibrated" * self.calibrated
        return "nf4" if self.kind == "qlora" else "dense"


def _methods() -> dict[str, Method]:
    found = {}
    for kind in ("lora", "qlora"):
        found[f"{kind}-matched"] = Method(kind=kind)
        for rank in (1, 4, 16):
            found[f"{kind}-r{rank}"] = Method(kind=kind, rank=rank)
    for bits, groups in ((4, 1), (4, 4), (4, 8), (3, 4), (2, 4)):
        found[f"sketch-{bits}bit-gpr{groups}"] = Method(kind="sketch", bits=bits, groups=groups)
    for groups in (1, 4):
        found[f"affine-4bit-gpr{groups}"] = Method(kind="affine", bits=4, groups=groups)
    calibrated = Method(kind="sketch", bits=4, groups=4, calibrated=True)
    return found | {calibrated.base: calibrated, "full": Method(kind="full")}


#: By name. Speeds in turn are relative to the first.
METHODS = _methods()


def parameter_groups(model: Any, learning_rate: float) -> list[dict[str, Any]]:
    """Return the trainable parameters with their learning rates, as optimizers take them.

    A step of a scale changes weights by the step times their size. So that a step of a shift and of
    a scale change weights alike, the rate of scales is divided by the RMS of the tables.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith(SCALE_ENDING)]
    others = [p for name, p in named if not name.endswith(SCALE_ENDING)]
    groups = [{"params": others, "lr": learning_rate}]
    if scales:
        tables = [p for name, p in model.named_parameters() if name.endswith(TABLE_SUFFIX)]
        squares = sum(float(p.detach().square().sum()) for p in tables)
        rms = (squares / sum(p.numel() for p in tables)) ** 0.5
        groups.append({"params": scales, "lr": learning_rate / rms})
    return groups


def table_entries(linears: Linears, bits: int, groups: int) -> int:
    """Return the trainable parameters of sketched layers of shapes (out_features, in_features)."""
    return sum(rows for rows, _ in linears.values()) * groups * 2**bits


def adapter_parameters(linears: Linears, rank: int) -> int:
    """Return the trainable parameters of adapters at all layers."""
    return rank * sum(rows + columns for rows, columns in linears.values())


def matched_rank(linears: Linears, budget: int) -> int:
    """Return the largest rank within a number of parameters, at least 1."""
    return max(1, budget // adapter_parameters(linears, 1))


def sketch_folder(method: Method, dense: Path, identity: str, cache: Path) -> Path:
    """Return the sketched model of a method; convert it if it does not exist."""
    folder = cache / f"{identity}-{method.base}"
    calibration = CalibrationConfig(samples=32) if method.calibrated else None
    config = SketchConfig(bits=method.bits, groups_per_row=method.groups, calibration=calibration)
    convert(dense, folder, config, resume=folder.exists())
    return folder


def load(method: Method, rank: int, source: Path, device: str) -> Any:
    """Load the model that a method trains, from its dense or its sketched folder."""
    if method.is_sketched:
        model = load_sketched(source, dtype=torch.bfloat16, device_map={"": device})
        set_trainable(model, affine=method.kind == "affine")
        return model
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if method.kind == "full":
        options["dtype"] = torch.float32
    elif method.kind == "qlora":
        options["quantization_config"] = _nf4()
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": device}, **options)
    return model if method.kind == "full" else _adapted(model, rank)


def _nf4() -> Any:
    """Configure NF4 as in the QLoRA paper (arXiv 2305.14314), with quantized scales."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _adapted(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
