"""Liger's kernels in one model: its norms, its gated FFNs, and its loss fused with the output head.

Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", arXiv 2410.10989. The
work is done by ``liger-kernel``; which kernel stands for which module is its own table's choice.
"""

from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, ClassVar

from torch import nn

from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.extras import require
from leantune.core.linear import Converted, has_own_call
from leantune.core.registry import MethodSpec, register
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import SiteError, UnsupportedError
from leantune.integrations.liger import Patch, find_patches, is_ligers


@dataclass(frozen=True, kw_only=True)
class Liger(MethodConfig):
    """Liger computes norms, gated FFNs and the loss in fused kernels that keep fewer bytes; exact.

    Training forwards with labels then return no logits, which are never formed. Give
    ``sites=["norm", "mlp"]`` to leave the loss as it is.
    """

    method: ClassVar[str] = "liger"


class LigerForward:
    """A forward of Liger's in the place of one module's own, until it is switched off.

    Others may have wrapped it by then, as accelerate does with a model's: inside, the module's own
    forward runs again.
    """

    is_on = True

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module = module
        # Under this name its signature is found, from which a trainer learns what a model takes.
        self.__wrapped__ = partial(forward, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_on:
            return self.__wrapped__(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class FusedLoss(LigerForward):
    """A model's forward that takes the head's weight into the loss, where the head is plain."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_on:
            reason = _not_plain(self.module.get_output_embeddings())  # type: ignore[operator]
            if reason is not None:
                raise UnsupportedError(f"Liger: {reason}")
        return super().__call__(*args, **kwargs)


class LigerKernels(Conversion):
    """Modules that compute by Liger from now on, and how they stood before."""

    def __init__(self) -> None:
        self._patched: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    def patch(self, patch: Patch) -> None:
        """Set what Liger sets on one module, in a form that can be copied and pickled."""
        owner = patch.owner
        kind = LigerForward if patch.site is owner else FusedLoss
        ours: dict[str, Any] = {}
        for name, value in patch.attributes.items():
            if name == "forward":
                ours[name] = kind(owner, value.__func__)
            elif name == "_get_name":
                ours[name] = partial(str, value())
            else:
                is_method = isinstance(value, MethodType)
                ours[name] = partial(value.__func__, owner) if is_method else value
        settings: dict[str, Any] = vars(owner)
        self._patched.append((owner, {k: settings[k] for k in ours if k in settings}, ours))
        settings.update(ours)

    def undo(self) -> None:
        """Take out what is still there, and switch off what others have wrapped since."""
        for owner, before, ours in self._patched:
            ours["forward"].is_on = False
            settings: dict[str, Any] = vars(owner)
            for name, value in ours.items():
                if settings.get(name) is value:
                    del settings[name]
                    settings.update({name: before[name]} if name in before else {})
        self._patched.clear()


def _convert(model: nn.Module, sites: list[Site], config: Liger, runtime: Runtime) -> LigerKernels:
    require("liger_kernel", extra="gpu", who="Liger")
    require("transformers", extra="train", who="Liger")
    patches = {patch.site: patch for patch in find_patches(model)}
    known = [site for site in sites if site.module in patches]
    if len(known) < len(sites) and (config.sites is not None or not patches):
        other = [site.name for site in sites if site.module not in patches]
        raise SiteError(
            f"Liger: sites must be modules that Liger has a kernel for, got {len(other)} others "
            f"({', '.join(other[:3])}); leave them out with sites="
        )
    chosen = {site.module for site in sites}
    for patch in patches.values():
        # A head that another method has wrapped is chosen by what lies inside it.
        if patch.owner is not patch.site and not chosen.isdisjoint(patch.site.modules()):
            _check_loss(patch)
    kernels = LigerKernels()
    kernels.sites = known
    for site in known:
        kernels.patch(patches[site.module])
    return kernels


def _check_loss(patch: Patch) -> None:
    reason = _not_plain(patch.site)
    if reason is None and patch.site._forward_hooks:
        reason = "output head must have no hooks where the loss takes its weight, got some"
    if reason is None and has_own_call(patch.owner):
        reason = "forward of the model must be that of its class, got one that was put on itself"
    if reason is not None:
        raise SiteError(f"Liger: {reason}; to leave the loss as it is, give sites=['norm', 'mlp']")


def _not_plain(head: nn.Module) -> str | None:
    """Say why a loss that takes the head's weight would not compute what the head does, or None."""
    is_plain = isinstance(head, nn.Linear) and not isinstance(head, Converted)
    if is_plain and head.bias is None:
        return None
    kind = type(head)
    got = "one with a bias" if is_plain else f"{kind.__module__}.{kind.__qualname__}"
    return f"output head must be a plain linear where the loss takes its weight, got {got}"


def _check(site: Site, config: Liger) -> str | None:
    if is_ligers(site.module):
        return (
            "module must not be Liger's already, got one that is; leave Liger out of the recipe: "
            "the other methods act on Liger's modules as on any"
        )
    if has_own_call(site.module):
        return "forward must be that of its class, got one that was put on the module itself"
    if site.role == "linear" and not site.is_head_or_embedding:
        return "linear must be the output head, which the loss takes in; leave others out"
    return None


register(
    MethodSpec(
        config=Liger,
        axis="evaluated",
        roles=("norm", "mlp", "linear"),
        summary="Liger's kernels for norms, gated FFNs and the loss, in this model alone",
        source="Hsu et al., arXiv 2410.10989",
        default_sites=lambda site, config: site.role != "linear" or site.is_head_or_embedding,
        check=_check,
        convert=_convert,
        identity_options={},
        needs_gpu=True,
    )
)
