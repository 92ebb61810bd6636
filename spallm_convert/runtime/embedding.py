"""Define `SketchedEmbedding`, and tie sketched embeddings and heads as the model ties dense ones.

Tied modules have one index map and one table. The module that the checkpoint stores owns them, and
every list of sketched layers names that module only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spallm_convert.errors import FormatError, OptionError
from spallm_convert.source.embeddings import tied_modules
from spallm_convert.source.lookups import NORM, Finish, find_finish, finished
from spallm_formats import INDEX_MAP_SUFFIX, TABLE_ENDING, TABLE_SUFFIX, SketchedModule, row_bytes
from spallm_kernels.embedding import lut_embedding
from spallm_kernels.linear import dequantize

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class FinishedEmbedding(nn.Embedding):
    """Look rows up, and do with them what the model's own class does.

    Args:
        dense: The embedding of the model. Its sizes, padding index and norm are taken over.
        finish: What its class does with rows.
        weight: The weight, [num_embeddings, embedding_dim] unless a subclass looks rows up.
    """

    def __init__(self, dense: nn.Embedding, finish: Finish, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = dense.padding_idx, None, dense.norm_type
        self.scale_grad_by_freq = self.sparse = False
        self.finish = finish
        self.factors = {dtype: finish.factor(dtype) for dtype in _DTYPES}
        self.weight = weight
        if finish.is_normed:
            self.add_module(NORM, dense.get_submodule(NORM))

    def forward(self, input: Tensor) -> Tensor:
        """Return a row for each id, float [..., embedding_dim].

        Args:
            input: Ids of tokens, int64 or int32 [...].
        """
        norm = getattr(self, NORM) if self.finish.is_normed else None
        return finished(self.rows(input), self.finish, norm, self.factors)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids as the weight has them."""
        return super().forward(ids)


class SketchedEmbedding(FinishedEmbedding):
    """Look up rows of W[o, i] = weight_table[o, i // (columns / groups), code[o, i]].

    The class is a subclass of nn.Embedding, so code that looks for embeddings finds it. Only the
    rows of the given ids are decoded. The constructor leaves the index map and the tables
    uninitialized: loading a checkpoint fills them.

    Args:
        shape: Shape of the weight, bits per code, and groups per row.
        dense: The embedding that it replaces.
        table_dtype: Dtype of the tables.
        hash_seed: Seed of the mapping `hash`, whose codes are computed. None: codes are stored.
        stored_name: Name of the module in the checkpoint. None: its path in the model.

    Attributes:
        weight: The index map, packed codes, uint8 [num_embeddings, row_bytes], frozen. With
            `hash_seed`: uint8 [num_embeddings, 0].
        weight_table: The tables, float [num_embeddings, groups_per_row, 2^bits], trainable.
        is_tied: Whether another module owns the parameters and gives them their stored name.
    """

    weight_table: nn.Parameter
    is_tied = False

    def __init__(
        self,
        shape: SketchedModule,
        dense: nn.Embedding,
        *,
        table_dtype: torch.dtype,
        hash_seed: int | None = None,
        stored_name: str | None = None,
    ) -> None:
        finish = find_finish(dense)
        if isinstance(finish, str):
            name = stored_name or type(dense).__name__
            raise FormatError(
                f"module {name!r} is sketched, but this version cannot load it: {finish}"
            )
        device = dense.weight.device
        packed = 0 if hash_seed is not None else row_bytes(shape.in_features, shape.bits)
        index_map = torch.empty(shape.out_features, packed, dtype=torch.uint8, device=device)
        super().__init__(dense, finish, nn.Parameter(index_map, requires_grad=False))
        self.weight_table = nn.Parameter(
            torch.empty(shape.table_shape, dtype=table_dtype, device=device)
        )
        self.shape = shape
        self.stored_name = stored_name
        self.hash_seed = hash_seed
        # Tables may be wider. The output has the dtype of the weight that the model was made for.
        self.row_dtype = dense.weight.dtype
        # Without this, transformers fills parameters that are offloaded to disk with random bytes.
        self._is_hf_initialized = True

    def reset_parameters(self) -> None:
        """Do nothing: a sketch comes from a checkpoint and has no random initial state."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, differentiable in the tables except those of `padding_idx`."""
        index_map: Tensor = self.weight
        if index_map.dtype != torch.uint8:
            # FSDP2 of torch 2.9 casts every tensor that it gathers. Floats represent bytes exactly.
            index_map = index_map.to(torch.uint8)
        rows = lut_embedding(
            ids, index_map, self.weight_table, self.embedding_dim, hash_seed=self.hash_seed
        )
        if self.padding_idx is not None and rows.requires_grad:
            rows = rows.where((ids != self.padding_idx)[..., None], rows.detach())
        return rows.to(self.row_dtype)

    def dense_weight(self) -> Tensor:
        """Return the dense weight, [num_embeddings, columns], in the dtype of the tables."""
        return dequantize(
            self.weight, self.weight_table, self.embedding_dim, hash_seed=self.hash_seed
        )

    def dense(self, weight: nn.Parameter) -> FinishedEmbedding:
        """Return the same embedding with a dense weight, [num_embeddings, embedding_dim]."""
        return FinishedEmbedding(self, self.finish, weight)

    def extra_repr(self) -> str:
        mapping = "cluster" if self.hash_seed is None else "hash"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, "
            f"bits={self.shape.bits}, groups_per_row={self.shape.groups_per_row}, mapping={mapping}"
        )


def tie_sketches(
    model: PreTrainedModel, sketched: Mapping[str, Any], replace: Callable[[str, str], Any]
) -> None:
    """Sketch the modules that are tied to sketched ones, and let transformers tie their tables.

    If several tied modules are stored, transformers decides whether to tie them, as for dense ones.

    Args:
        model: The model. Its sketched modules are in place.
        sketched: The sketched modules that the checkpoint stores, by path.
        replace: Function of a path and the path of a sketched module; puts a sketch of the same
            shape in place of the module at the first path, and returns it.
    """
    for path, owner in sketched.items():
        for other in tied_modules(model, path):
            if other not in sketched:
                made = replace(other, path)
                made.weight, made.weight_table = owner.weight, owner.weight_table
                made.is_tied = True
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _tie_tables(module)


def refuse_resizing(model: PreTrainedModel) -> None:
    """Make `resize_token_embeddings` raise a clear error if the embedding or head is sketched."""
    sketched = any(isinstance(module, SketchedEmbedding) for module in model.modules())
    if not sketched and not hasattr(model.get_output_embeddings(), "weight_table"):
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._get_resized_embeddings = _keep_size  # type: ignore[assignment]
            module._get_resized_lm_head = _keep_size  # type: ignore[assignment]


def allow_resizing(model: PreTrainedModel) -> None:
    """Undo `refuse_resizing` and the ties of tables, on a model that becomes dense."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for name in ("_get_resized_embeddings", "_get_resized_lm_head"):
                vars(module).pop(name, None)
            for name in ("_tied_weights_keys", "all_tied_weights_keys"):
                if name in vars(module):
                    pairs = vars(module)[name].items()
                    vars(module)[name] = {k: v for k, v in pairs if not k.endswith(TABLE_SUFFIX)}


def _keep_size(old: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
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


def _tie_tables(model: Any) -> None:
    """Add the tables of tied sketches to the pairs of parameters that transformers ties."""
    pairs: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tables = {
        target + TABLE_ENDING: source + TABLE_ENDING
        for target, source in pairs.items()
        if target.endswith(INDEX_MAP_SUFFIX) and _has_tables(model, target, source)
    }
    if tables:
        pairs.update(tables)
        # transformers reads this attribute again in `tie_weights`.
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tables}


def _has_tables(model: nn.Module, *parameters: str) -> bool:
    owners = (model.get_submodule(name.removesuffix(INDEX_MAP_SUFFIX)) for name in parameters)
    return all(hasattr(owner, "weight_table") for owner in owners)
