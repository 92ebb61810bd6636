"""Find the input embedding and the output head of a model, which are sketched if asked for.

Both have a row for each token. Many models tie them: they are one weight, stored once, and so they
are sketched together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from spallm_convert.errors import OptionError
from spallm_formats import INDEX_MAP_SUFFIX

from .linear_weights import LinearWeight
from .lookups import find_finish
from .weight_reads import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .skeleton import Skeleton
    from .stored_names import LoadedNames

EMBEDDINGS, LM_HEAD = "--embeddings", "--lm-head"
_WHAT = {EMBEDDINGS: "input embedding of tokens", LM_HEAD: "output head"}


@dataclass(frozen=True)
class TokenWeight:
    """Describe a weight with a row for each token.

    Attributes:
        paths: The modules that have it; several if it is tied.
        uses: The options that it is sketched by, given or not: EMBEDDINGS, LM_HEAD or both.
        weight: Its shape.
        reason: Why it cannot be sketched, None if it can.
    """

    paths: tuple[str, ...]
    uses: tuple[str, ...]
    weight: LinearWeight
    reason: str | None

    def note(self, asked: set[str]) -> str | None:
        """Return what the user should know about it, None if all is as asked."""
        names = " and ".join(self.paths)
        if self.reason is not None:
            return f"{names}: not sketched, because {self.reason}"
        if set(self.uses) - asked:
            return f"{names} are tied, so both are sketched"
        return None


def with_token_weights(
    skeleton: Skeleton, names: LoadedNames, *, embeddings: bool, lm_head: bool
) -> tuple[Skeleton, list[str]]:
    """Add the weights of the input embedding and the head to those that may be sketched.

    Args:
        skeleton: The model.
        names: What the stored tensors become in the model.
        embeddings: Whether to add the input embedding.
        lm_head: Whether to add the head.

    Returns:
        The skeleton, and notes for the user.

    Raises:
        OptionError: If the model does not have what is asked for.
    """
    asked = {o for o, given in ((EMBEDDINGS, embeddings), (LM_HEAD, lm_head)) if given}
    weights, unfit = dict(skeleton.weights), dict(skeleton.unfit)
    notes = []
    for found in find_token_weights(skeleton.model, asked):
        parameters = [path + INDEX_MAP_SUFFIX for path in found.paths]
        # A tied weight is usually stored once.
        stored = [name for name in parameters if names.pieces.get(name)] or parameters[:1]
        weights |= dict.fromkeys(stored, found.weight)
        if found.reason is not None:
            unfit |= dict.fromkeys(stored, found.reason)
        note = found.note(asked)
        if note is not None:
            notes.append(note)
    return replace(skeleton, weights=weights, unfit=unfit), notes


def find_token_weights(model: PreTrainedModel, asked: set[str]) -> list[TokenWeight]:
    """Find the weights that options ask for.

    Args:
        model: The model, whose weights may be on the meta device.
        asked: EMBEDDINGS, LM_HEAD or both.

    Returns:
        The weights.

    Raises:
        OptionError: If the model does not have what is asked for.
    """
    ends = {EMBEDDINGS: _input_embedding(model), LM_HEAD: _head(model)}
    found: dict[tuple[str, ...], TokenWeight] = {}
    for option in sorted(asked):
        path = ends[option]
        if path is None:
            raise OptionError(
                f"{option}: {type(model).__name__} has no {_WHAT[option]}; leave out {option}"
            )
        paths = tied_modules(model, path)
        uses = tuple(use for use, end in ends.items() if end in paths)
        modules = {path: model.get_submodule(path) for path in paths}
        rows, columns = model.get_parameter(path + INDEX_MAP_SUFFIX).shape
        weight = LinearWeight(int(rows), int(columns))
        found[paths] = TokenWeight(paths, uses, weight, _reason(model, modules))
    return list(found.values())


def tied_modules(model: nn.Module, path: str) -> tuple[str, ...]:
    """Return the modules whose weight is that of a module, itself included.

    Args:
        model: The model, whose weights may be on the meta device, tied already or not.
        path: Path of the module.

    Returns:
        The paths, in the order of the model.
    """
    name = path + INDEX_MAP_SUFFIX
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})  # not in all remote code
    source = pairs.get(name, name)
    tied = {name, source, *(target for target, other in pairs.items() if other == source)}
    own = model.get_parameter(name)
    return tuple(
        other.removesuffix(INDEX_MAP_SUFFIX)
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if other in tied or parameter is own
    )


def _reason(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> str | None:
    """Return why a weight of these modules cannot be sketched, None if it can."""
    for path, module in modules.items():
        if isinstance(module, nn.Embedding):
            finish = find_finish(module)
            if isinstance(finish, str):
                return finish
        elif type(module) is not nn.Linear:
            return f"{path} is neither an embedding nor a linear layer but {type(module).__name__}"
    read = read_weights(model, [path + INDEX_MAP_SUFFIX for path in modules])
    for function in read.values():
        return f"the model's code reads its weight ({function})"
    return None


def _input_embedding(model: Any) -> str | None:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    # Models of images give their first convolution.
    return _path(model, found) if isinstance(found, nn.Embedding) else None


def _head(model: Any) -> str | None:
    try:
        found = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return None if getattr(found, "weight", None) is None else _path(model, found)


def _path(model: nn.Module, module: nn.Module) -> str | None:
    return next((path for path, other in model.named_modules() if other is module), None)
