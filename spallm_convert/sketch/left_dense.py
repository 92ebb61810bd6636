"""Warn if a large part of a model's linear weights stays dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping

from spallm_convert.source.linears import is_in_block
from spallm_convert.source.skeleton import numbers_starred
from spallm_convert.source.stored_names import LoadedNames
from spallm_formats import StoredTensor

#: Share of the linear weights that may stay dense without a warning.
_ACCEPTED_SHARE = 0.05
WARNING = "warning: "
#: Length of the warning, and its end if not all kinds fit.
_MOST_CHARACTERS = 300
_OTHERS = "; and {} more kinds"


def other_matrices(
    tensors: Mapping[str, StoredTensor],
    sketched: Container[str],
    known: Container[str],
    unfit: Mapping[str, str],
    names: LoadedNames,
    own: Container[str],
) -> dict[str, str]:
    """Return the matrices inside blocks that belong to no linear layer.

    Args:
        tensors: Every tensor of the source, by name.
        sketched: Names of the weights to sketch.
        known: Names of the layers that stay dense for a known reason.
        unfit: Reasons for parameters of the model that cannot be sketched, by path.
        names: What the stored tensors become in the model.
        own: Paths of the model's parameters.

    Returns:
        The reason why they stay dense, by name.
    """
    becomes = names.parameters()
    found = {}
    for name in matrices(tensors):
        if name in sketched or name in known or name.removesuffix(".weight") in known:
            continue
        targets = becomes.get(name, ())
        reasons = [unfit[p] for p in targets if p in unfit]
        is_loaded = name in names.changed or any(p in own for p in targets)
        other = "not the weight of a linear layer" if is_loaded else "transformers does not load it"
        found[name] = reasons[0] if reasons else names.changed.get(name, other)
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
    for name, tensor in matrices(tensors).items():
        if name not in sketched and name not in ignored:
            kind = numbers_starred(name.removesuffix(".weight"))
            counts[kind] = counts.get(kind, 0) + tensor.elements
    return counts


def dense_reasons(left_dense: Mapping[str, str], ignored: Container[str]) -> dict[str, str]:
    """Return why linear weights stay dense although the user did not ask for it.

    Args:
        left_dense: The reason for every layer that stays dense, by name.
        ignored: Names of the weights that the user leaves dense.

    Returns:
        The most frequent reason of each kind of layer.
    """
    counts: dict[str, Counter[str]] = {}
    for name, why in left_dense.items():
        if name not in ignored and f"{name}.weight" not in ignored:
            kind = numbers_starred(name.removesuffix(".weight"))
            counts.setdefault(kind, Counter())[why] += 1
    return {kind: reasons.most_common(1)[0][0] for kind, reasons in counts.items()}


def dense_warning(
    dense: Mapping[str, int], sketched: int, reasons: Mapping[str, str]
) -> str | None:
    """Return a warning if more than 5 % of the linear weights stay dense.

    It is one line of at most 300 characters, if names are not extremely long: the share, and the
    kinds with the reasons, the largest first.

    Args:
        dense: Number of weights that stay dense, by kind of layer.
        sketched: Number of weights to sketch.
        reasons: The reason of each kind of layer.
    """
    count = sum(dense.values())
    if count <= _ACCEPTED_SHARE * (count + sketched):
        return None
    start = (
        f"{WARNING}{count:,} of {count + sketched:,} linear weights "
        f"({count / (count + sketched):.1%}) stay dense: "
    )
    return start + _kinds_by_reason(dense, reasons, _MOST_CHARACTERS - len(start))


def _kinds_by_reason(dense: Mapping[str, int], reasons: Mapping[str, str], room: int) -> str:
    """Return the kinds of layers that stay dense, the largest first, each with its reason."""
    kinds = sorted(dense, key=lambda kind: (-dense[kind], kind))
    by_reason: dict[str, list[str]] = {}
    for kind in kinds:
        by_reason.setdefault(reasons[kind], []).append(kind)
    text, named = "", 0
    for why, alike in by_reason.items():
        others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        more = f"{'; ' if text else ''}{alike[0]}{others} ({why})"
        if text and len(text) + len(more) > room - len(_OTHERS.format(len(kinds))):
            return text + _OTHERS.format(len(kinds) - named)
        text += more
        named += len(alike)
    return text


def matrices(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors inside blocks with two dimensions or more.

    Args:
        tensors: Tensors by name.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if len(tensor.shape) >= 2 and is_in_block(name.removesuffix(".weight"))
    }
