"""Prepare the dense model that benchmarks of whole models start from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spallm_convert.errors import OptionError
from spallm_convert.source.gguf import dequantized
from spallm_convert.source.skeleton import read_skeleton
from spallm_formats import (
    CONFIG_FILE,
    INDEX_FILE,
    INDEX_MAP_SUFFIX,
    Shard,
    ShardFile,
    TensorSpec,
    from_float32,
    index_json,
    plan_shards,
    sha256,
    to_json,
)

_SOURCE_SHARD_BYTES = 2 * 10**9
#: Values drawn at a time: benchmarks.cpu.memory must stay smaller than what it measures.
_PIECE = 1 << 22


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama model, by default those of a layer in a model of one billion weights.

    With experts it is a Qwen3-MoE model, whose experts are stored one by one.
    """

    layers: int
    hidden: int = 2048
    intermediate: int = 8192
    vocabulary: int = 32000
    head: int = 64
    queries_per_key: int = 4
    experts: int = 0
    expert_size: int = 768

    @classmethod
    def of_bytes(cls, nbytes: float, experts: int = 0) -> LlamaShape:
        """The default shape with as many layers as come closest to so many bytes of bf16."""
        one, two = (cls(layers, experts=experts).nbytes for layers in (1, 2))
        return cls(max(1, round(1 + (nbytes - one) / (two - one))), experts=experts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors())

    def tensors(self) -> list[TensorSpec]:
        """All tensors of the model, with an output layer of its own."""
        hidden, intermediate = self.hidden, self.intermediate
        keys = hidden // self.queries_per_key
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocabulary, hidden)}
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
        }
        if self.experts:
            layer |= {"self_attn.q_norm": (self.head,), "self_attn.k_norm": (self.head,)}
            layer["mlp.gate"] = (self.experts, hidden)
        for mlp in [f"mlp.experts.{number}" for number in range(self.experts)] or ["mlp"]:
            size = self.expert_size if self.experts else intermediate
            layer |= {f"{mlp}.gate_proj": (size, hidden), f"{mlp}.up_proj": (size, hidden)}
            layer[f"{mlp}.down_proj"] = (hidden, size)
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        shapes |= {"model.norm": (hidden,), "lm_head": (self.vocabulary, hidden)}
        return [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in shapes.items()]

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        heads = self.hidden // self.head
        others = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.head,
            "moe_intermediate_size": self.expert_size,
            "num_experts": self.experts,
            "num_experts_per_tok": min(8, self.experts),
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": heads // self.queries_per_key,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        } | (others if self.experts else {})


SHAPES = {
    "1.3b": LlamaShape(24, intermediate=5504, head=128, queries_per_key=1),
    "tiny": LlamaShape(2, hidden=64, intermediate=160, vocabulary=512, head=16, queries_per_key=2),
}

Linears = Mapping[str, tuple[int, int]]


def dense_folder(model: Path | None, shape: str | None, cache: Path) -> Path:
    """Return the folder of a dense model: a given one, random weights, or the installed demo.

    Models that are made are stored below `cache`, and made once.
    """
    if model is not None:
        if not (model / CONFIG_FILE).is_file():
            raise OptionError(
                f"{model} is not the folder of a Hugging Face model: no {CONFIG_FILE}"
            )
        return model
    if shape is None:
        path = _demo_model()
        return dequantized(path, cache / path.stem)
    folder = cache / f"random-{shape}"
    done = cache / f"random-{shape}.complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        cache.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder, SHAPES[shape])
        done.touch()
    return folder


def model_name(model: Path | None, shape: str | None = None) -> str:
    """Return the name in results of the model that `dense_folder` gives for the same arguments."""
    if model is not None:
        return model.resolve().name
    return shape or _demo_model().stem


def digest(dense: Path) -> str:
    """Identify a model by its config and weights, whichever version of transformers wrote them."""
    config = json.loads((dense / CONFIG_FILE).read_text())
    config.pop("transformers_version", None)
    weights = map(sha256, sorted(dense.glob("*.safetensors")))
    text = json.dumps(config, sort_keys=True) + "".join(weights)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_linears(dense: Path) -> Linears:
    """Return (out_features, in_features) of the layers that are sketched or get adapters."""
    weights = read_skeleton(dense, json.loads((dense / CONFIG_FILE).read_text())).weights
    return {
        name.removesuffix(INDEX_MAP_SUFFIX): (weight.out_features, weight.in_features)
        for name, weight in weights.items()
        if weight.experts is None
    }


def write_checkpoint(folder: Path, shape: LlamaShape) -> None:
    """Writes a checkpoint of random weights, a piece of a tensor at a time."""
    folder.mkdir()
    random = np.random.default_rng(0)
    shards = plan_shards([(spec,) for spec in shape.tensors()], _SOURCE_SHARD_BYTES)
    for shard in shards:
        _write_shard(folder / shard.filename, shard, random)
    if len(shards) > 1:
        (folder / INDEX_FILE).write_bytes(index_json(shards))
    (folder / CONFIG_FILE).write_bytes(to_json(shape.config()))


def _write_shard(path: Path, shard: Shard, random: np.random.Generator) -> None:
    file = ShardFile(path, shard)
    for name, spec in shard.tensors.items():
        for start in range(0, spec.elements, _PIECE):
            count = min(_PIECE, spec.elements - start)
            if len(spec.shape) == 1:
                values = np.ones(count, np.float32)
            else:
                values = random.standard_normal(count, np.float32) * np.float32(0.02)
            file.write(name, 2 * start, from_float32(values, "BF16"))
    file.close()


def _demo_model() -> Path:
    # It imports torch, which would make benchmarks.cpu.memory larger than what it measures.
    from spallm_convert.cli.demo_run import demo_model

    return demo_model()
