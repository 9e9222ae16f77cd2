"""A survey says what a model is made of, what each method takes of it, and what none does."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leantune.core.apply import choose, off_gpu
from leantune.core.discovery import Layout, discover, find_sites
from leantune.core.registry import list_methods
from leantune.core.sites import Site
from leantune.errors import UnsupportedError

_Row = tuple[tuple[str, ...], Any, int]


@dataclass(frozen=True)
class Found:
    """What was found at equal places of equal blocks.

    Args:
        name: of the module, with a range for what is counted: ``encoder.layer.0-11.output.dense``.
        block: name of the blocks around it, in the same form; None outside blocks.
        role: one of ``leantune.core.sites.ROLES``.
        kind: class of the module.
        part: which part of an attention or an FFN a linear is, or None.
        shape: of the weight; empty for a module without one of its own.
        methods: which take it by their own choice.
        count: how many there are.
    """

    name: str
    block: str | None
    role: str
    kind: str
    part: str | None
    shape: tuple[int, ...]
    methods: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Choice:
    """What one method takes by its own choice, with the options' defaults.

    Args:
        method: registry name.
        num_sites: how many sites it takes; none where it cannot act on all of them.
        share: of the model's parameters, those of the linears that it takes.
        why_not: why it takes none, each reason once; or None.
    """

    method: str
    num_sites: int
    share: float
    why_not: str | None


@dataclass(frozen=True)
class Left:
    """Matrices that no method takes by its own choice.

    Args:
        name: of the parameter, in the form of ``Found``.
        share: of the model's parameters, all together.
        why: what it is, and why none takes it.
    """

    name: str
    share: float
    why: str


@dataclass(frozen=True)
class Survey:
    """A survey of one model, in the order of its modules.

    Args:
        model: class of the model.
        num_parameters: of the model, those that it shares counted once.
    """

    model: str
    num_parameters: int
    found: tuple[Found, ...]
    choices: tuple[Choice, ...]
    left: tuple[Left, ...]


def survey(model: nn.Module) -> Survey:
    """List what is found in a model, what each method would take of it, and what is left over.

    The model is left as it was. One on the meta device will do, though it cannot be run.
    """
    layout = discover(model, trace=True)
    sites = find_sites(model, layout)
    sizes = {id(p): p.numel() for p in model.parameters()}
    total = max(1, sum(sizes.values()))
    takers: dict[tuple[str, str], list[str]] = {}
    choices: list[Choice] = []
    taken: set[int] = set()
    for method, spec in list_methods().items():
        why_not = "the model must be on an NVIDIA GPU" if off_gpu(model, spec) else None
        chosen, bad = [], {}
        try:
            if why_not is None:
                chosen, bad = choose(model, sites, spec.config(), spec)
        except UnsupportedError as error:  # the whole model is nothing for the method
            why_not = str(error)
        if why_not is None and not chosen:
            why_not = f"nothing that it takes by itself (roles: {', '.join(spec.roles)})"
            why_not += f"; {layout.failure}" if layout.failure else ""
        elif bad:
            why_not = f"{len(bad)} of {len(chosen)}: {'; '.join(dict.fromkeys(bad.values()))}"
            chosen = []
        held: set[int] = set()
        for site in chosen:
            takers.setdefault((site.role, site.name), []).append(method)
            if site.role == "linear":
                held |= {id(p) for p in site.module.parameters(recurse=False)}
        taken |= held
        choices.append(
            Choice(method, len(chosen), sum(sizes[key] for key in held) / total, why_not)
        )
    return Survey(
        model=type(model).__name__,
        num_parameters=sum(sizes.values()),
        found=tuple(_found(sites, takers)),
        choices=tuple(choices),
        left=tuple(_left(model, layout, sites, taken)),
    )


def _found(
    sites: Iterable[Site], takers: Mapping[tuple[str, str], Sequence[str]]
) -> Iterator[Found]:
    marks: list[tuple[str, Any]] = []
    for site in sites:
        methods = tuple(takers.get((site.role, site.name), ()))
        depth = 0 if site.block is None else len(site.block.split("."))
        kind, shape = type(site.module).__name__, _shape(getattr(site.module, "weight", None))
        marks.append((site.name, (depth, site.role, kind, site.part, shape, methods)))
    for name, (depth, role, kind, part, shape, methods), count in _in_ranges(marks):
        block = ".".join(name.split(".")[:depth]) or None
        yield Found(name, block, role, kind, part, shape, methods, count)


def _left(
    model: nn.Module, layout: Layout, sites: Iterable[Site], taken: Iterable[int]
) -> Iterator[Left]:
    linears = {site.name: site for site in sites if site.role == "linear"}
    inside = tuple(f"{block}." for block in layout.blocks)
    marks: list[tuple[str, tuple[int, str]]] = []
    seen = set(taken)
    for owner, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{owner}.{key}" if owner else key
                why = f"{type(module).__name__}, {' x '.join(map(str, parameter.shape))}"
                if owner in linears:
                    why += f"; {linears[owner].unusable or 'sites= takes it'}"
                elif name.startswith(inside):
                    why = f"{key} of {why}, is no linear's weight"
                marks.append((name, (parameter.numel(), why)))
    total = sum(p.numel() for p in model.parameters())
    for name, (size, why), count in _in_ranges(marks):
        yield Left(name, count * size / total, why)


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _in_ranges(marks: Iterable[tuple[str, Any]]) -> list[tuple[str, Any, int]]:
    """Sum up names that differ in numbers alone and are marked alike.

    Returns:
        ``("layer.0-11.mlp", mark, 12)`` for twelve names, in the order of the first of each.
    """
    rows: list[_Row] = [(tuple(name.split(".")), mark, 1) for name, mark in marks]
    for place in range(max((len(words) for words, _, _ in rows), default=0)):
        alike: dict[Hashable, list[_Row]] = {}
        for words, mark, count in rows:
            word = words[place] if place < len(words) else ""
            key = (words[:place], word.isdigit() or word, words[place + 1 :], mark)
            alike.setdefault(key, []).append((words, mark, count))
        rows = [_sum(group, place) for group in alike.values()]
    return [(".".join(words), mark, count) for words, mark, count in rows]


def _sum(rows: list[_Row], place: int) -> _Row:
    words, mark, _ = rows[0]
    if len(rows) > 1:
        numbers = sorted(int(other[place]) for other, _, _ in rows)
        words = (*words[:place], _ranges(numbers), *words[place + 1 :])
    return words, mark, sum(count for _, _, count in rows)


def _ranges(numbers: list[int]) -> str:
    """Return ``0-3,6`` for 0, 1, 2, 3 and 6."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pairs)
