"""Prepare a layer's Hessian, which calibration has summed, for choosing codes.

The loss of a row of weights w that becomes q is (q - w) H (q - w)^T with H = X^T X. For a Cholesky
factor H = R R^T, R upper triangular, it is the sum over columns i of

    R_ii^2 (q_i - w_i + sum over k < i of F_ki (q_k - w_k))^2        F_ki = R_ki / R_ii

So columns can be chosen one after another, each compensating the errors of the columns before it.
This is GPTQ (arXiv 2210.17323) without the inverse: GPTQ's upper factor U of H^-1 = U^T U is R^-1,
its compensated weight of column i is w_i - sum of F_ki (q_k - w_k), and its U_ii is 1 / R_ii.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

#: Rows that the symmetry check reads at a time, so that it needs little memory.
_BLOCK = 256


@dataclass(frozen=True, eq=False)
class PreparedHessian:
    """Hold a damped Hessian and its Cholesky factor; `prepare_hessian` makes it.

    Attributes:
        full: The damped Hessian, float64 [n, n].
        single: The same in float32.
        order: The columns in the order of choice, int64 [n].
        pivots: R_ii of each column, float64 [n], in the layer's order of columns.
        factor: F in the order of choice, float32 [n, n], zero on and below the diagonal.
    """

    full: Floats
    single: Singles
    order: npt.NDArray[np.int64]
    pivots: Floats
    factor: Singles

    @property
    def columns(self) -> int:
        """Return the number of columns, n."""
        return len(self.order)


def prepare_hessian(hessian: npt.NDArray[np.floating], damping: float) -> PreparedHessian:
    """Damp a Hessian, order its columns and factor it.

    Columns are ordered by descending diagonal; equal ones keep their order. A column of zeros (an
    input that was never active) has only the damping on its diagonal: nothing depends on it, and
    its weights get the nearest entry. If all columns are zero, H is the identity.

    Args:
        hessian: X^T X of the layer's inputs, float [n, n], symmetric and positive semidefinite.
        damping: This fraction of the diagonal's mean is added to the diagonal; above 0.

    Returns:
        The damped Hessian and its factor.

    Raises:
        ValueError: If the matrix is not square, finite or symmetric, if its diagonal or the damping
            is not in range, or if the damped matrix is not positive definite in float64.
    """
    full = np.array(hessian, np.float64)
    if full.ndim != 2 or full.shape[0] != full.shape[1] or full.size == 0:
        raise ValueError(f"a Hessian must be [n, n], found {list(full.shape)}")
    if not (np.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be finite and above 0, found {damping}")
    if not np.isfinite(full).all():
        raise ValueError("a Hessian must be finite, found NaN or infinite values")
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
            f"the Hessian is not positive definite with damping {damping}: use a larger damping"
        ) from None
    pivots = np.empty_like(diagonal)
    pivots[order] = upper.diagonal()
    upper /= upper.diagonal().copy()
    np.fill_diagonal(upper, 0)
    return PreparedHessian(full, full.astype(np.float32), order, pivots, upper.astype(np.float32))


def importance(hessian: PreparedHessian, power: float | None) -> Singles:
    """Return the importance of the columns for clustering.

    Args:
        hessian: Damped and factored Hessian of n columns.
        power: Power of the pivots R_ii, which gives LeanQuant's diag(chol(H^-1))^-power (arXiv
            2407.10032). None: the diagonal of H.

    Returns:
        float32 [1, n], scaled so that the largest value is 1.
    """
    values = hessian.full.diagonal() if power is None else hessian.pivots
    relative = (values / values.max()) ** (1.0 if power is None else power)
    return relative.astype(np.float32)[None]


def _upper_factor(matrix: Floats) -> Floats:
    """Return R, upper triangular, with matrix = R R^T: factor the reversed matrix, then reverse."""
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    return np.array(lower[::-1, ::-1], np.float64, order="C")
