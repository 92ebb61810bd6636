"""Sketch one linear layer: choose the index map and tables with the least error on its inputs.

X are the inputs of the layer in the sketched model, Z those in the dense model. If a sketched row q
replaces the row w, the loss is ||X q - Z w||^2. Up to a constant this is (q - t) H (q - t)^T, with
H = X^T X and the target t = w + H^-1 (X^T Z - H) w. If X and Z are equal, t is w itself. So a layer
corrects part of the error of earlier layers. GPTAQ (arXiv 2504.02692) has the same aim.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spallm_convert.sketch.limits import Limit
from spallm_convert.sketch.rows import SketchedRows, store_rows
from spallm_formats import SketchedModule, SketchMetadata
from spallm_kernels import hash_codes, hash_table
from spallm_kernels.cpu.calibrated import SWEEPS

from .backends import Numerics, choose_numerics

#: Damping that is added to the Hessian's diagonal, as a multiple of the diagonal's mean. GPTQ uses
#: 0.01, LeanQuant 0.1.
DAMPING = 0.03

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Matrices that layers with the same inputs share, made once by `prepare_inputs`.

    All tensors are on one device.

    Attributes:
        hessian: X^T X, float64 [n, n].
        damped: The damped Hessian, prepared for `numerics`.
        change: H^-1 (X^T Z - H), float64 [n, n]. None without correction.
        numerics: The functions that compute sketches on this device.
    """

    hessian: Tensor
    damped: Any
    change: Tensor | None
    numerics: Numerics


def prepare_inputs(
    hessian: Tensor,
    cross: Tensor | None,
    without: Collection[str] = (),
    fitted: Tensor | None = None,
) -> LayerInputs:
    """Prepare the matrices that layers with the same inputs share.

    Args:
        hessian: X^T X, float64 [n, n].
        cross: X^T Z, float64 [n, n]. None: there is no correction.
        without: Steps of `STEPS` to leave out.
        fitted: The matrix to fit sketches to in place of `hessian`, which errors are measured with,
            float64 [n, n].

    Raises:
        ValueError: The damped Hessian cannot be factored.
    """
    numerics = choose_numerics(hessian.device)
    damped = numerics.prepare_hessian(hessian if fitted is None else fitted, DAMPING)
    change = None
    if cross is not None and "correction" not in without:
        change = torch.linalg.solve(torch.as_tensor(damped.full), cross - hessian)
    return LayerInputs(hessian, damped, change, numerics)


def fit_options(without: Collection[str]) -> dict[str, Any]:
    """Return the keyword arguments of `Numerics.fit` that leave out some steps of `STEPS`."""
    return {
        "compensation": "compensation" not in without,
        "refit": "least-squares" not in without,
        "sweeps": 0 if "descent" in without else SWEEPS,
    }


@dataclass(frozen=True)
class SketchedLayer:
    """Rows of a linear layer after sketching.

    Attributes:
        rows: Index map and tables, as they are stored.
        dense: The weights that they stand for, float32 [out_features, in_features].
        output_sums: Squared error of the outputs on the layer's inputs, and their squared norm.
    """

    rows: SketchedRows
    dense: Tensor
    output_sums: tuple[float, float]


def sketch_layer(
    weights: Tensor,
    inputs: LayerInputs,
    module: SketchedModule,
    metadata: SketchMetadata,
    without: Collection[str] = (),
    limit: Limit | None = None,
    first_row: int = 0,
) -> SketchedLayer:
    """Sketch a layer, or some of its rows.

    Args:
        weights: The dense weights, float32 [rows, in_features], on the device of `inputs`.
        inputs: Matrices of the layer's inputs.
        module: Shape, bits and groups.
        metadata: Mapping, seed and table dtype.
        without: Steps of `STEPS` to leave out.
        limit: Limit of the dtype that the model loads in.
        first_row: Number of the first row in the layer, or in its expert.

    Raises:
        OverflowError: A value of a table is too large for the stored dtype, or weights are beyond
            the limit.
        ValueError: Weights are not finite, or the error of the outputs is not.
    """
    numerics, target = inputs.numerics, weights
    if inputs.change is not None:
        wide = weights.double()
        target = (wide + wide @ inputs.change.T).float()
    sweeps = 0
    if metadata.mapping == "hash":
        table, codes = _fit_hashed(target, inputs, module, metadata.hash_seed, without, first_row)
    else:
        how = fit_options(without)
        sweeps = how["sweeps"]
        table, codes, _ = numerics.fit(
            target, inputs.damped, module.groups_per_row, module.entries, **how
        )

    def choose(stored: Singles) -> npt.NDArray[np.uint8]:
        nonlocal codes
        if sweeps:  # adapt codes to the rounded entries
            rounded = torch.from_numpy(stored).to(target.device)
            codes = numerics.descend(target, rounded, codes, inputs.damped, sweeps)
        return codes.cpu().numpy()

    arrays = weights.cpu().numpy(), table.cpu().numpy()
    rows = store_rows(*arrays, choose, module, metadata, first_row, limit)
    dense = numerics.look_up(torch.from_numpy(rows.rounded).to(weights.device), codes)
    error, norm = (
        float(numerics.quadratic_loss(weights, other, inputs.hessian).sum())
        for other in (dense, torch.zeros_like(weights))
    )
    if not (math.isfinite(error) and math.isfinite(norm)):
        raise ValueError("its outputs are too large for the error to be computed")
    return SketchedLayer(rows, dense, (error, norm))


def _fit_hashed(
    target: Tensor,
    inputs: LayerInputs,
    module: SketchedModule,
    seed: int,
    without: Collection[str],
    first_row: int,
) -> tuple[Tensor, Tensor]:
    """Return tables (float32) by least squares for the codes (uint8) of the hash mapping."""
    if not bool(target.isfinite().all()):
        raise ValueError("weights must be finite, found NaN or infinite values")
    rows, columns = target.shape
    groups, bits = module.groups_per_row, module.bits
    means = hash_table(target.cpu().numpy(), groups, bits, seed, first_row)
    table = torch.from_numpy(means).float().to(target.device)
    codes = torch.from_numpy(hash_codes(rows, columns, bits, seed, first_row)).to(target.device)
    if "least-squares" in without:
        return table, codes
    solved, renamed = inputs.numerics.least_squares(target, table, codes, inputs.damped)
    # Entries come back sorted and codes renumbered, so put each entry back in its own place.
    names = torch.arange(module.entries, device=target.device).repeat(rows, groups, 1)
    own, new = (c.reshape(rows, groups, -1).long() for c in (codes, renamed))
    return solved.gather(2, names.scatter(2, own, new)), codes
