"""Sparse attention in a model: which sites can have it, and what one config did to them."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from leantune.core.calibration import run_batches
from leantune.core.conversion import Conversion
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.integrations import attention as registry
from leantune.methods.spt_attention.attention import SparseAttention
from leantune.methods.spt_attention.config import SPTAttention


class SPTConversion(Conversion):
    """The sites that one config made sparse, each with codebooks of its own if keys have codes."""

    def __init__(
        self, model: nn.Module, sites: list[Site], config: SPTAttention, runtime: Runtime
    ) -> None:
        self.can_merge = config.keep_ratio == 1.0
        has_codes = config.granularity == "token"
        self.num_calibration_batches = 8 if has_codes else 0
        self._model = model
        self._runtime = runtime
        self._children = [
            (s.module, SparseAttention(s, _shape(s, config), config, runtime)) for s in sites
        ]
        self._coded = [child for _, child in self._children if has_codes]
        for module, child in self._children:
            module.add_module(registry.CHILD, child.train(module.training))
        self._redirected = registry.redirect(model, [s.name for s in sites])

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # A model that is read in another process finds its attention there.
        registry.register_interface()

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Set the codebooks of every site by k-means of its queries and keys in some batches.

        Raises:
            ConfigError: no batch, or fewer vectors than codewords.
        """
        try:
            for child in self._coded:
                child.collected = []
            for _ in run_batches(self._model, self._runtime, batches):
                pass
            for child in self._coded:
                child.init_codebooks()
        finally:
            for child in self._coded:
                child.collected = None

    def undo(self) -> None:
        """Take the children out, and let the model's configurations name what they did before."""
        for module, child in self._children:
            if module._modules.get(registry.CHILD) is child:
                delattr(module, registry.CHILD)
        registry.direct_back(self._redirected)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the codebooks of every site; empty before calibration, and without codes."""
        if not all(child.is_calibrated for child in self._coded):
            return {}
        return {f"{child.name}.codebooks": child.codebooks for child in self._coded}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take codebooks on, so that a resumed run chooses by the same ones.

        Raises:
            ConfigError: codebooks of other sites, of another shape, or with numbers that are not
                finite.
        """
        names = {f"{child.name}.codebooks": child for child in self._coded}
        wrong = state.keys() ^ names.keys()
        if state and wrong:
            raise ConfigError(
                f"SPTAttention: state must hold the codebooks of {len(names)} sites, got one that "
                f"differs in {min(wrong)!r}; load onto the base model that was saved from"
            )
        for name, child in names.items():
            child.is_calibrated = False
            if state:
                child.load_codebooks(state[name])


def _shape(site: Site, config: SPTAttention) -> tuple[int, int, int, int]:
    """Return the shape of a site's codebooks: key heads, subspaces, codewords, their width."""
    if config.granularity == "block":
        return 0, 0, 0, 0
    head_width, num_heads = registry.head_width(site.module), _num_key_heads(site)
    assert head_width is not None and num_heads is not None, site.name
    width = config.subspace_width
    return num_heads, head_width // width, config.num_codewords, width


def _num_key_heads(site: Site) -> int | None:
    key = site.children["key"].module if "key" in site.children else None
    return registry.num_key_heads(site.module, key)


def check(site: Site, config: SPTAttention) -> str | None:
    """Say why a site cannot be sparse, or None."""
    reason, width = registry.refusal(site.module), registry.head_width(site.module)
    if reason is not None or width is None:
        return reason
    if config.granularity == "token" and width % config.subspace_width:
        divisors = ", ".join(str(w) for w in range(1, width + 1) if width % w == 0)
        return (
            f"subspace_width must divide the head width {width}, got {config.subspace_width}; "
            f"give one of {divisors}"
        )
    if _num_key_heads(site) is None:
        return "module must say how many key heads it has, got none; leave it out with sites="
    return None
