"""Plan a conversion from the source's headers and the options.

Nothing here reads a weight. So `--dry-run` only makes a plan and does not carry it out. A resumed
conversion makes the same plan as the interrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spallm_convert.config import AUTO, SketchConfig
from spallm_convert.errors import SourceError
from spallm_convert.source.checkpoint import DenseCheckpoint
from spallm_convert.source.layer_count import layer_count_problem
from spallm_convert.source.skeleton import read_skeleton
from spallm_formats import (
    Shard,
    SketchedModule,
    SketchMetadata,
    StoredTensor,
    TensorSpec,
    plan_shards,
    summary,
)

from .ignoring import check_patterns, ignored_layers, matches
from .layer import Layer
from .left_dense import dense_warning, dense_weights, other_matrices
from .limits import Limit, loading_limit
from .problems import (
    check_groups,
    double_weights,
    name_problems,
    tensor_problems,
    why_none,
)
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
        limit: Limit of the table values, if the model loads in a dtype with a smaller range.
        shards: The weight files to write, with the place of every tensor.
    """

    metadata: SketchMetadata
    layers: dict[str, Layer]
    kept: dict[str, StoredTensor]
    left_dense: dict[str, str]
    dense_weights: dict[str, int]
    limit: Limit | None
    shards: list[Shard]

    @property
    def sketched_weights(self) -> int:
        """Return the number of weights to sketch."""
        return sum(layer.module.weights for layer in self.layers.values())

    @property
    def dense_warning(self) -> str | None:
        """Return a warning if more than 5 % of the linear weights stay dense."""
        return dense_warning(self.dense_weights, self.sketched_weights)

    @property
    def by_path(self) -> dict[str, Layer]:
        """Return the layers to sketch, by path in the model."""
        return {layer.path: layer for layer in self.layers.values()}

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
    """Plan to sketch every linear layer in the model's blocks.

    With `target_bits`, all layers get the bits of `config` first, and `reallocate` changes them.

    Args:
        checkpoint: The dense checkpoint. Only its headers are read.
        config: Options of the conversion.
        trust_remote_code: Whether to run model code from the checkpoint.

    Raises:
        OptionError: Groups do not divide a layer's columns, a pattern to ignore matches nothing, or
            the target cannot be met.
        SourceError: No layer can be sketched, or a weight has an unsupported dtype or an unexpected
            shape.
    """
    folder, tensors = checkpoint.folder, checkpoint.tensors
    if too_many := layer_count_problem(checkpoint.config, len(tensors)):
        raise SourceError(f"{folder}: {too_many}")
    skeleton = read_skeleton(folder, checkpoint.config, trust_remote_code=trust_remote_code)
    layers: dict[str, Layer] = {}
    left_dense: dict[str, str] = {}
    problems = name_problems(tensors)
    names = {path: skeleton.stored_name(path, tensors) for path in skeleton.linears}
    for path, shape in skeleton.linears.items():
        name = names[path]
        if name is None:
            left_dense[path] = skeleton.unfit.get(path, "its weight is not stored under this name")
            continue
        weight = tensors[name + ".weight"]
        pattern = next((p for p in config.ignore if matches(p, path, name)), None)
        if pattern is not None:
            reason: str | None = f"ignored by the pattern {pattern!r}"
        else:
            reason = skeleton.unfit.get(path) or _reason_to_keep(name, shape, weight, config)
        if reason:
            left_dense[name] = reason
        else:
            problems += tensor_problems(weight, shape) + double_weights(path, skeleton, tensors)
            layers[name] = Layer(name, path, _sketched(shape, config), weight)
    check_patterns(config.ignore, [(path, name or path) for path, name in names.items()])
    left_dense |= other_matrices(tensors, {*layers, *left_dense})
    if problems:
        raise SourceError(f"{folder}: {summary(problems)}")
    if not layers:
        raise SourceError(f"{folder}: no linear layer to sketch {why_none(left_dense)}")
    modules = {name: layer.module for name, layer in layers.items()}
    check_groups(modules)
    check_target(modules, config)
    metadata, kept, shards = _laid_out(tensors, layers, config)
    ignored = ignored_layers(skeleton, names, tensors, config.ignore)
    stored = {tensor.dtype for tensor in kept.values()}
    return Plan(
        metadata=metadata,
        layers=layers,
        kept=kept,
        left_dense=left_dense,
        dense_weights=dense_weights(tensors, layers, ignored),
        limit=loading_limit(checkpoint.config, stored, config.table_dtype),
        shards=shards,
    )


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
    for tensor in tensors.values():
        name = tensor.name.removesuffix(".weight")
        if name in layers and tensor.name != name:
            module = layers[name].module
            groups.append(module.tensors(name, config.mapping, config.table_dtype))
        else:
            kept[tensor.name] = tensor
            groups.append((TensorSpec(tensor.name, tensor.dtype, tensor.shape),))
    return metadata, kept, plan_shards(groups, config.max_shard_bytes)


def _sketched(shape: tuple[int, int], config: SketchConfig) -> SketchedModule:
    """Return a module of this shape, with the bits and groups of `config`."""
    out_features, in_features = shape
    return SketchedModule(
        in_features=in_features,
        out_features=out_features,
        bits=config.bits,
        groups_per_row=config.groups_for(in_features),
    )


def _reason_to_keep(
    name: str, shape: tuple[int, int], weight: StoredTensor, config: SketchConfig
) -> str | None:
    """Return the reason to keep a layer dense, None if it is to be sketched."""
    if config.groups_per_row == AUTO:
        specs = _sketched(shape, config).tensors(name, config.mapping, config.table_dtype)
        if sum(spec.nbytes for spec in specs) >= weight.nbytes:
            return f"with {shape[1]} columns its tables would be larger than the space they save"
    return None
