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
import torch
from torch import Tensor

from spallm_convert.sketch.rows import SketchedRows, store_rows
from spallm_formats import SketchedModule, SketchMetadata
from spallm_kernels import hash_codes, hash_table
from spallm_kernels.cpu.calibrated import SWEEPS

from .backends import Numerics, choose_numerics

#: Of the mean of the Hessian's diagonal, added to it. GPTQ takes 0.01, LeanQuant 0.1.
DAMPING = 0.03

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What layers with the same inputs X and Z need of them, made once by `prepare_inputs`.

    hessian: float64 [n, n], X^T X; damped: the same made ready for `numerics`; change: float64
    [n, n], H^-1 (X^T Z - H), None without correction. All on one device.
    """

    hessian: Tensor
    damped: Any
    change: Tensor | None
    numerics: Numerics


def prepare_inputs(hessian: Tensor, cross: Tensor, without: Collection[str] = ()) -> LayerInputs:
    """From X^T X and X^T Z, float64 [n, n] each. Raises ValueError when H cannot be factored."""
    numerics = choose_numerics(hessian.device)
    damped = numerics.prepare_hessian(hessian, DAMPING)
    change = None
    if "correction" not in without:
        change = torch.linalg.solve(torch.as_tensor(damped.full), cross - hessian)
    return LayerInputs(hessian, damped, change, numerics)


def fit_options(without: Collection[str]) -> dict[str, Any]:
    """What `Numerics.fit` is asked for when some steps are left out."""
    return {
        "compensation": "compensation" not in without,
        "refit": "least-squares" not in without,
        "sweeps": 0 if "descent" in without else SWEEPS,
    }


@dataclass(frozen=True)
class SketchedLayer:
    """rows: what is stored; dense: float32 [out_features, in_features], the weights that it stands
    for; output_sums: squared error of the outputs on the layer's inputs, and their squared norm."""

    rows: SketchedRows
    dense: Tensor
    output_sums: tuple[float, float]


def sketch_layer(
    weights: Tensor,
    inputs: LayerInputs,
    module: SketchedModule,
    metadata: SketchMetadata,
    without: Collection[str] = (),
) -> SketchedLayer:
    """Sketches a whole layer: weights, float32 [out_features, in_features], where its inputs are.

    without: of `SketchConfig.without`, the steps to leave out. Raises OverflowError for tables that
    are not in their stored dtype, ValueError for weights that are not finite.
    """
    numerics, target = inputs.numerics, weights
    if inputs.change is not None:
        wide = weights.double()
        target = (wide + wide @ inputs.change.T).float()
    sweeps = 0
    if metadata.mapping == "hash":
        table, codes = _fit_hashed(target, inputs, module, metadata.hash_seed, without)
    else:
        how = fit_options(without)
        sweeps = how["sweeps"]
        table, codes, _ = numerics.fit(
            target, inputs.damped, module.groups_per_row, module.entries, **how
        )

    def choose(stored: Singles) -> npt.NDArray[np.uint8]:
        nonlocal codes
        if sweeps:  # for the entries as they have been rounded
            rounded = torch.from_numpy(stored).to(target.device)
            codes = numerics.descend(target, rounded, codes, inputs.damped, sweeps)
        return codes.cpu().numpy()

    rows = store_rows(weights.cpu().numpy(), table.cpu().numpy(), choose, module, metadata)
    dense = numerics.look_up(torch.from_numpy(rows.rounded).to(weights.device), codes)
    error, norm = (
        float(numerics.quadratic_loss(weights, other, inputs.hessian).sum())
        for other in (dense, torch.zeros_like(weights))
    )
    return SketchedLayer(rows, dense, (error, norm))


def _fit_hashed(
    target: Tensor,
    inputs: LayerInputs,
    module: SketchedModule,
    seed: int,
    without: Collection[str],
) -> tuple[Tensor, Tensor]:
    """Tables, float32, by least squares for codes, uint8, that are computed and stay."""
    if not bool(target.isfinite().all()):
        raise ValueError("weights must be finite")
    rows, columns = target.shape
    groups, bits = module.groups_per_row, module.bits
    means = hash_table(target.cpu().numpy(), groups, bits, seed)
    table = torch.from_numpy(means).float().to(target.device)
    codes = torch.from_numpy(hash_codes(rows, columns, bits, seed)).to(target.device)
    if "least-squares" in without:
        return table, codes
    solved, renamed = inputs.numerics.least_squares(target, table, codes, inputs.damped)
    # Entries come back sorted, and codes with other names: each entry back to its own place.
    names = torch.arange(module.entries, device=target.device).repeat(rows, groups, 1)
    own, new = (c.reshape(rows, groups, -1).long() for c in (codes, renamed))
    return solved.gather(2, names.scatter(2, own, new)), codes
