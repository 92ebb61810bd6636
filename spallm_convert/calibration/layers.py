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
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What layers with the same inputs X and Z need of them, made once by `prepare_inputs`.

    hessian: float64 [n, n], X^T X; damped: the same made ready for `fit`; change: float64 [n, n],
    H^-1 (X^T Z - H), None without correction.
    """

    hessian: Doubles
    damped: PreparedHessian
    change: Doubles | None


def prepare_inputs(hessian: Doubles, cross: Doubles, without: Collection[str] = ()) -> LayerInputs:
    """From X^T X and X^T Z, float64 [n, n] each. Raises ValueError when H cannot be factored."""
    damped = prepare_hessian(hessian, DAMPING)
    change: Any = None
    if "correction" not in without:
        change = np.linalg.solve(damped.full, cross - hessian)
    return LayerInputs(hessian, damped, change)


@dataclass(frozen=True)
class SketchedLayer:
    """rows: what is stored; dense: float32 [out_features, in_features], the weights that it stands
    for; output_sums: squared error of the outputs on the layer's inputs, and their squared norm."""

    rows: SketchedRows
    dense: Singles
    output_sums: tuple[float, float]


def sketch_layer(
    weights: Singles,
    inputs: LayerInputs,
    module: SketchedModule,
    metadata: SketchMetadata,
    without: Collection[str] = (),
) -> SketchedLayer:
    """Sketches a whole layer: weights, float32 [out_features, in_features].

    without: of `SketchConfig.without`, the steps to leave out. Raises OverflowError for tables that
    are not in their stored dtype, ValueError for weights that are not finite.
    """
    target = weights
    if inputs.change is not None:
        target = (weights + weights @ inputs.change.T).astype(np.float32)
    sweeps = 0 if "descent" in without else _SWEEPS
    fitted = fit(
        target,
        inputs.damped,
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
            codes = descend(target, stored, codes, inputs.damped, sweeps)
        return codes

    rows = store_rows(weights, fitted.table, choose, module, metadata)
    dense = look_up(rows.rounded, codes)
    error, norm = (
        float(quadratic_loss(weights, other, inputs.hessian).sum())
        for other in (dense, np.zeros_like(weights))
    )
    return SketchedLayer(rows, dense, (error, norm))
