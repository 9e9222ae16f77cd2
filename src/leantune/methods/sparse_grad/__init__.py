"""SparseGrad: train MLP weights through about 1 % of their gradient, in a basis where it is sparse.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383. Equations beside names: README.md in this folder.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.conversion import attach, calibrate, on_step
from leantune.methods.sparse_grad.figures import figures


@dataclass(frozen=True, kw_only=True)
class SparseGrad(MethodConfig):
    """Train ``density`` of each MLP weight's entries, in a basis where its gradient is sparse.

    The bases are found from the gradients of a few batches, which ``session.calibrate`` or the
    trainer callback shows; weights do not move meanwhile unless asked to. The selected entries of a
    layer are one ordinary parameter, so gradients and optimiser state have their size; forward and
    input gradient stay the plain linear's. Everything else trains as it did before.
    """

    method: ClassVar[str] = "sparse_grad"

    selection: Literal["fixed", "refreshed", "block", "step"] = option(
        "fixed",
        help="which entries train: those of the largest mean square in calibration, the same but "
        "exchanged from time to time, the leading block (which shrinks what backward keeps, too), "
        "or the largest of every step, as a sparse gradient (the paper's)",
    )
    density: float = option(0.01, gt=0, le=1, help="share of each weight's entries that trains")
    num_entries: int | None = option(
        None, ge=1, help="entries of each weight that train, in place of density"
    )
    num_outliers: int = option(
        0, ge=0, help="of them, entries outside the leading block (selection='block')"
    )
    basis: Literal["layer_type", "layer"] = option(
        "layer_type", help="who shares a basis: all layers of one type, as in the paper, or nobody"
    )
    num_calibration_steps: int = option(30, ge=1, help="batches that the bases are found from")
    calibration_learning_rate: float = option(
        0.0,
        ge=0,
        help="train the whole model meanwhile with AdamW at this rate, as the released code does; "
        "0: no weight moves",
    )
    normalize: bool = option(
        False, help="count every layer's and batch's gradient alike in the bases, whatever its size"
    )
    refresh_steps: int = option(
        100, ge=2, help="optimiser steps between two exchanges (selection='refreshed')"
    )
    refresh_ratio: float = option(
        0.2, gt=0, le=1, help="share of the entries exchanged (selection='refreshed')"
    )
    skip_zero_rows: bool = option(
        False,
        help="leave rows without an output gradient (padding; all but the first token in the last "
        "block of a classifier) out of the weight's gradient; waits for the device at each layer",
    )
    bias_correction: Literal["global", "per_entry"] = option(
        "global",
        help="Adam's bias correction of sparse gradients: torch's, or one by which an entry first "
        "met late moves by one learning rate instead of up to three (selection='step')",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_outliers and self.selection != "block":
            raise ConfigError(
                f"SparseGrad: num_outliers must be 0 unless selection is 'block', got "
                f"{self.num_outliers} with {self.selection!r}; give selection='block'"
            )

    def entries_of(self, shape: tuple[int, int]) -> int:
        """Return how many entries of a weight of ``shape`` train; all of a whole block count."""
        k = self.num_entries or max(1, round(self.density * shape[0] * shape[1]))
        if self.selection != "block":
            return k
        r_out, r_in = maths.block_shape(shape, max(1, k - self.num_outliers))
        return r_out * r_in + self.num_outliers


def _selects(site: Site, config: SparseGrad) -> bool:
    return site.part in ("up", "gate", "down") and ".lora_" not in site.name


def _check(site: Site, config: SparseGrad) -> str | None:
    if getattr(site.module, "rule", None) is not None:
        return "the weight must be trained directly, got one that another method stands in for"
    numel = int(site.module.weight.numel())  # type: ignore[union-attr, operator]
    k = config.num_entries or max(1, round(config.density * numel))
    if k > numel:
        return f"num_entries must be at most {numel}, got {k}; lower it, or give density instead"
    if config.num_outliers >= k:
        return f"num_outliers must be below the {k} entries that train, got {config.num_outliers}"
    return None


register(
    MethodSpec(
        config=SparseGrad,
        axis="weights",
        roles=("linear",),
        summary="train about 1 % of each MLP weight, in a basis where its gradient is sparse",
        source="Chekalina et al., EMNLP 2024, arXiv 2410.07383",
        selects=_selects,
        attach=attach,
        check=_check,
        neutral={"density": 1.0},
        example={"density": 0.1, "num_calibration_steps": 2},
        on_step=on_step,
        calibrate=calibrate,
        num_calibration_batches=lambda config: config.num_calibration_steps,
        figures=figures,
    )
)
