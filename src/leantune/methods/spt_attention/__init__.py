"""SPT: sparse attention over keys that product quantisation chooses.

Source: Gui, Yan, Yin, Yang and Cheng, "SPT: Fine-Tuning Transformer-based Language Models
Efficiently with Sparsification", arXiv 2312.10365. Equations beside names: README.md here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.errors import ConfigError
from leantune.methods.spt_attention.interface import attach, calibrate, check
from leantune.ops.choice import Rule


@dataclass(frozen=True, kw_only=True)
class SPTAttention(MethodConfig):
    """Let each query attend to the few keys that product quantisation finds nearest to it.

    The choice is exact and deterministic and never looks ahead; attention over it and its
    gradient are exact, and only q, k, v and the choice are kept for backward. Every attention is
    taken by default. A sequence so short that every key would be kept runs dense.

    Raises:
        ConfigError: besides a bad option, ``num_keys`` together with ``keep_ratio``, or fewer keys
            than are always kept.
    """

    method: ClassVar[str] = "spt_attention"

    keep_ratio: float | None = option(
        None,
        gt=0,
        le=1,
        help="share of the keys visible to a query that it attends to; 1/8, the paper's, where "
        "neither this nor num_keys is given",
    )
    num_keys: int | None = option(None, ge=1, help="a fixed number of keys, in keep_ratio's stead")
    min_keys: int = option(32, ge=1, help="keys kept at least under keep_ratio")
    num_recent: int = option(
        1, ge=0, help="nearest keys that are always kept, the query's own first"
    )
    num_sinks: int = option(0, ge=0, help="first visible keys that are always kept")
    ties: Literal["nearest", "lowest"] = option(
        "nearest",
        help="which of equally scored keys wins: the nearest (in a decoder the most recent), or "
        "the lowest index, the prototype's",
    )
    scorer: Literal["adc", "match"] = option(
        "adc",
        help="score of a key: 'adc' is the product of the query with the quantised key, 'match' "
        "the number of subspaces in which both have the same code, the paper's",
    )
    granularity: Literal["token", "block"] = option(
        "token",
        help="choose keys for each query (the paper's), or blocks of keys for blocks of queries",
    )
    block_size: int = option(128, ge=8, help="tokens in a block, for granularity='block'")
    subspace_width: int = option(8, ge=1, help="width of a subspace; divides the head width")
    num_codewords: int = option(16, ge=2, le=256, help="codewords in each subspace")
    codebook_per: Literal["layer", "head"] = option(
        "head", help="one codebook per key head, or one for all heads of a layer (the paper's)"
    )
    metric: Literal["l2", "l1"] = option(
        "l2", help="distance to a codeword; 'l1' is the prototype's"
    )
    refresh_steps: int = option(
        20, ge=0, help="training forwards between two steps of the codebooks; 0 for never"
    )
    refresh_decay: float = option(0.9, ge=0, lt=1, help="weight of the old codebook in such a step")
    pq_loss: Literal["none", "spt"] = option(
        "none",
        help="'spt' trains the codebooks by the prototype's auxiliary loss, which pulls queries "
        "and keys along, instead of refreshing them",
    )
    pq_loss_weight: float = option(0.01, gt=0, help="weight of that loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_keys is not None and self.keep_ratio is not None:
            raise ConfigError(
                "SPTAttention: num_keys must be None where keep_ratio is given, got "
                f"{self.num_keys} and {self.keep_ratio:g}; give one of the two"
            )
        least = self.min_keys if self.num_keys is None else self.num_keys
        if self.num_sinks + self.num_recent > least:
            name = "num_sinks" if self.num_sinks > self.num_recent else "num_recent"
            raise ConfigError(
                f"SPTAttention: {name} must be such that num_sinks + num_recent is at most the "
                f"{least} keys kept at least, got {getattr(self, name)}; raise "
                f"{'min_keys' if self.num_keys is None else 'num_keys'}"
            )

    @property
    def rule(self) -> Rule:
        """How many keys are kept, and which always."""
        return Rule(
            self.num_keys,
            0.125 if self.keep_ratio is None else self.keep_ratio,
            self.min_keys,
            self.num_recent,
            self.num_sinks,
            self.ties,
        )


register(
    MethodSpec(
        config=SPTAttention,
        axis="compute",
        roles=("attention",),
        summary="attention over the keys that product quantisation finds nearest to each query",
        source="Gui et al., SIGMOD 2024, arXiv 2312.10365, section on sparse attention",
        attach=attach,
        check=check,
        calibrate=calibrate,
        merges=lambda config: config.keep_ratio == 1.0,
        neutral={"keep_ratio": 1.0},
        example={"num_keys": 3, "subspace_width": 2, "num_codewords": 4},
    )
)
