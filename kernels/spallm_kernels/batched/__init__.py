"""Calibrated sketching in torch, all rows at once: for GPUs, where `cpu` works a row at a time.

The same algorithms under the same names as in `cpu`, which documents them; results differ by the
order of float32 sums. The loops over columns are thousands of small operations in torch, so a
device that can run Triton gets them as kernels (`triton/compensate.py`, `triton/descend.py`).
Clustering alone stays on the CPU, where it is exact and not what takes the time. On a CUDA device,
float32 products must not be rounded to TF32, which is torch's default
(`torch.backends.cuda.matmul.allow_tf32` false).
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
