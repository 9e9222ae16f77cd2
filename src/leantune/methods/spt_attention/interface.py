"""Where sparse attention meets transformers: its attention registry, a model's sites, calibration.

Nothing of transformers is patched: a chosen module's configuration names :func:`attend`, which
runs every module without codebooks of its own by SDPA.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leantune.core.calibration import run_batches
from leantune.core.ranks import is_several
from leantune.core.session import Session
from leantune.core.sites import Site
from leantune.errors import UnsupportedError
from leantune.methods.spt_attention.attention import KeyChoice, Run, State

if TYPE_CHECKING:
    from leantune.methods.spt_attention import SPTAttention

NAME = "leantune_spt_attention"
"""The entry in transformers' registries of attention and mask functions."""

_CHILD = "key_choice"


@dataclass
class Attached:
    """Sites made sparse, and how their models stood before."""

    run: Run
    choices: list[tuple[nn.Module, KeyChoice]]
    configs: list[tuple[Any, str | None]] = field(default_factory=list)
    handle: Any = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A model that is read in another process finds its attention there.
        register_interface()

    def begin(self, model: nn.Module, args: Any) -> None:
        """Count a training forward, after processes agree on codebooks that the last one moved.

        Not inside that one: there one process may run dense where another does not, and a block
        that checkpointing recomputes must find the codebooks as they were.
        """
        if not (model.training and torch.is_grad_enabled()):
            return
        if self.run.has_moved and is_several():
            for _, choice in self.choices:
                choice.agree()
        self.run.num_forwards += 1

    def undo(self) -> None:
        for module, _ in self.choices:
            delattr(module, _CHILD)
        for config, before in self.configs:
            config._attn_implementation_internal = before
        self.handle.remove()

    def merge(self) -> None:
        self.undo()


def attach(
    model: nn.Module, sites: list[Site], config: "SPTAttention", session: Session
) -> Attached:
    """Give each site its codebooks and let the model's attention calls come here."""
    register_interface()
    run = Run(session, config)
    change = Attached(run, [])
    change.handle = model.register_forward_pre_hook(change.begin)
    for site in sites:
        choice = KeyChoice(site, _shape(model, site, config), run).train(site.module.training)
        site.module.add_module(_CHILD, choice)
        change.choices.append((site.module, choice))
        session.keep_state(f"spt_attention.{site.name}", State(choice))
    for model_config in _configs(model, sites):
        change.configs.append((model_config, model_config._attn_implementation))
        # Of this configuration alone: the public setter reaches into all those below it.
        model_config._attn_implementation_internal = NAME
    return change


def _configs(model: nn.Module, sites: list[Site]) -> list[Any]:
    """List the configurations of the sites and of the models around them, which make the masks."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        inside = any(s.name == name or not name or s.name.startswith(f"{name}.") for s in sites)
        config = getattr(module, "config", None)
        if inside and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def _width(module: nn.Module) -> Any:
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    return next((getattr(module, n) for n in names if hasattr(module, n)), None)


def _shape(model: nn.Module, site: Site, config: "SPTAttention") -> tuple[int, int, int, int]:
    width = _width(site.module)
    if config.codebook_per == "layer":
        num_books = 1
    elif "key" in site.parts:
        key: Any = model.get_submodule(site.parts["key"])
        num_books = key.out_features // width
    else:
        joint: Any = site.module
        num_books = joint.num_heads
    w = config.subspace_width
    return int(num_books), width // w, config.num_codewords, w


def check(site: Site, config: "SPTAttention") -> str | None:
    """Say why a site cannot be sparse, or None."""
    module = site.module
    kind = type(module).__name__
    source = vars(sys.modules.get(type(module).__module__, sys))
    model_config, width = getattr(module, "config", None), _width(module)
    if "ALL_ATTENTION_FUNCTIONS" not in source or model_config is None or width is None:
        return (
            f"module must compute attention through transformers' attention interface, got {kind}, "
            "which computes its own; leave it out with sites="
        )
    how = getattr(model_config, "_attn_implementation", None)
    if how not in (None, "sdpa", "eager", NAME):
        return (
            f"attn_implementation must be 'sdpa' or 'eager', got {how!r}; load the model with "
            "attn_implementation='sdpa'"
        )
    if width % config.subspace_width:
        return (
            f"subspace_width must divide the head width {width}, got {config.subspace_width}; "
            f"give one of {', '.join(str(w) for w in range(1, width + 1) if width % w == 0)}"
        )
    return None


def calibrate(session: Session, batches: Iterable[Any]) -> None:
    """Start the codebooks of every site by k-means of its queries and keys in some batches.

    Raises:
        ConfigError: no batch, or fewer vectors than codewords.
    """
    changes = [c for c in session.changes if isinstance(c, Attached)]
    shown = list(batches) if len(changes) > 1 else batches
    for change in changes:
        change.run.collected = {}
        try:
            for _ in run_batches(session, shown):
                pass
            for _, choice in change.choices:
                parts = change.run.collected.get(choice.name, [[] for _ in choice.codebooks])
                books = choice.codebooks
                empty = books.new_zeros(0, books.shape[1] * books.shape[3])
                choice.start([torch.cat([empty, *p]) for p in parts])
        finally:
            change.run.collected = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one attention call of a transformers model: sparse where its module was chosen.

    Args and returns: as transformers' attention functions; the output is (b, n, h, dv).

    Raises:
        UnsupportedError: the call asks for something that sparse attention does not do.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    choice: Any = module._modules.get(_CHILD)
    if choice is not None:
        asked = [n for n in ("softcap", "s_aux", "cache") if kwargs.get(n) is not None]
        if asked:
            raise UnsupportedError(
                f"SPTAttention: attention must be called without {asked[0]}, got a call with it "
                f"at {choice.name}; leave the site out with sites="
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        out = choice(
            query,
            key,
            value,
            attention_mask,
            position_bias,
            is_causal=bool(causal),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
        )
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    how = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    how["position_bias"] = position_bias
    return sdpa_attention_forward(module, query, key, value, attention_mask, **how, **kwargs)


def register_interface() -> None:
    """Add :func:`attend` to transformers' attention functions, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
