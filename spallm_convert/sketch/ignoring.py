"""Match the patterns of layers that the user leaves dense (`--ignore`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from spallm_convert.errors import OptionError
from spallm_convert.source.skeleton import Skeleton, by_model_name
from spallm_formats import INDEX_MAP_SUFFIX, StoredTensor


def matches(pattern: str, *names: str) -> bool:
    """Return whether a pattern matches one of a layer's names (path, name in the checkpoint)."""
    return any(fnmatch.fnmatch(name, pattern) for name in names)


def ignored_layers(
    skeleton: Skeleton,
    names: Mapping[str, str | None],
    tensors: Mapping[str, StoredTensor],
    patterns: tuple[str, ...],
) -> set[str]:
    """Return the layers that the user leaves dense, by the names of their weights on disk.

    Args:
        skeleton: The model.
        names: Name of each layer in the checkpoint, by path. None if transformers renames its
            weight.
        tensors: Tensors of the checkpoint, by name.
        patterns: Patterns of paths or names to leave dense.
    """
    if not patterns:
        return set()
    renamed = {name: tensor.name for name, tensor in by_model_name(skeleton.model, tensors).items()}
    found = set()
    for path, name in names.items():
        stored = name or renamed.get(path + INDEX_MAP_SUFFIX, path).removesuffix(INDEX_MAP_SUFFIX)
        if any(matches(pattern, path, stored) for pattern in patterns):
            found.add(stored)
    return found


def check_patterns(patterns: tuple[str, ...], layers: list[tuple[str, str]]) -> None:
    """Raise OptionError if a pattern to ignore matches no layer."""
    unused = [p for p in patterns if not any(matches(p, *names) for names in layers)]
    if unused:
        raise OptionError(
            f"ignore patterns {unused} match no linear layer of the model's blocks; --dry-run "
            f"without --ignore lists the layers"
        )
