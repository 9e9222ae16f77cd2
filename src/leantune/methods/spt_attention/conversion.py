"""Sparse attention in a model: which sites can have it, and what a converted model keeps of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.calibration import run_batches
from leantune.core.ranks import is_several
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.integrations.attention import (
    CHILD,
    Redirected,
    direct_back,
    head_width,
    redirect,
    refusal,
    register_interface,
)
from leantune.methods.spt_attention.attention import SharedState, SparseAttention
from leantune.methods.spt_attention.config import SPTAttention


@dataclass
class SPTConversion:
    """The sites that one config made sparse, and how their models stood before."""

    shared: SharedState
    children: list[tuple[nn.Module, SparseAttention]]
    redirected: Redirected
    handle: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A model that is read in another process finds its attention there.
        register_interface()

    def begin_forward(self, model: nn.Module, args: Any) -> None:
        """Count a training forward, after processes agree on codebooks that the last one moved.

        Not inside that forward: there one process may run dense where another does not, and a
        block that checkpointing recomputes must find the codebooks as they were.
        """
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.shared.is_refresh and is_several():
            for _, child in self.children:
                child.average_over_ranks()
        self.shared.num_forwards += 1

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Set the codebooks of every site by k-means of its queries and keys in some batches.

        Raises:
            ConfigError: no batch, or fewer vectors than codewords.
        """
        try:
            for _, child in self.children:
                child.collected = []
            for _ in run_batches(self.shared.session, batches):
                pass
            for _, child in self.children:
                child.init_codebooks()
        finally:
            for _, child in self.children:
                child.collected = None

    def undo(self) -> None:
        """Take the children out, and let the model's configurations name what they did before."""
        for module, child in self.children:
            if module._modules.get(CHILD) is child:
                delattr(module, CHILD)
        direct_back(self.redirected)
        self.handle.remove()

    def merge(self) -> None:
        """Undo; the registry allows a merge only where every key is kept."""
        self.undo()


@dataclass
class State:
    """What a resumed run needs of one site."""

    child: SparseAttention

    def state_dict(self) -> dict[str, Tensor]:
        if not self.child.is_calibrated:
            return {}
        count = torch.tensor(self.child.shared.num_forwards)
        return {"codebooks": self.child.codebooks, "num_forwards": count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.child.is_calibrated = "codebooks" in state
        if self.child.is_calibrated:
            self.child.shared.num_forwards = int(state["num_forwards"])
            self.child.load_codebooks(state["codebooks"])


def convert(
    model: nn.Module, sites: list[Site], config: SPTAttention, session: Session
) -> SPTConversion:
    """Give each site its codebooks and let the model's attention calls come to them."""
    shared = SharedState(session, config)
    made = SPTConversion(shared, [], redirect(model, [s.name for s in sites]))
    made.handle = model.register_forward_pre_hook(made.begin_forward)
    for site in sites:
        width = head_width(site.module)
        assert width is not None, site.name
        child = SparseAttention(site, _num_key_heads(model, site, width), width, shared)
        site.module.add_module(CHILD, child.train(site.module.training))
        made.children.append((site.module, child))
        session.keep_state(f"spt_attention.{site.name}", State(child))
    return made


def _num_key_heads(model: nn.Module, site: Site, width: int) -> int:
    if "key" not in site.parts:
        return int(site.module.num_heads)  # type: ignore[arg-type]
    return int(model.get_submodule(site.parts["key"]).out_features) // width  # type: ignore[arg-type]


def calibrate(session: Session, batches: Iterable[Any]) -> None:
    """Calibrate every conversion of a session."""
    made = [c for c in session.changes if isinstance(c, SPTConversion)]
    shown = list(batches) if len(made) > 1 else batches
    for conversion in made:
        conversion.calibrate(shown)


def check(site: Site, config: SPTAttention) -> str | None:
    """Say why a site cannot be sparse, or None."""
    reason, width = refusal(site.module), head_width(site.module)
    if reason is not None or width is None:
        return reason
    if width % config.subspace_width:
        divisors = ", ".join(str(w) for w in range(1, width + 1) if width % w == 0)
        return (
            f"subspace_width must divide the head width {width}, got {config.subspace_width}; "
            f"give one of {divisors}"
        )
    return None
