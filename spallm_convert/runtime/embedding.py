"""Define `SketchedEmbedding`, an embedding whose weight is an index map and trainable tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spallm_convert.errors import FormatError
from spallm_convert.source.lookups import NORM, Finish, find_finish, finished
from spallm_formats import row_bytes

from .sketch import Sketch, Sketched, tables_in_use

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


class SketchedEmbedding(Sketched, FinishedEmbedding):
    """Look up rows of W[o, i] = weight_table[o, i // (columns / groups), code[o, i]].

    The class is a subclass of nn.Embedding, so code that looks for embeddings finds it. Only the
    rows of the given ids are decoded. The constructor leaves the index map and the tables
    uninitialized: loading a checkpoint fills them.

    Args:
        sketch: The sketch of the weight.
        dense: The embedding that it replaces.
        table_dtype: Dtype of the tables.

    Attributes:
        weight: The index map, packed codes, uint8 [num_embeddings, row_bytes], frozen. With
            `hash_seed`: uint8 [num_embeddings, 0].
        weight_table: The tables, float [num_embeddings, groups_per_row, 2^bits], trainable.
        row_dtype: Dtype of the rows, that of the weight that the model was made for.
    """

    weight_table: nn.Parameter

    def __init__(self, sketch: Sketch, dense: nn.Embedding, table_dtype: torch.dtype) -> None:
        finish = find_finish(dense)
        if isinstance(finish, str):
            name = sketch.spans[0].name
            raise FormatError(
                f"module {name!r} is sketched, but this version cannot load it: {finish}"
            )
        shape, device = sketch.shape, dense.weight.device
        packed = 0 if sketch.hash_seed is not None else row_bytes(shape.in_features, shape.bits)
        index_map = torch.empty(shape.out_features, packed, dtype=torch.uint8, device=device)
        super().__init__(dense, finish, nn.Parameter(index_map, requires_grad=False))
        self.weight_table = nn.Parameter(
            torch.empty(shape.table_shape, dtype=table_dtype, device=device)
        )
        self.sketches = {"weight": sketch}
        # Tables may be wider, for training. Layers behind it expect the dtype of the model.
        self.row_dtype = dense.weight.dtype
        # Without this, transformers fills parameters that are offloaded to disk with random bytes.
        self._is_hf_initialized = True

    def reset_parameters(self) -> None:
        """Do nothing: a sketch comes from a checkpoint and has no random initial state."""

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, differentiable in the tables except those of `padding_idx`."""
        tables = tables_in_use(self, "weight")
        rows = self.sketches["weight"].rows(ids, self.weight, tables)
        if self.padding_idx is not None and rows.requires_grad:
            rows = rows.where((ids != self.padding_idx)[..., None], rows.detach())
        return rows.to(self.row_dtype)

    def dense_weight(self) -> Tensor:
        """Return the dense weight, [num_embeddings, columns], in the dtype of the tables."""
        return self.sketches["weight"].dense_weight(self.weight, tables_in_use(self, "weight"))

    def dense(self, weight: nn.Parameter) -> FinishedEmbedding:
        """Return the same embedding with a dense weight, [num_embeddings, embedding_dim]."""
        return FinishedEmbedding(self, self.finish, weight)

    def extra_repr(self) -> str:
        sketch = self.sketches["weight"]
        shape, mapping = sketch.shape, "cluster" if sketch.hash_seed is None else "hash"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, "
            f"bits={shape.bits}, groups_per_row={shape.groups_per_row}, mapping={mapping}"
        )
