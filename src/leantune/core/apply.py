"""Apply a recipe: check every site, then swap all or nothing; and load a saved one."""

from pathlib import Path

from torch import nn

from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.core.registry import MethodSpec
from leantune.core.session import Session
from leantune.core.sites import Site, find_sites, match_sites
from leantune.core.state import STATE_FILE, load_tensors, load_weights, read_recipe
from leantune.core.swap import swap, with_store
from leantune.errors import ConfigError, SiteError, UnsupportedError

_ORDER = ("weights", "compute", "saved")
"""What is trained is settled first: a saved method acts on the linears that then train."""


def apply(model: nn.Module, *methods: MethodConfig, seed: int = 0) -> Session:
    """Convert ``model`` in place by the given methods, all or nothing.

    Args:
        model: any ``nn.Module``; its parameters stay the same objects.
        methods: at most one per axis and site.
        seed: fixes every random choice together with the site and the draw number.

    Returns:
        The session; ``session.remove()`` gives back the original modules.

    Raises:
        ConfigError: no method, something that is no method config, or a seed that is no integer.
        SiteError: sites that match nothing or that a method cannot act on, or two methods of one
            axis on one site; every failing site is listed and nothing is changed.
        UnsupportedError: the model is on the meta device.
    """
    _check_request(model, methods, seed)
    _check_conflicts(find_sites(model), methods)
    session = Session(model, methods, seed)
    try:
        for axis in _ORDER:
            for config in methods:
                if registry.get(config.method).axis == axis:
                    _convert(session, config)
    except BaseException:
        session.remove()
        raise
    session.watch()
    model._leantune_session = session  # type: ignore[assignment]
    return session


def load(model: nn.Module, folder: str | Path) -> Session:
    """Apply the recipe saved in ``folder`` and put its weights and state into ``model``.

    Args:
        model: the base model that the session was applied to, with the same parameters frozen.
        folder: what ``session.save`` wrote.

    Raises:
        ConfigError: a missing, truncated or newer file, or weights of another model; the model is
            left as it was.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    state = load_tensors(folder / STATE_FILE)
    session = apply(model, *recipe.methods, seed=recipe.seed)
    try:
        session.load_state_dict(state)
        load_weights(model, folder)
    except BaseException:
        session.remove()
        raise
    return session


def _check_request(model: nn.Module, methods: tuple[MethodConfig, ...], seed: int) -> None:
    if not methods:
        raise ConfigError(
            "apply: methods must name at least one method, got none; for example "
            "leantune.WTACRS(keep_ratio=0.3)"
        )
    for config in methods:
        if not isinstance(config, MethodConfig):
            raise ConfigError(
                f"apply: methods must be method configs, got {config!r}; for example "
                "leantune.WTACRS(keep_ratio=0.3)"
            )
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"apply: seed must be a 64-bit integer, got {seed!r}")
    if getattr(model, "_leantune_session", None) is not None:
        raise ConfigError(
            "apply: model must not be converted already, got one with "
            f"{', '.join(m.method for m in model._leantune_session.methods)}; "  # type: ignore
            "give all methods in one call, or call session.remove() first"
        )
    meta = [n for n, p in model.named_parameters() if p.is_meta]
    if meta:
        raise UnsupportedError(
            f"apply: model must have its weights in memory, got {len(meta)} parameters on the meta "
            f"device ({meta[0]}, ...); load the weights first"
        )


def _chosen(sites: list[Site], config: MethodConfig, spec: MethodSpec) -> list[Site]:
    usable = [s for s in sites if s.role in spec.roles]
    who = type(config).__name__
    return match_sites(usable, config.sites, lambda s: spec.selects(s, config), who)


def _check_conflicts(sites: list[Site], methods: tuple[MethodConfig, ...]) -> None:
    """Refuse two methods of one axis on one site, before anything is swapped."""
    owner: dict[tuple[str, str], MethodConfig] = {}
    clashes = []
    for config in methods:
        spec = registry.get(config.method)
        try:
            chosen = _chosen(sites, config, spec)
        except SiteError:
            # It may match what another method adds (LoRA's factors); judged when it is applied.
            continue
        for site in chosen:
            first = owner.setdefault((spec.axis, site.name), config)
            if first is not config:
                names = f"{type(first).__name__} and {type(config).__name__}"
                clashes.append(f"{site.name} ({names}, axis {spec.axis!r})")
    if clashes:
        raise SiteError(
            f"apply: sites must take at most one method per axis, got {len(clashes)} with two: "
            f"{'; '.join(clashes[:10])}; keep one of the methods, or give each its own sites="
        )


def _convert(session: Session, config: MethodConfig) -> None:
    """Apply one method; every site is checked before the first is changed."""
    spec = registry.get(config.method)
    who = type(config).__name__
    sites = _chosen(find_sites(session.model), config, spec)
    if not sites:
        how = "the method's own choice" if config.sites is None else "the predicate"
        raise SiteError(
            f"{who}: sites must match at least one module, got none by {how} "
            f"(roles: {', '.join(spec.roles)}); name some with sites="
        )
    reasons = [(s, _unusable(s) or spec.check(s, config)) for s in sites]
    bad = [f"{s.name}: {reason}" for s, reason in reasons if reason is not None]
    if bad:
        raise SiteError(f"{who}: {len(bad)} of {len(sites)} sites cannot be used: {'; '.join(bad)}")
    if spec.attach is not None:
        session.changes.append(spec.attach(session.model, sites, config, session))
    elif spec.build is not None:
        for site in sites:
            new = spec.build(site, config, session)
            session.changes.append(swap(session.model, site.name, new))
            for name in site.bypass:
                session.changes.append(swap(session.model, name, nn.Identity()))
    else:
        assert spec.stores is not None
        groups = _groups(sites)
        for group, stores in zip(groups, spec.stores(groups, config, session), strict=True):
            for site, store in zip(group, stores, strict=True):
                new = with_store(site.module, store, session)
                session.changes.append(swap(session.model, site.name, new))


def _unusable(site: Site) -> str | None:
    """Say why no method can train at a site: a weight without gradients."""
    for name, parameter in site.module.named_parameters(recurse=False):
        if not (parameter.is_floating_point() or parameter.is_complex()):
            kind = str(parameter.dtype).removeprefix("torch.")
            return (
                f"{name} must be floating point, got {kind}; leave it out with sites=, or train "
                "LoRA factors beside it"
            )
    return None


def _groups(sites: list[Site]) -> list[list[Site]]:
    """Group the linears that read one input; a linear of its own is a group of one."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        key = site.name if site.reads is None else f"input of {site.reads}"
        groups.setdefault(key, []).append(site)
    return list(groups.values())


__all__ = ["apply", "load"]
