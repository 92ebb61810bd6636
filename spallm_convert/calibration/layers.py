"""One linear layer sketched for its inputs: the index map and tables that lose least on them.

With X the inputs that the layer has in the sketched model and Z those in the dense one, a row q in
the place of w loses ||X q - Z w||^2. Up to a constant that is (q - t) H (q - t)^T with H = X^T X
and the target t = w + H^-1 (X^T Z - H) w, which is w itself where X and Z are the same. So a layer
makes up for some of what the layers before it have lost (the aim of GPTAQ, arXiv 2504.02692, too).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spallm_convert.sketch import SketchedRows, store_rows
from spallm_formats import SketchedModule, SketchMetadata
from spallm_kernels import PreparedHessian, descend, fit, look_up, prepare_hessian, quadratic_loss

#: Of the mean of the Hessian's diagonal, added to it. GPTQ takes 0.01, LeanQuant 0.1.
DAMPING = 0.03

_SWEEPS = 3

Singles = npt.NDArray[np.float32]


@dataclass
class InputSums:
    """What is kept of the inputs X and Z of a layer, float64 [n, n]: X^T X and X^T Z."""

    hessian: npt.NDArray[np.float64]
    cross: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SketchedLayer:
    """rows: what is stored; dense: float32 [out_features, in_features], the weights that it stands
    for; output_sums: squared error of the outputs on the layer's inputs, and their squared norm."""

    rows: SketchedRows
    dense: Singles
    output_sums: tuple[float, float]


def sketch_layer(
    weights: Singles,
    sums: InputSums,
    module: SketchedModule,
    metadata: SketchMetadata,
    without: Collection[str] = (),
) -> SketchedLayer:
    """Sketches a whole layer: weights, float32 [out_features, in_features].

    without: of `SketchConfig.without`, the steps to leave out. Raises OverflowError for tables that
    are not in their stored dtype, ValueError for sums that are not finite.
    """
    hessian = prepare_hessian(sums.hessian, DAMPING)
    target = weights if "correction" in without else _target(weights, sums, hessian)
    sweeps = 0 if "descent" in without else _SWEEPS
    fitted = fit(
        target,
        hessian,
        module.groups_per_row,
        module.entries,
        compensation="compensation" not in without,
        refit="least-squares" not in without,
        sweeps=sweeps,
    )
    codes = fitted.codes

    def choose(stored: Singles) -> npt.NDArray[np.uint8]:
        nonlocal codes
        if sweeps:  # for the entries as they have been rounded
            codes = descend(target, stored, codes, hessian, sweeps)
        return codes

    rows = store_rows(weights, fitted.table, choose, module, metadata)
    dense = look_up(rows.rounded, codes)
    error, norm = (
        float(quadratic_loss(weights, other, hessian.full).sum())
        for other in (dense, np.zeros_like(weights))
    )
    return SketchedLayer(rows, dense, (error, norm))


def _target(weights: Singles, sums: InputSums, hessian: PreparedHessian) -> Singles:
    change: Any = np.linalg.solve(hessian.full, sums.cross - sums.hessian)
    target: Singles = (weights + weights @ change.T).astype(np.float32)
    return target
