"""WTA-CRS: keep a few rows of each linear's input, chosen so that the weight gradient is unbiased.

Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of
Language Model", arXiv 2305.15265. Equations beside names: README.md in this folder.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.core.sites import Site
from leantune.methods.wta_crs.store import make_stores


@dataclass(frozen=True, kw_only=True)
class WTACRS(MethodConfig):
    """Keep ``keep_ratio`` of the rows of each trained linear's input; forward stays exact.

    Output, input gradient and bias gradient are the plain linear's. The weight gradient is an
    unbiased estimate (except for ``estimator="topk"``), formed from the kept rows alone. Every
    trainable linear outside embeddings, heads and pooler is taken by default, and linears that
    read the same input share one sample.
    """

    method: ClassVar[str] = "wta_crs"

    keep_ratio: float = option(0.3, gt=0, le=1, help="share of a linear's input rows that is kept")
    estimator: Literal["systematic", "wta", "crs", "topk"] = option(
        "systematic",
        help="how rows are chosen: 'wta' is the paper's, 'systematic' draws its tail without "
        "replacement, 'crs' draws all rows, 'topk' is biased and for comparison",
    )
    c_rule: Literal["paper", "variance"] = option(
        "paper",
        help="size of the deterministic set: the paper's bound, or the variance when tails cancel",
    )
    norms: Literal["running", "activation", "cache"] = option(
        "running",
        help="where the gradient norms of a forward draw come from: a running mean by position, "
        "none (the activation norm alone), or each sample's previous visit",
    )
    draw_at: Literal["auto", "forward", "backward"] = option(
        "auto",
        help="when rows are chosen: in backward the gradient norms are exact but the input is "
        "kept until then; auto does so inside checkpointed blocks, where that costs nothing",
    )
    residual_rank: int | Literal["mean"] = option(
        0,
        ge=0,
        help="keep a part of this rank exactly for all rows and sample the rest; 'mean' keeps one "
        "mean row",
    )
    min_rows: int = option(10, ge=1, help="rows kept at least, however small the batch")
    probability_floor: float = option(
        0.05,
        ge=0,
        lt=1,
        help="share of the probability that is spread evenly, where gradient norms are a guess",
    )
    decay: float = option(0.9, ge=0, lt=1, help="weight of the past in the running mean")
    cache_gib: float = option(4.0, gt=0, help="host memory that norms='cache' may take, in GiB")


def _selects(site: Site, config: WTACRS) -> bool:
    # The paper keeps LoRA's second factor exact: its input is only `rank` wide.
    is_second_factor = ".lora_B." in site.name
    return site.is_trainable and not site.is_head_or_embedding and not is_second_factor


register(
    MethodSpec(
        config=WTACRS,
        axis="saved",
        roles=("linear",),
        summary="keep a few input rows of each trained linear; the weight gradient stays unbiased",
        source="Liu et al., NeurIPS 2023, arXiv 2305.15265",
        selects=_selects,
        stores=make_stores,
        neutral={"keep_ratio": 1.0},
        example={"keep_ratio": 0.3, "min_rows": 2},
        needs_sample_ids=lambda config: config.norms == "cache" and config.draw_at != "backward",
    )
)
