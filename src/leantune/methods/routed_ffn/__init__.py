"""Routed FFN: of the groups that an FFN's hidden units fall into, compute a few for each token.

Source: Gui et al., "SPT: Fine-Tuning Transformer-based Language Models Efficiently with
Sparsification", arXiv 2312.10365. Equations beside names: README.md in this folder.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from leantune.core.config import MethodConfig, option
from leantune.core.registry import MethodSpec, register
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.core.views import linear_view
from leantune.errors import ConfigError, UnsupportedError
from leantune.methods.routed_ffn.calibration import calibrate, split
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
    gate: Literal["output", "none", "output_norm", "ste", "spt"] = option(
        "output",
        help="what a group's output is multiplied by: 2p, nothing, p normalised over active "
        "groups, 1 with the router's gradient, or the prototype's scaling inside the activation",
    )
    balance_weight: float = option(
        0.01, ge=0, help="weight of the auxiliary loss that spreads tokens over groups"
    )
    z_weight: float = option(0.0, ge=0, help="weight of the router logits' mean square")
    warm_down_steps: int = option(
        0, ge=0, help="optimiser steps over which active groups go from all to num_active"
    )
    backend: Literal["auto", "loop", "grouped"] = option(
        "auto",
        help="one product per group, or one grouped product; auto takes grouped on a GPU that has "
        "it, loop elsewhere",
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
        return self.num_active == self.num_groups and self.gate in ("none", "ste")


def _build(site: Site, config: RoutedFFN, session: Session) -> nn.Module:
    module = RoutedMLP(site, config, session)
    if config.split == "coactivation":
        # Until calibration shows what is active together, weight rows that point alike.
        split(module, module.view("gate" if "gate" in site.modules else "up").weight.detach())
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
        views = [linear_view(site.modules[p]) for p in ("up", "gate", "down") if p in site.modules]
    except UnsupportedError as error:
        return str(error)
    if not all(v.weight.is_floating_point() for v in views):
        return f"weights must be floating point, got {views[0].weight.dtype}"
    if config.gate == "spt" and not all(v.is_divisible for v in views):
        return "gate must not be 'spt' where a rule trains in a weight's stead, got 'spt'"
    width = len(views[0].weight)
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
