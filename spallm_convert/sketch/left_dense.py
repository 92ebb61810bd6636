"""Warn if a large part of a model's linear weights stays dense."""

from __future__ import annotations

from collections.abc import Container, Mapping

from spallm_convert.source.linears import is_in_block
from spallm_convert.source.skeleton import numbers_starred
from spallm_convert.source.stored_names import LoadedNames
from spallm_formats import StoredTensor, summary

#: Share of the linear weights that may stay dense without a warning.
_ACCEPTED_SHARE = 0.05


def other_matrices(
    tensors: Mapping[str, StoredTensor],
    sketched: Container[str],
    known: Container[str],
    unfit: Mapping[str, str],
    names: LoadedNames,
) -> dict[str, str]:
    """Return the matrices inside blocks that belong to no linear layer.

    Args:
        tensors: Every tensor of the source, by name.
        sketched: Names of the weights to sketch.
        known: Names of the layers that stay dense for a known reason.
        unfit: Reasons for parameters of the model that cannot be sketched, by path.
        names: What the stored tensors become in the model.

    Returns:
        The reason why they stay dense, by name.
    """
    becomes = names.parameters()
    found = {}
    for name in _matrices(tensors):
        if name in sketched or name.removesuffix(".weight") in known:
            continue
        reasons = [unfit[p] for p in becomes.get(name, ()) if p in unfit]
        other = names.changed.get(name, "not the weight of a linear layer")
        found[name] = reasons[0] if reasons else other
    return found


def dense_weights(
    tensors: Mapping[str, StoredTensor], sketched: Container[str], ignored: Container[str]
) -> dict[str, int]:
    """Count the linear weights that stay dense although the user did not ask for it.

    These are all matrices that are stored inside blocks: weights of linear layers, under whatever
    names, and others such as fused experts.

    Args:
        tensors: Every tensor of the source, by name.
        sketched: Names of the weights to sketch.
        ignored: Names of the weights that the user leaves dense.

    Returns:
        The number of weights of each kind of layer. In the name of a kind, numbers are stars.
    """
    counts: dict[str, int] = {}
    for name, tensor in _matrices(tensors).items():
        if name not in sketched and name not in ignored:
            kind = numbers_starred(name.removesuffix(".weight"))
            counts[kind] = counts.get(kind, 0) + tensor.elements
    return counts


def dense_warning(dense: Mapping[str, int], sketched: int) -> str | None:
    """Return a warning if more than 5 % of the linear weights stay dense.

    Args:
        dense: Number of weights that stay dense, by kind of layer.
        sketched: Number of weights to sketch.
    """
    count = sum(dense.values())
    if count <= _ACCEPTED_SHARE * (count + sketched):
        return None
    kinds = sorted(dense, key=lambda kind: (-dense[kind], kind))
    return (
        f"warning: {count:,} of {count + sketched:,} linear weights "
        f"({count / (count + sketched):.1%}) stay dense: {summary(kinds, ', ')}"
    )


def _matrices(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors inside blocks with two dimensions or more."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if len(tensor.shape) >= 2 and is_in_block(name.removesuffix(".weight"))
    }
