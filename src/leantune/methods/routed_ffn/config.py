"""The options of the routed FFN."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leantune.core.config import MethodConfig, option
from leantune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RoutedFFN(MethodConfig):
    """A routed FFN computes ``num_active`` of ``num_groups`` slices, chosen per token by a router.

    The FFN's own linears stay, frozen, trained or with LoRA factors; the router trains beside
    them. Calibration fits the router to the size of the groups' activations. No token is dropped.
    """

    method: ClassVar[str] = "routed_ffn"

    num_groups: int = option(4, ge=1, help="groups of hidden units; must divide the FFN's width")
    num_active: int = option(2, ge=1, help="groups computed for each token, at most num_groups")
    split: Literal["contiguous", "coactivation"] = option(
        "contiguous",
        help="how hidden units are grouped: as they lie (the paper's), or those that are active "
        "together, by reordering them",
    )
    compensate: Literal["none", "lowrank"] = option(
        "none",
        help="what stands in for a group that a token skips: nothing, or a low-rank map of the "
        "input; calibrated, not trained",
    )
    balance_weight: float = option(
        0.01, ge=0, help="weight of the auxiliary loss that spreads tokens over groups"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_active > self.num_groups:
            raise ConfigError(
                f"RoutedFFN: num_active must be at most num_groups = {self.num_groups}, got "
                f"{self.num_active}; raise num_groups or lower num_active"
            )

    @property
    def is_dense(self) -> bool:
        """Whether nothing is skipped: then the plain FFN runs."""
        return self.num_active == self.num_groups

    @property
    def is_compensated(self) -> bool:
        """Whether something stands in for groups that are skipped."""
        return self.compensate != "none" and not self.is_dense
