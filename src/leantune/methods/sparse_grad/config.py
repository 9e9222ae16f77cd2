"""The options of SparseGrad."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option


@dataclass(frozen=True, kw_only=True)
class SparseGrad(MethodConfig):
    """SparseGrad trains ``density`` of each MLP weight's entries, where the gradient is sparse.

    The entries of a linear are one ordinary parameter, so that gradients and optimiser state have
    the size of that parameter; forward and input gradient stay the plain linear's. Entries count in
    bases that are found from the gradients of a few batches, which ``session.calibrate`` or the
    trainer callback shows; no weight moves meanwhile. Everything else trains as it did before.
    """

    method: ClassVar[str] = "sparse_grad"

    selection: Literal["block", "step"] = option(
        "block",
        help="which entries train: the leading block (which shrinks what backward keeps, too), or "
        "the largest of every step, as a sparse gradient (the paper's)",
    )
    density: float = option(0.01, gt=0, le=1, help="share of each weight's entries that trains")
    num_calibration_batches: int = option(30, ge=1, help="batches that the bases are found from")
