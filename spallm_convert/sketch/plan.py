"""Plan a conversion from the source's headers and the options.

Nothing here reads a weight. So `--dry-run` only makes a plan and does not carry it out. A resumed
conversion makes the same plan as the interrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spallm_convert.config import SketchConfig
from spallm_convert.errors import SourceError
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.layer_count import layer_count_problem
from spallm_convert.source.linears import is_in_block
from spallm_convert.source.skeleton import read_skeleton
from spallm_formats import (
    Shard,
    SketchMetadata,
    StoredTensor,
    TensorSpec,
    plan_shards,
    summary,
)

from .layer import Layer
from .layers import find_layers
from .left_dense import WARNING, dense_reasons, dense_warning, dense_weights, other_matrices
from .limits import Limit, loading_limit
from .problems import check_groups, name_problems, why_none
from .widths import Choice, check_target, with_choice


@dataclass(frozen=True)
class Plan:
    """Describe what a conversion will write; `plan_conversion` returns it.

    Attributes:
        metadata: Bits, groups and shape of every layer to sketch, mapping and table dtype, as
            `config.json` will have them.
        layers: The layers to sketch, by name in the checkpoint.
        kept: Tensors that are copied unchanged, by name.
        left_dense: The reason for every linear layer or matrix that is not sketched, by name.
        dense_weights: Number of linear weights that stay dense without the user's wish, by kind of
            layer.
        dense_reasons: The main reason for that, by kind of layer.
        limit: Limit of the table values, if the model loads in a dtype with a smaller range.
        shards: The weight files to write, with the place of every tensor.
        notes: What the user should know about the embedding and the head, if they were asked for.
    """

    metadata: SketchMetadata
    layers: dict[str, Layer]
    kept: dict[str, StoredTensor]
    left_dense: dict[str, str]
    dense_weights: dict[str, int]
    dense_reasons: dict[str, str]
    limit: Limit | None
    shards: list[Shard]
    notes: tuple[str, ...] = ()

    @property
    def sketched_weights(self) -> int:
        """Return the number of weights to sketch."""
        return sum(layer.module.weights for layer in self.layers.values())

    @property
    def dense_warning(self) -> str | None:
        """Return a warning if more than 5 % of the linear weights in the blocks stay dense."""
        in_blocks = (layer for layer in self.layers.values() if is_in_block(layer.path))
        sketched = sum(layer.module.weights for layer in in_blocks)
        return dense_warning(self.dense_weights, sketched, self.dense_reasons)

    @property
    def by_path(self) -> dict[str, Layer]:
        """Return the layers to sketch that are linear layers of the model, by path in the model."""
        return {layer.path: layer for layer in self.layers.values() if layer.is_whole}

    def in_block(self, block: str) -> dict[str, Layer]:
        """Return the layers to sketch inside a module.

        Args:
            block: Path of the module in the model, such as "model.layers.0".

        Returns:
            The layers, by path relative to the module, such as "mlp.up_proj".
        """
        inside = ((layer.inside(block), layer) for layer in self.layers.values())
        return {name: layer for name, layer in inside if name is not None}

    def totals(self) -> dict[str, Any]:
        """Return the sizes before and after.

        Returns:
            A dict with `sketched_weights` and `kept_weights` (numbers of weights),
            `bits_per_weight` (of the sketched weights, tables and padding included), `source_bytes`
            and `sketched_bytes` (bytes of all tensors), and `ratio` (source bytes per sketched
            byte).
        """
        dense = sum(layer.weight.nbytes for layer in self.layers.values())
        sketched = sum(spec.nbytes for spec in self.metadata.tensors().values())
        kept = sum(tensor.nbytes for tensor in self.kept.values())
        return {
            "sketched_weights": self.sketched_weights,
            "kept_weights": sum(tensor.elements for tensor in self.kept.values()),
            "bits_per_weight": 8 * sketched / self.sketched_weights,
            "source_bytes": dense + kept,
            "sketched_bytes": sketched + kept,
            "ratio": (dense + kept) / (sketched + kept),
        }


def make_plan(
    checkpoint: DenseCheckpoint, config: SketchConfig, *, trust_remote_code: bool = False
) -> Plan:
    """Plan to sketch every linear layer in the model's blocks, and the ends that are asked for.

    With `target_bits`, all layers get the bits of `config` first, and `reallocate` changes them.

    Args:
        checkpoint: The dense checkpoint. Only its headers are read.
        config: Options of the conversion.
        trust_remote_code: Whether to run model code from the checkpoint.

    Raises:
        OptionError: Groups do not divide a layer's columns, a pattern matches nothing, a recipe
            treats weights differently that belong together, the target cannot be met, or the model
            has no embedding or head to sketch.
        SourceError: No layer can be sketched, a weight has an unsupported dtype or an unexpected
            shape, or `config.strict` forbids what would stay dense.
    """
    folder, tensors = checkpoint.folder, checkpoint.tensors
    if too_many := layer_count_problem(checkpoint.config, len(tensors)):
        raise SourceError(f"{folder}: {too_many}")
    skeleton = read_skeleton(folder, checkpoint.config, trust_remote_code=trust_remote_code)
    found = find_layers(skeleton, tensors, config)
    layers = found.layers
    sketched = {layer.weight.name for layer in layers.values()}
    own = skeleton.model.state_dict().keys()
    left_dense = found.left_dense | other_matrices(
        tensors, sketched, found.left_dense, skeleton.unfit, found.names, own
    )
    if problems := name_problems(tensors, layers) + found.problems:
        raise SourceError(f"{folder}: {summary(problems)}")
    if not layers:
        raise SourceError(f"{folder}: no linear layer to sketch {why_none(left_dense)}")
    modules = {name: layer.module for name, layer in layers.items()}
    check_groups(modules)
    check_target(modules, config)
    metadata, kept, shards = _laid_out(tensors, layers, config)
    stored = {tensor.dtype for tensor in kept.values()}
    plan = Plan(
        metadata=metadata,
        layers=layers,
        kept=kept,
        left_dense=left_dense,
        dense_weights=dense_weights(tensors, sketched, found.ignored),
        dense_reasons=dense_reasons(left_dense, found.ignored),
        limit=loading_limit(checkpoint.config, stored, config.table_dtype),
        shards=shards,
        notes=tuple(found.notes),
    )
    if config.strict and plan.dense_warning is not None:
        raise SourceError(
            f"{folder}: {plan.dense_warning.removeprefix(WARNING)}; --strict accepts 5 %: name "
            f"layers that may stay dense with --ignore, or leave out --strict"
        )
    return plan


def reallocate(
    plan: Plan, choices: Mapping[str, Choice], checkpoint: DenseCheckpoint, config: SketchConfig
) -> Plan:
    """Return the same plan with other bits and groups.

    Args:
        plan: The plan to change.
        choices: Bits and groups of every module, by its name in the checkpoint.
        checkpoint: The dense checkpoint that the plan was made for.
        config: Options of the conversion.
    """
    layers = {
        name: replace(layer, module=with_choice(layer.module, choices[name]))
        for name, layer in plan.layers.items()
    }
    metadata, kept, shards = _laid_out(checkpoint.tensors, layers, config)
    return replace(plan, metadata=metadata, layers=layers, kept=kept, shards=shards)


def _laid_out(
    tensors: dict[str, StoredTensor], layers: dict[str, Layer], config: SketchConfig
) -> tuple[SketchMetadata, dict[str, StoredTensor], list[Shard]]:
    """Return the metadata, the tensors to copy, and a place for every tensor in source order."""
    metadata = SketchMetadata(
        mapping=config.mapping,
        table_dtype=config.table_dtype,
        hash_seed=config.seed,
        modules={name: layer.module for name, layer in layers.items()},
    )
    kept: dict[str, StoredTensor] = {}
    groups: list[tuple[TensorSpec, ...]] = []
    by_tensor = {layer.weight.name: layer for layer in layers.values()}
    for tensor in tensors.values():
        if layer := by_tensor.get(tensor.name):
            groups.append(layer.module.tensors(layer.name, config.mapping, config.table_dtype))
        else:
            kept[tensor.name] = tensor
            groups.append((TensorSpec(tensor.name, tensor.dtype, tensor.shape),))
    return metadata, kept, plan_shards(groups, config.max_shard_bytes)
