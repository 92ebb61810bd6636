"""Sketch with calibration in torch, all rows at once: for GPUs. `cpu` processes a row at a time.

The algorithms and their names are those of `cpu`, which documents them; results differ by the order
of float32 sums. In torch the loops over columns are thousands of small operations, so a device that
can run Triton runs them as kernels (`triton/compensate.py`, `triton/descend.py`). Only clustering
stays on the CPU: it is exact there, and not what takes the time. On a CUDA device, float32 products
must not be rounded to TF32, which torch does not do by default
(`torch.backends.cuda.matmul.allow_tf32` is false).
"""

from .calibrated import Fitted, fit
from .compensate import compensate
from .descend import descend
from .hessian import PreparedHessian, importance, prepare_hessian
from .least_squares import least_squares
from .quadratic import look_up, quadratic_loss

__all__ = [
    "Fitted",
    "PreparedHessian",
    "compensate",
    "descend",
    "fit",
    "importance",
    "least_squares",
    "look_up",
    "prepare_hessian",
    "quadratic_loss",
]
