"""Apply a recipe: check every site, then convert all or nothing; and load a saved one."""

from pathlib import Path

from torch import nn

from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.discovery import Layout, discover, find_sites
from leantune.core.disk import as_folder, load_tensors, read_json
from leantune.core.files import BASE_FILE, SESSION, STATE_FILE, load_weights
from leantune.core.fingerprint import check_fingerprint, fingerprint
from leantune.core.linear import is_quantised
from leantune.core.manifest import find_damage
from leantune.core.neutral import refusals
from leantune.core.ownership import refuse_idle, refuse_trained_bits
from leantune.core.recipe import RECIPE_FILE, Recipe
from leantune.core.registry import MethodSpec
from leantune.core.runtime import Runtime
from leantune.core.session import MARK, Session
from leantune.core.sites import PARTS, Site, is_nested, match_sites
from leantune.errors import ConfigError, SiteError, UnsupportedError, shown
from leantune.ops.backend import on_gpu

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
        SiteError: sites that match nothing, that a method cannot act on or whose weights are all
            frozen, or two methods of one axis on one site; every failing site is listed and nothing
            is changed.
        UnsupportedError: the model is on the meta device, not on the GPU that a method needs, or
            has quantised weights that are to train.
    """
    _check_request(model, methods)
    recipe = Recipe(methods=methods, seed=seed)
    layout = discover(model, trace=any(map(_needs_parts, methods)))
    _check_conflicts(find_sites(model, layout), methods)
    runtime = Runtime(model, recipe.seed)
    base = fingerprint(model)
    conversions: list[Conversion] = []
    try:
        for number in sorted(range(len(methods)), key=lambda i: _rank(methods[i])):
            config = methods[number]
            conversions.append(_convert(model, layout, config, runtime))
            conversions[-1].name = f"{number}.{config.method}"
        refuse_idle(conversions)
        refuse_trained_bits(model)
    except BaseException:
        for conversion in reversed(conversions):
            conversion.undo()
        raise
    return Session(model, recipe.methods, runtime, conversions, base)


def load(model: nn.Module, folder: str | Path) -> Session:
    """Apply the recipe saved in ``folder`` and put its weights and state into ``model``.

    Args:
        model: the base model that the session was applied to, with the same parameters frozen.
        folder: what ``session.save`` wrote.

    Raises:
        ConfigError: a missing or damaged file, another format, or weights of another model; the
            model is left as it was.
    """
    folder = as_folder("load", folder)
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


def _rank(config: MethodConfig) -> int:
    return _ORDER.index(registry.get(config.method).axis)


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
                f"apply: methods must be method configs, got {shown(config)}; for example "
                "leantune.WTACRS(keep_ratio=0.3)"
            )
    marks = [vars(module)[MARK] for module in model.modules() if MARK in vars(module)]
    if marks:
        raise ConfigError(
            "apply: model must not be converted already, nor a model inside it or around it, got "
            f"{marks[0]}; give all methods in one call, or call session.remove() first"
        )
    meta = [n for n, p in model.named_parameters() if p.is_meta]
    if meta:
        raise UnsupportedError(
            f"apply: model must have its weights in memory, got {len(meta)} parameters on the meta "
            f"device ({meta[0]}, ...); load the weights first"
        )
    for config in methods:
        places = off_gpu(model, registry.get(config.method))
        if places:
            who = type(config).__name__
            raise UnsupportedError(
                f"{who}: model must be on an NVIDIA GPU, got one on {', '.join(places)}; move it "
                f"first (model.to('cuda')), or leave {who} out"
            )


def off_gpu(model: nn.Module, spec: MethodSpec) -> list[str]:
    """Return where a model lies that is not a GPU, for a method that needs one."""
    places = {str(p.device) for p in model.parameters() if not on_gpu(p.device)}
    return sorted(places) if spec.needs_gpu else []


_OF_PARTS = frozenset((*PARTS, "attention", "mlp", "activation"))


def _needs_parts(config: MethodConfig) -> bool:
    """Return whether it takes a forward to know where a method can act."""
    spec, sites = registry.get(config.method), config.sites
    if callable(sites):
        return True  # It may ask for anything that a site says of itself.
    return spec.needs_parts(config) or not _OF_PARTS.isdisjoint((*spec.roles, *(sites or ())))


def _chosen(sites: list[Site], config: MethodConfig, spec: MethodSpec) -> list[Site]:
    def default(site: Site) -> bool:
        return _why_not(site, spec) is None and spec.default_sites(site, config)

    ours = [s for s in sites if s.role in spec.roles]
    return match_sites(ours, config.sites, default, type(config).__name__)


def _why_not(site: Site, spec: MethodSpec) -> str | None:
    """Say why no config of a method can act at a site, or None."""
    if spec.suits_quantised and is_quantised(site.module):
        return None
    if site.unusable is None and spec.trains_weight and site.is_frozen:
        return (
            "the weight must train, got a frozen one, as all are beside a PEFT adapter; unfreeze "
            "it, or leave it out with sites="
        )
    return site.unusable


def _check_conflicts(sites: list[Site], methods: tuple[MethodConfig, ...]) -> None:
    """Refuse two methods of one axis on one site or on nested ones, before anything is swapped."""
    taken: dict[str, list[tuple[Site, MethodConfig]]] = {}
    for config in methods:
        spec = registry.get(config.method)
        try:
            chosen = _chosen(sites, config, spec)
        except SiteError:
            # It may match what another method adds (LoRA's factors); judged when it is applied.
            continue
        on_axis = taken.setdefault(spec.axis, [])
        clashes: list[str] = []
        for site in chosen:
            names = (site.name, *site.also_replaced)
            for other, first in on_axis:
                others = (other.name, *other.also_replaced)
                if any(is_nested(a, b) for a in names for b in others):
                    where = site.name if site.name == other.name else f"{other.name}, {site.name}"
                    methods_there = f"{type(first).__name__} and {type(config).__name__}"
                    clashes.append(f"{where} ({methods_there}, axis {spec.axis!r})")
        if clashes:
            raise SiteError(
                f"apply: sites must take at most one method per axis, got {len(clashes)} with two: "
                f"{'; '.join(clashes[:10])}; keep one of the methods, or give each its own sites="
            )
        on_axis.extend((site, config) for site in chosen)


def choose(
    model: nn.Module, sites: list[Site], config: MethodConfig, spec: MethodSpec
) -> tuple[list[Site], dict[str, str]]:
    """Return the sites that a config means, and why the method cannot act on some: name -> why."""
    chosen = _chosen(sites, config, spec)
    reasons = {s.name: _why_not(s, spec) or spec.check(s, config) for s in chosen}
    bad = {name: reason for name, reason in reasons.items() if reason is not None}
    return chosen, bad or refusals(model, spec, chosen)


def _convert(
    model: nn.Module, layout: Layout, config: MethodConfig, runtime: Runtime
) -> Conversion:
    """Apply one method; every site is checked before the first is changed."""
    spec = registry.get(config.method)
    who = type(config).__name__
    every = find_sites(model, layout)
    sites, bad = choose(model, every, config, spec)
    if not sites:
        ours = [s for s in every if s.role in spec.roles]
        no = [f"{s.name}: {s.unusable}" for s in ours if s.unusable]
        how = "the method's own choice" if config.sites is None else "the predicate"
        why = f"; {len(no)} cannot be used: {'; '.join(no[:3])}" if no else ""
        why += f"; {layout.failure}" if layout.failure else ""
        way_out = (
            "name some with sites=; frozen weights, as beside a PEFT adapter, may be left out"
            if ours
            else "the model has none"
        )
        raise SiteError(
            f"{who}: sites must match at least one module, got none by {how} "
            f"(roles: {', '.join(spec.roles)}); {way_out}{why}"
        )
    if bad:
        listed = "; ".join(f"{name}: {reason}" for name, reason in bad.items())
        raise SiteError(f"{who}: {len(bad)} of {len(sites)} sites cannot be used: {listed}")
    conversion = spec.convert(model, sites, config, runtime)
    conversion.config, conversion.sites = config, tuple(conversion.sites or sites)
    return conversion
