"""Apply a recipe: check every site, then convert all or nothing; and load a saved one."""

from pathlib import Path

from torch import nn

from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.discovery import Layout, discover, find_sites
from leantune.core.files import (
    BASE_FILE,
    SESSION,
    STATE_FILE,
    find_damage,
    load_tensors,
    load_weights,
    read_json,
)
from leantune.core.fingerprint import check_fingerprint, fingerprint
from leantune.core.recipe import RECIPE_FILE, Recipe
from leantune.core.registry import MethodSpec
from leantune.core.runtime import Runtime
from leantune.core.session import Session
from leantune.core.sites import Site, is_nested, match_sites
from leantune.errors import ConfigError, SiteError, UnsupportedError

_ORDER = ("trained", "evaluated", "rows", "bits", "recompute")
"""What is trained is settled first: a row policy acts on the linears that then train."""


def apply(model: nn.Module, *methods: MethodConfig, seed: int = 0) -> Session:
    """Convert ``model`` in place by the given methods, all or nothing.

    Args:
        model: any ``nn.Module``; its parameters stay the same objects.
        methods: at most one per axis and site, nested sites included.
        seed: fixes every random choice together with the site and the number of the forward.

    Returns:
        The session; ``session.remove()`` gives back the original modules.

    Raises:
        ConfigError: no method, something that is no method config, or a seed that is no integer.
        SiteError: sites that match nothing or that a method cannot act on, or two methods of one
            axis on one site; every failing site is listed and nothing is changed.
        UnsupportedError: the model is on the meta device.
    """
    _check_request(model, methods)
    recipe = Recipe(methods=methods, seed=seed)
    layout = discover(model)
    _check_conflicts(find_sites(model, layout), methods)
    runtime = Runtime(model, recipe.seed)
    base = fingerprint(model)
    conversions: dict[str, Conversion] = {}
    try:
        for axis in _ORDER:
            for number, config in enumerate(methods):
                if registry.get(config.method).axis == axis:
                    name = f"{number}.{config.method}"
                    conversions[name] = _convert(model, layout, config, runtime)
    except BaseException:
        for conversion in reversed(conversions.values()):
            conversion.undo()
        raise
    runtime.install_hooks(model)
    session = Session(model, recipe.methods, runtime, conversions, base)
    model._leantune_session = session  # type: ignore[assignment]
    return session


def load(model: nn.Module, folder: str | Path) -> Session:
    """Apply the recipe saved in ``folder`` and put its weights and state into ``model``.

    Args:
        model: the base model that the session was applied to, with the same parameters frozen.
        folder: what ``session.save`` wrote.

    Raises:
        ConfigError: a missing or damaged file, another format, or weights of another model; the
            model is left as it was.
    """
    folder = Path(folder).expanduser()
    damage = find_damage(folder, SESSION)
    if damage is not None:
        raise ConfigError(
            f"load: folder must be as session.save wrote it, got {str(folder)!r} with {damage}; "
            "save it again, or take another"
        )
    recipe = Recipe.from_dict(read_json(folder / RECIPE_FILE))
    state = load_tensors(folder / STATE_FILE)
    _check_request(model, recipe.methods)
    check_fingerprint(model, load_tensors(folder / BASE_FILE))
    session = apply(model, *recipe.methods, seed=recipe.seed)
    try:
        session.load_state_dict(state)
        load_weights(model, folder)
    except BaseException:
        session.remove()
        raise
    return session


def _check_request(model: nn.Module, methods: tuple[MethodConfig, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"apply: model must be a torch.nn.Module, got {type(model).__name__}; load it first, "
            "for example with AutoModelForCausalLM.from_pretrained(name)"
        )
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
    ours = [s for s in sites if s.role in spec.roles]
    who = type(config).__name__

    def default(site: Site) -> bool:
        return site.unusable is None and spec.default_sites(site, config)

    return match_sites(ours, config.sites, default, who)


def _check_conflicts(sites: list[Site], methods: tuple[MethodConfig, ...]) -> None:
    """Refuse two methods of one axis on one site or on nested ones, before anything is swapped."""
    taken: dict[str, list[tuple[Site, MethodConfig]]] = {}
    clashes: list[str] = []
    for config in methods:
        spec = registry.get(config.method)
        try:
            chosen = _chosen(sites, config, spec)
        except SiteError:
            # It may match what another method adds (LoRA's factors); judged when it is applied.
            continue
        on_axis = taken.setdefault(spec.axis, [])
        for site in chosen:
            names = (site.name, *site.also_replaced)
            for other, first in on_axis:
                others = (other.name, *other.also_replaced)
                if any(is_nested(a, b) for a in names for b in others):
                    where = site.name if site.name == other.name else f"{other.name}, {site.name}"
                    methods_there = f"{type(first).__name__} and {type(config).__name__}"
                    clashes.append(f"{where} ({methods_there}, axis {spec.axis!r})")
        on_axis.extend((site, config) for site in chosen)
    if clashes:
        raise SiteError(
            f"apply: sites must take at most one method per axis, got {len(clashes)} with two: "
            f"{'; '.join(clashes[:10])}; keep one of the methods, or give each its own sites="
        )


def choose(
    sites: list[Site], config: MethodConfig, spec: MethodSpec
) -> tuple[list[Site], dict[str, str]]:
    """Return the sites that a config means, and why the method cannot act on some: name -> why."""
    chosen = _chosen(sites, config, spec)
    reasons = {s.name: s.unusable or spec.check(s, config) for s in chosen}
    return chosen, {name: reason for name, reason in reasons.items() if reason is not None}


def _convert(
    model: nn.Module, layout: Layout, config: MethodConfig, runtime: Runtime
) -> Conversion:
    """Apply one method; every site is checked before the first is changed."""
    spec = registry.get(config.method)
    who = type(config).__name__
    every = find_sites(model, layout)
    sites, bad = choose(every, config, spec)
    if not sites:
        ours = [s for s in every if s.role in spec.roles]
        no = [f"{s.name}: {s.unusable}" for s in ours if s.unusable]
        how = "the method's own choice" if config.sites is None else "the predicate"
        why = f"; {len(no)} cannot be used: {'; '.join(no[:3])}" if no else ""
        way_out = "name some with sites=" if ours else "the model has none"
        raise SiteError(
            f"{who}: sites must match at least one module, got none by {how} "
            f"(roles: {', '.join(spec.roles)}); {way_out}{why}"
        )
    if bad:
        listed = "; ".join(f"{name}: {reason}" for name, reason in bad.items())
        raise SiteError(f"{who}: {len(bad)} of {len(sites)} sites cannot be used: {listed}")
    return spec.convert(model, sites, config, runtime)
