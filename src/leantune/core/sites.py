"""Where a method can act: sites, their roles and parts, and how a recipe chooses among them."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from leantune.core.config import SiteFilter
from leantune.errors import SiteError

ROLES = ("linear", "attention", "mlp", "norm", "activation", "block")
PARTS = (
    *(f"attention.{part}" for part in ("query", "key", "value", "qkv", "key_value", "output")),
    *(f"mlp.{part}" for part in ("up", "gate", "down")),
)
"""Names that mean the same linear in every architecture."""


class Child(NamedTuple):
    """One part of an attention or an MLP: the module, and its full name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Part:
    """A part is the attention or the FFN of one block, by the full names of its modules.

    Args:
        role: ``attention`` or ``mlp``.
        entry: the module that stands for it.
        block: the module that it lies in.
        modules: part (as in ``Site.children``) -> the module that is this part.
        is_cross: for attention, whether keys come from another sequence than queries.
        also_replaced: modules of the part that lie beside ``entry`` (see :class:`Site`).
    """

    role: str
    entry: str
    block: str
    modules: Mapping[str, str]
    is_cross: bool = False
    also_replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A site is one module that a method can act on.

    Args:
        name: the module's full name in the model.
        role: one of ``ROLES``.
        module: the module itself.
        children: for attention and mlp: part (``query``, ``key``, ``value``, ``qkv``, ``output``;
            ``up``, ``gate``, ``down``, ``activation``, ``hidden_dropout``, ``output_dropout``)
            -> the module that is this part.
        also_replaced: modules that become the identity when ``module`` is replaced by one that
            computes the whole part (an FFN whose linears lie apart in their block).
        block: name of the enclosing block; None outside every block.
        part: for a linear of an attention or FFN, one of ``PARTS``.
        is_head_or_embedding: for a linear outside blocks, whether it is a head or belongs to the
            embeddings, by its name or place.
        tied_to: another place of the model that has this very module or its weight, or None.
        unusable: why no method can act on what is a linear by its class, or None.
        is_frozen: whether its weight did not train in the plain model.
        shared_input: key that linears reading one and the same input share, or None.
        is_cross: for attention, whether keys come from another sequence than queries.
        whole: for an attention, an FFN and a linear inside one: the smallest module that computes
            all of it; the one that begins it where the block itself calls one after the other;
            '' elsewhere.
        parts: for a block, its attentions and FFNs.
    """

    name: str
    role: str
    module: nn.Module = field(repr=False)
    children: Mapping[str, Child] = field(default_factory=dict[str, Child], repr=False)
    also_replaced: tuple[str, ...] = ()
    block: str | None = None
    part: str | None = None
    is_head_or_embedding: bool = False
    tied_to: str | None = None
    unusable: str | None = None
    is_frozen: bool = False
    shared_input: str | None = None
    is_cross: bool = False
    whole: str = ""
    parts: "tuple[Site, ...]" = field(default=(), repr=False)

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter held directly by the module trains."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    @property
    def sharing(self) -> str | None:
        """Why no method may put another weight here, or None: another module has it, too."""
        if self.tied_to is None:
            return None
        return f"weight must not be shared, got one that {self.tied_to} has, too"


def path_of(name: str) -> Iterator[str]:
    """Yield the names of the modules around a module, from the outermost in, and its own."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name


def is_nested(one: str, other: str) -> bool:
    """Return whether two module names are equal or one lies inside the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def group_by_input(sites: Iterable[Site]) -> list[list[Site]]:
    """Group the linears that read one input; a linear of its own is a group of one."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        is_alone = site.shared_input is None
        key = site.name if is_alone else f"input of {site.shared_input}"
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def match_sites(
    sites: Iterable[Site], wanted: SiteFilter, default: Callable[[Site], bool], who: str
) -> list[Site]:
    """Select sites by role, part, pattern or predicate; ``None`` means ``default``.

    A pattern is a role (``linear``), a part that has the same name in every architecture
    (``mlp.down``), a glob on the full name or on its last components (``query`` matches
    ``encoder.layer.0.attention.self.query``), or ``re:`` and a regular expression searched in the
    full name.

    Raises:
        SiteError: a pattern matches nothing, or a predicate fails or does not say yes or no.
    """
    sites = list(sites)
    if wanted is None:
        return [s for s in sites if default(s)]
    if callable(wanted):
        return [s for s in sites if _answer(wanted, s, who)]
    chosen: set[str] = set()
    for pattern in wanted:
        hits = [s.name for s in sites if _matches(s, pattern, who)]
        if not hits:
            shown = sorted({s.name for s in sites})
            more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
            raise SiteError(
                f"{who}: sites must match at least one module, got {pattern!r}, which matches "
                f"none; roles: {', '.join(ROLES)}; parts: {', '.join(PARTS)}; modules it can act "
                f"on: {', '.join(shown[:6]) or 'none'}{more}"
            )
        chosen.update(hits)
    return [s for s in sites if s.name in chosen]


def _answer(predicate: Callable[[Site], bool], site: Site, who: str) -> bool:
    try:
        answer = predicate(site)
    except Exception as error:
        raise SiteError(
            f"{who}: sites must be a predicate that answers for every site, got "
            f"{type(error).__name__} at {site.name}: {error}"
        ) from error
    if not isinstance(answer, bool):
        raise SiteError(
            f"{who}: sites must be a predicate that returns True or False, got {answer!r} at "
            f"{site.name}; wrap the result in bool()"
        )
    return answer


def _matches(site: Site, pattern: str, who: str) -> bool:
    if pattern in ROLES:
        return site.role == pattern
    if pattern in PARTS and site.part == pattern:
        return True
    return matches_name(site.name, pattern, f"{who}: sites")


def matches_name(name: str, pattern: str, who: str) -> bool:
    """Return whether a glob fits a name or its last components, or ``re:`` is found in it.

    Raises:
        SiteError: the regular expression is not valid; the message begins with ``who``.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise SiteError(
                f"{who} must hold valid regular expressions, got {pattern!r}: {error}"
            ) from error
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
