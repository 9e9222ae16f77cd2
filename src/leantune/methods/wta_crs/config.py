"""The options of WTA-CRS."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WTACRS(MethodConfig):
    """WTA-CRS keeps ``keep_ratio`` of the rows of each trained linear's input; forward stays exact.

    Output, input gradient and bias gradient are the plain linear's. The weight gradient is an
    unbiased estimate (except for ``estimator="topk"``), formed from the kept rows alone. Every
    trainable linear outside embeddings, heads and pooler is taken by default, and linears that
    read the same input share one sample.
    """

    method: ClassVar[str] = "wta_crs"

    keep_ratio: float = option(0.3, gt=0, le=1, help="share of a linear's input rows that is kept")
    estimator: Literal["systematic", "wta", "crs", "topk"] = option(
        "systematic",
        help="how rows are chosen: 'systematic' draws the tail without replacement, 'wta' is the "
        "paper's, 'crs' draws all rows (the paper's baseline), 'topk' is biased (the paper's "
        "ablation)",
    )
    norms: Literal["running", "activation", "cache"] = option(
        "running",
        help="where the gradient norms of a forward draw come from: a running mean by position, "
        "nowhere (activation norms alone), or each sample's previous visit (the paper's: batches "
        "must carry sample_id)",
    )
    allocation: Literal["even", "measured"] = option(
        "even",
        help="how the kept rows are divided among linears: each keeps the same share, or, after "
        "sixteen steps, those keep more where it lowers the variance most, at the same bytes",
    )
    draw_at: Literal["auto", "forward", "backward"] = option(
        "auto",
        help="when rows are chosen: in backward the gradient norms are exact but the input is "
        "kept until then; auto does so inside what is recomputed, where that costs nothing",
    )
    min_rows: int = option(10, ge=1, help="rows kept at least, however small the batch")
    probability_floor: float = option(
        0.05,
        ge=0,
        lt=1,
        help="share of the probability that is spread evenly, where gradient norms are a guess",
    )
    cache_gib: float = option(4.0, gt=0, help="host memory that norms='cache' may take, in GiB")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation == "measured" and self.estimator in ("crs", "topk"):
            raise ConfigError(
                f"WTACRS: allocation must be 'even' where estimator is {self.estimator!r}, got "
                "'measured': it goes by the variance of draws without replacement; leave one out"
            )
