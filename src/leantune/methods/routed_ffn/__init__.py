"""Routed FFN: of the groups that an FFN's hidden units fall into, compute a few for each token.

Source: Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
Sparsification", arXiv 2312.10365. Equations beside names: README.md in this folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from leantune.core.config import MethodConfig, option
from leantune.core.ffn import HiddenUnits, view_ffn
from leantune.core.registry import MethodSpec, register
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.errors import ConfigError, UnsupportedError
from leantune.methods.routed_ffn.calibration import calibrate, split_by_weights
from leantune.methods.routed_ffn.module import RoutedMLP


@dataclass(frozen=True, kw_only=True)
class RoutedFFN(MethodConfig):
    """Compute ``num_active`` of ``num_groups`` slices of each FFN, chosen per token by a router.

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
    gate: Literal["output", "none"] = option(
        "output",
        help="what a group's output is multiplied by: 2p, through which the router learns the "
        "task, or nothing",
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
        """Whether the plain FFN computes the same."""
        return self.num_active == self.num_groups and self.gate == "none"


class _Order:
    """The order of units as a session keeps it."""

    def __init__(self, units: HiddenUnits) -> None:
        self._units = units

    def state_dict(self) -> dict[str, Tensor]:
        return {"permutation": self._units.permutation.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._units.load(state.get("permutation", torch.empty(0)))


def _build(site: Site, config: RoutedFFN, session: Session) -> nn.Module:
    module = RoutedMLP(site, config, session)
    if module.units is not None:
        split_by_weights(module)
        session.keep_state(f"units.{site.name}", _Order(module.units))
    return module


def _check(site: Site, config: RoutedFFN) -> str | None:
    names = {name for name, _ in site.module.named_children()}
    if names & {"experts", "router"}:
        return f"FFN must not be a mixture of experts already, got {type(site.module).__name__}"
    lost = [part for part in ("up", "down", "activation") if part not in site.modules]
    if lost:
        kind = type(site.module).__name__
        return f"FFN must have up, down and activation modules, got {kind} without {lost[0]}"
    try:
        ffn = view_ffn(site.modules)
    except UnsupportedError as error:
        return str(error)
    weights = [ffn.weight(part) for part in ffn.linears]
    if not all(weight.is_floating_point() for weight in weights):
        return f"weights must be floating point, got {weights[0].dtype}"
    width = len(weights[0])
    if width % config.num_groups:
        near = [n for n in range(2, 65) if width % n == 0]
        return (
            f"num_groups must divide the FFN's width {width}, got {config.num_groups}; it could "
            f"be {', '.join(map(str, near[:8])) or '1'}"
        )
    return None


register(
    MethodSpec(
        config=RoutedFFN,
        axis="compute",
        roles=("mlp",),
        summary="a router chooses, for each token, a few groups of the FFN's hidden units",
        source="Gui et al., SIGMOD 2024, arXiv 2312.10365",
        build=_build,
        check=_check,
        merges=lambda config: config.is_dense,
        neutral={"num_active": 4, "gate": "none"},
        # Reentrant checkpointing cannot carry an auxiliary loss, and tests run under it.
        example={"num_groups": 4, "num_active": 2, "balance_weight": 0.0},
        calibrate=calibrate,
    )
)
