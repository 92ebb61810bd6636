"""Fit a model to a sketched embedding or head: tied weights, sizes, and the dtype of the model.

Tied modules have one index map and one table. The module that the checkpoint stores owns them, and
every list of sketched layers names that module only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spallm_convert.errors import OptionError
from spallm_convert.source.embeddings import tied_modules
from spallm_formats import INDEX_MAP_SUFFIX, TABLE_ENDING, TABLE_SUFFIX

from .embedding import SketchedEmbedding
from .sketch import Sketched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESIZING = ("_get_resized_embeddings", "_get_resized_lm_head")


def tie_sketches(
    model: PreTrainedModel, sketched: Mapping[str, Any], replace: Callable[[str, str], Any]
) -> None:
    """Sketch the modules that are tied to sketched ones, and let transformers tie their tables.

    If several tied modules are stored, each keeps its own weight.

    Args:
        model: The model. Its sketched modules are in place.
        sketched: The sketched modules that the checkpoint stores, by path.
        replace: Function of a path and the path of a sketched module; puts a sketch of the same
            shape in place of the module at the first path, and returns it.
    """
    done = set(sketched)
    for path, owner in sketched.items():
        for other in tied_modules(model, path):
            if other not in done:
                done.add(other)
                made = replace(other, path)
                made.weight, made.weight_table = owner.weight, owner.weight_table
                made.is_tied = True
    for part in _parts(model):
        _tie_tables(part)


def tied_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of sketches that another module owns."""
    return {
        name
        for path, module in model.named_modules()
        if isinstance(module, Sketched) and module.is_tied
        for name in (path + INDEX_MAP_SUFFIX, path + TABLE_SUFFIX)
    }


def fit_model(model: PreTrainedModel) -> None:
    """Make methods of a loaded model right that read or write the weights of its embedding or head.

    `resize_token_embeddings` raises a clear error. `dtype` is the dtype of the activations, not
    that of the tables, and so `save_pretrained` writes it to the config.
    """
    has_embedding = any(isinstance(module, SketchedEmbedding) for module in model.modules())
    if not has_embedding and not hasattr(_head(model), "weight_table"):
        return
    for part in _parts(model):
        for name in _RESIZING:
            setattr(part, name, _keep_size)
        # A property cannot belong to one object. For other models of the class, nothing changes.
        type(part).dtype = property(_dtype)  # type: ignore[method-assign, assignment]


def unfit_model(model: nn.Module) -> None:
    """Undo what `tie_sketches` and `fit_model` did to a model that becomes dense."""
    for part in _parts(model):
        for name in _RESIZING:
            vars(part).pop(name, None)
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            pairs = vars(part).get(name)
            if pairs:
                kept = {key: v for key, v in pairs.items() if not key.endswith(TABLE_SUFFIX)}
                setattr(part, name, kept)


def _tie_tables(part: Any) -> None:
    """Change the pairs of parameters that transformers ties: add tables, leave out what is stored.

    transformers reads `all_tied_weights_keys` while loading, and `_tied_weights_keys` in
    `tie_weights`.
    """
    pairs: dict[str, str] = getattr(part, "all_tied_weights_keys", None) or {}
    changed: dict[str, str] = {}
    for target, source in pairs.items():
        ends = [_owner(part, name) for name in (target, source)]
        if not all(hasattr(end, "weight_table") for end in ends):
            changed[target] = source
        elif any(end.is_tied for end in ends):
            changed[target] = source
            changed[target + TABLE_ENDING] = source + TABLE_ENDING
    if changed != pairs:
        part.all_tied_weights_keys = changed
        part._tied_weights_keys = dict(changed)


def _owner(part: nn.Module, parameter: str) -> Any:
    """Return the module with a weight, None for any other parameter."""
    if not parameter.endswith(INDEX_MAP_SUFFIX):
        return None
    return part.get_submodule(parameter.removesuffix(INDEX_MAP_SUFFIX))


def _parts(model: nn.Module) -> Iterator[PreTrainedModel]:
    from transformers import PreTrainedModel  # it imports the quantizer, which imports this module

    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _keep_size(old: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """Return an embedding or head as it is; raise OptionError if it should get another size."""
    rows = len(old.weight)
    multiple = options.get("pad_to_multiple_of") or (args[0] if args else None)
    wanted = rows if new_num_tokens is None else new_num_tokens
    if type(multiple) is int:
        wanted = -(-wanted // multiple) * multiple
    if wanted == rows:
        return old
    raise OptionError(
        f"the embedding of {rows} tokens cannot be resized to {wanted}: it is sketched; resize the "
        f"dense model and convert that, or convert without --embeddings and --lm-head"
    )


def _dtype(self: nn.Module) -> torch.dtype:
    """Return the dtype of the first float parameter; an embedding counts with that of its rows."""
    for module in self.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                found: torch.dtype = getattr(module, "row_dtype", parameter.dtype)
                return found
    raise StopIteration("the model has no parameters of floats")
