"""What calibration tells about a layer's columns, made ready for choosing codes.

The loss of a row of weights w that becomes q is (q - w) H (q - w)^T with H = X^T X. For a Cholesky
factor H = R R^T, R upper triangular, it is the sum over columns i of

    R_ii^2 (q_i - w_i + sum over k < i of F_ki (q_k - w_k))^2        F_ki = R_ki / R_ii

so that columns can be chosen one after the other, each knowing what those before it left behind.
That is GPTQ (arXiv 2210.17323) without the inverse: GPTQ's upper factor U of H^-1 = U^T U is R^-1,
its compensated weight of column i is w_i - sum of F_ki (q_k - w_k), and its U_ii is 1 / R_ii.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

#: Rows that are checked at a time, so that the check takes no memory to speak of.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """A damped Hessian and its Cholesky factor; made by `prepare_hessian`.

    full: float64 [n, n], damped; single: the same in float32. order: int64 [n], the columns in the
    order of choice. pivots: float64 [n], R_ii of each column, not in that order. factor: float32
    [n, n], F in that order, zero on and below the diagonal.
    """

    full: Floats
    single: Singles
    order: npt.NDArray[np.int64]
    pivots: Floats
    factor: Singles

    @property
    def columns(self) -> int:
        return len(self.order)


def prepare_hessian(hessian: npt.NDArray[np.floating], damping: float) -> PreparedHessian:
    """Damps H, orders its columns and factors it.

    hessian: float [n, n], X^T X of the layer's inputs; symmetric, positive semidefinite. `damping`
    times the mean of its diagonal is added to the diagonal. A column of zeros (an input that never
    was active) is left with that alone: nothing depends on it, and its weights get the nearest
    entry. Where all columns are zero, H is the identity. Columns are ordered by descending
    diagonal, equal ones as they are. Raises ValueError for a matrix that is not square, finite or
    symmetric, and where the damped matrix is not positive definite in float64.
    """
    full = np.array(hessian, np.float64)
    if full.ndim != 2 or full.shape[0] != full.shape[1] or full.size == 0:
        raise ValueError(f"a Hessian must be [n, n], found {list(full.shape)}")
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be finite and above 0, found {damping}")
    if not np.isfinite(full).all():
        raise ValueError("a Hessian must be finite")
    diagonal = full.diagonal().copy()
    if (diagonal < 0).any():
        raise ValueError(f"a Hessian's diagonal must not be negative, found {diagonal.min()}")
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(full), _BLOCK)]
    asymmetry = max(np.abs(full[rows] - full.T[rows]).max() for rows in blocks)
    if asymmetry > 1e-3 * diagonal.max():
        raise ValueError(f"a Hessian must be symmetric, found entries that differ by {asymmetry}")
    full[np.diag_indices_from(full)] += damping * diagonal.mean() if diagonal.any() else 1.0
    order = np.argsort(-full.diagonal(), kind="stable")
    try:
        upper = _upper_factor(full[np.ix_(order, order)])
    except np.linalg.LinAlgError:
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}: use more"
        ) from None
    pivots = np.empty_like(diagonal)
    pivots[order] = upper.diagonal()
    upper /= upper.diagonal().copy()
    np.fill_diagonal(upper, 0)
    return PreparedHessian(full, full.astype(np.float32), order, pivots, upper.astype(np.float32))


def importance(hessian: PreparedHessian, power: float | None) -> Singles:
    """Weights of the columns for clustering, float32 [1, n], the greatest 1.

    The pivots R_ii to a power, which are LeanQuant's diag(chol(H^-1))^-power (arXiv 2407.10032), or
    the diagonal of H where power is None.
    """
    values = hessian.full.diagonal() if power is None else hessian.pivots
    relative = (values / values.max()) ** (1.0 if power is None else power)
    return relative.astype(np.float32)[None]


def _upper_factor(matrix: Floats) -> Floats:
    """R, upper triangular, with matrix = R R^T: the factor of the reversed matrix, reversed."""
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    return np.array(lower[::-1, ::-1], np.float64, order="C")
