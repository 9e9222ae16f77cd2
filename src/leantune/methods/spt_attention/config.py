"""The options of sparse attention."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.ops.sparse_attention.top_keys import KeyBudget


@dataclass(frozen=True, kw_only=True)
class SPTAttention(MethodConfig):
    """Let each query attend to the few keys that product quantisation finds nearest to it.

    The choice is deterministic and never looks ahead; attention over it and its gradient are
    exact, and only q, k, v and one bit for each pair are kept for backward. By blocks
    (``granularity="block"``) the products of mean queries and mean keys choose: no codebooks, no
    calibration, and lists of blocks are kept in the place of bits. Every attention is taken by
    default. A sequence so short that every key would be kept runs dense.
    """

    method: ClassVar[str] = "spt_attention"

    keep_ratio: float = option(
        0.125,
        gt=0,
        le=1,
        help="share of the keys visible to a query that it attends to; 1/8 is the paper's",
    )
    min_keys: int = option(32, ge=1, help="keys that a query attends to at least")
    scorer: Literal["adc", "match"] = option(
        "adc",
        help="score of a key: 'adc' is the product of the query with the quantised key, 'match' "
        "the number of subspaces in which both have the same code (the paper's)",
    )
    granularity: Literal["token", "block"] = option(
        "token",
        help="choose keys for each query (the paper's), or blocks of keys for blocks of queries",
    )
    block_size: int = option(128, ge=8, help="tokens in a block, for granularity='block'")
    subspace_width: int = option(8, ge=1, help="width of a subspace; divides the head width")
    num_codewords: int = option(16, ge=2, le=256, help="codewords in each subspace")

    always_keep: int = option(
        0,
        ge=0,
        help="keys that every query keeps: so many of the first real tokens, and as many up to its "
        "own; they count among those kept",
    )
    share_choice: Literal["head", "group"] = option(
        "head",
        help="for granularity='block': each query head chooses, or those of one key head together",
    )

    @property
    def budget(self) -> KeyBudget:
        """How many keys each query keeps."""
        return KeyBudget(self.keep_ratio, self.min_keys, self.always_keep)
