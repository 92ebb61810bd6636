"""Serve sketched models with vLLM, which finds this package by an entry point.

vLLM calls `register` in each of its processes, maybe several times, whatever model it serves.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know sketched checkpoints. Nothing changes for other models."""
    from .versions import is_served

    if not is_served():  # a sketched model is refused with the reason (see `versions.py`)
        from .versions import register_refusal

        register_refusal()
        return
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spallm_formats import QUANT_METHOD

    from . import loading, manager, server
    from .config import SketchedConfig

    register_quantization_config(QUANT_METHOD)(SketchedConfig)
    loading.install()
    manager.install()
    server.install()
