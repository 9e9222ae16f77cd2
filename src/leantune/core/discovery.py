"""How sites are found in any model: its blocks, their parts, its heads, and what is tied."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from leantune.core.adapters import base_name, bypass, is_factor, is_second_factor
from leantune.core.architectures import parts_of
from leantune.core.linear import is_called_linear, refusal
from leantune.core.sites import Child, Part, Site, path_of
from leantune.core.trace import Trace, trace_parts


@dataclass(frozen=True)
class Layout:
    """A layout says, by full module names, what a plain model is made of.

    It is found once, before anything is converted, and holds while modules come and go inside.

    Args:
        blocks: transformer layers, outermost, in the order of ``named_modules``.
        parts: attentions and FFNs of the blocks.
        heads: modules whose linears are heads or embeddings, outside every block.
        ties: module -> another place that has the same module or one of its own parameters.
        frozen: modules whose weight does not train; LoRA freezes weights that others train.
        failure: why parts could not be seen in a forward, or None.
    """

    blocks: tuple[str, ...]
    parts: tuple[Part, ...]
    heads: frozenset[str]
    ties: Mapping[str, str]
    frozen: frozenset[str]
    failure: str | None = None


def discover(model: nn.Module, *, trace: bool = False) -> Layout:
    """Find blocks, their parts, heads and ties of a model.

    Blocks are the modules that transformers can checkpoint one by one; in a model without any they
    are the entries of its repeated lists.

    Args:
        model: plain, or with PEFT layers.
        trace: whether to run the model once on its dummy inputs, for parts that the table of
            architectures does not name.
    """
    modules = dict(model.named_modules())
    blocks = _blocks(modules)
    ties = _ties(modules)
    seen = trace_parts(model, blocks) if trace else Trace([])
    # Paths do not show a dropout or a norm inside an FFN; such an FFN has no activation to run.
    barred = {
        name
        for part in seen.parts
        if part.role == "mlp" and "activation" not in part.modules
        for name in part.modules.values()
    }
    by_path = (part for block in blocks for part in parts_of(block, modules))
    named = [part for part in by_path if barred.isdisjoint(part.modules.values())]
    known = {(part.role, name) for part in named for name in part.modules.values()}
    others = [p for p in seen.parts if known.isdisjoint((p.role, n) for n in p.modules.values())]
    return Layout(
        blocks=blocks,
        parts=(*named, *others),
        heads=frozenset(_heads(modules, blocks, ties)),
        ties=ties,
        frozen=frozenset(_own_name(n) for n, m in modules.items() if _is_frozen(m)),
        failure=seen.failure,
    )


def find_sites(model: nn.Module, layout: Layout | None = None) -> list[Site]:
    """List every site of ``model``, in the order of ``named_modules``.

    Linears and norms are found in any ``nn.Module``; blocks, attention and FFNs where ``layout``
    has them.

    Args:
        model: plain or converted.
        layout: of the plain model; found anew, in a forward on the model's dummy inputs, if None.
    """
    layout = discover(model, trace=True) if layout is None else layout
    modules = dict(model.named_modules())
    order = {name: i for i, name in enumerate(modules)}
    parts = list(_part_sites(modules, layout))
    sites = [*_block_sites(modules, layout, parts), *parts, *_leaf_sites(modules, layout)]
    return sorted(sites, key=lambda s: order[s.name])


def _own_name(name: str) -> str:
    """Return a module's name as it is with and without a LoRA layer around it."""
    return name if is_factor(name) else base_name(name)


def _is_frozen(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and not weight.requires_grad


def _around(name: str, modules: set[str]) -> str | None:
    """Return the outermost of some modules that a module is or lies in, or None."""
    return next((n for n in path_of(name) if n in modules), None)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _blocks(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    named = [name for name, module in modules.items() if name and checkpoints_itself(module)]
    return _outermost(named or _repeated(modules, 2) or _repeated(modules, 1))


def checkpoints_itself(module: nn.Module) -> bool:
    """Return whether transformers can checkpoint the module by itself: its class has the flag.

    Stacks and whole models have it, too, but as instances.
    """
    return hasattr(type(module), "gradient_checkpointing")


def _repeated(modules: Mapping[str, nn.Module], at_least: int) -> list[str]:
    """Name the entries of lists whose class comes ``at_least`` times in one list.

    Lists of linears, of experts and of heads are left out, and so is a list of lists, which nobody
    calls.
    """
    lists: list[dict[str, nn.Module]] = []
    kinds: set[type[nn.Module]] = set()
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not _NO_BLOCKS.search(name):
            entries = {_join(name, key): m for key, m in module.named_children()}
            lists.append({key: m for key, m in entries.items() if _is_blocklike(m)})
            here = [type(m) for m in lists[-1].values()]
            if at_least > 1 or isinstance(module, nn.ModuleList):
                kinds.update(kind for kind in here if here.count(kind) >= at_least)
    return [name for entries in lists for name, m in entries.items() if type(m) in kinds]


def _is_blocklike(module: nn.Module) -> bool:
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
    return not is_list and sum(p.ndim > 1 for p in module.parameters()) > 1


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    kept: set[str] = set()
    for name in sorted(names, key=len):
        if _around(name, kept) is None:
            kept.add(name)
    return tuple(name for name in dict.fromkeys(names) if name in kept)


_HEAD = re.compile(
    r"(^|[._])(\w*heads?|classifiers?|score|pooler|pre_classifier|qa_outputs|embed\w*|wte|wpe"
    r"|shared|project_in|project_out|cls|summary)([._]|$)"
)
_NO_BLOCKS = re.compile(rf"experts?([._]|$)|{_HEAD.pattern}")


def _heads(
    modules: Mapping[str, nn.Module], blocks: Iterable[str], ties: Mapping[str, str]
) -> Iterator[str]:
    """Name what is a head or an embedding by its place, whatever it is called.

    That is what stands beside the base model (``base_model_prefix``), the output embeddings, and
    every linear that shares its weight with a table of embeddings.
    """
    names = {module: name for name, module in modules.items()}
    for name, module in modules.items():
        prefix = getattr(module, "base_model_prefix", None)
        base = _join(name, prefix) if prefix and isinstance(prefix, str) else None
        if base in modules and any(block.startswith(f"{base}.") for block in blocks):
            children = (_join(name, key) for key, _ in module.named_children())
            yield from (child for child in children if child != base)
        output = _output_embeddings(module)
        if output in names:
            yield names[output]
        if is_called_linear(module) and isinstance(modules.get(ties.get(name, "")), nn.Embedding):
            yield name


def _output_embeddings(module: nn.Module) -> nn.Module | None:
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except Exception:  # a model without any may raise what it likes
        return None


def _ties(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Map a module to another place that has itself or one of its matrices, where there is one."""
    places: dict[int, list[str]] = {}
    for name, module in modules.items():
        children: dict[str, nn.Module | None] = vars(module)["_modules"]  # with all duplicates
        for key, child in children.items():
            if child is not None:
                places.setdefault(id(child), []).append(_join(name, key))
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                places.setdefault(id(parameter), []).append(name)
    shared = [list(dict.fromkeys(names)) for names in places.values()]
    return {n: names[n == names[0]] for names in shared if len(names) > 1 for n in names}


def _block_sites(
    modules: Mapping[str, nn.Module], layout: Layout, parts: Sequence[Site]
) -> Iterator[Site]:
    for name in layout.blocks:
        if name in modules:
            inside = tuple(p for p in parts if p.block == name and p.role != "activation")
            yield Site(name, "block", modules[name], block=name, parts=inside)


def _whole(part: Part, modules: Mapping[str, nn.Module]) -> str:
    """Name the smallest module that computes all of a part, or its entry where the block does."""
    first, *others = part.modules.values()
    for name in reversed([n for n in path_of(first) if n.startswith(f"{part.block}.")][:-1]):
        is_called = not isinstance(modules.get(name), nn.ModuleList | nn.ModuleDict)
        if is_called and all(other.startswith(f"{name}.") for other in others):
            return name
    return part.entry


def _part_sites(modules: Mapping[str, nn.Module], layout: Layout) -> Iterator[Site]:
    """Yield attentions, FFNs and the activations of FFNs."""
    for part in layout.parts:
        if part.entry not in modules:
            continue
        names = {key: name for key, name in part.modules.items() if name in modules}
        children = {key: Child(name, modules[name]) for key, name in names.items()}
        yield Site(
            part.entry,
            part.role,
            modules[part.entry],
            children,
            part.also_replaced,
            block=part.block,
            tied_to=next((layout.ties[n] for n in names.values() if n in layout.ties), None),
            is_cross=part.is_cross,
            whole=_whole(part, modules),
        )
        if part.role == "mlp" and "activation" in children:
            name, module = children["activation"]
            yield Site(name, "activation", module, block=part.block)


def _leaf_sites(modules: Mapping[str, nn.Module], layout: Layout) -> Iterator[Site]:
    """Yield linears and norms, with what the block around them says of them."""
    blocks = set(layout.blocks)
    parts = {
        base_name(name): (part, key) for part in layout.parts for key, name in part.modules.items()
    }
    wholes = {part.entry: _whole(part, modules) for part in layout.parts}
    recomputable = set(wholes.values())
    for name, module in modules.items():
        is_linear = is_called_linear(module) or _is_called_factor(name, module)
        if not (is_linear or _is_norm(module)):
            continue
        block, base = _around(name, blocks), base_name(name)
        part, key = parts.get(base, (None, ""))
        yield Site(
            name,
            "linear" if is_linear else "norm",
            module,
            block=block,
            part=part and f"{part.role}.{key}",
            is_head_or_embedding=block is None and _is_head(name, layout),
            tied_to=None if is_factor(name) else layout.ties.get(base),
            unusable=(bypass(name, modules) or refusal(module)) if is_linear else None,
            is_frozen=_own_name(name) in layout.frozen,
            shared_input=_shared_input(name, part, key),
            whole=wholes[part.entry] if part else _around(name, recomputable) or "",
        )


def _is_called_factor(name: str, module: nn.Module) -> bool:
    """Return whether a module is a LoRA layer's factor of any class, but of a convolution."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return is_factor(name) and weight is not None and weight.ndim == 2


def _is_head(name: str, layout: Layout) -> bool:
    return bool(_HEAD.search(name)) or any(n in layout.heads for n in path_of(name))


def _reads_together(part: Part) -> tuple[str, ...]:
    if part.role == "mlp":
        return ("gate", "up")
    return ("key", "value") if part.is_cross else ("query", "key", "value")


def _shared_input(name: str, part: Part | None, key: str) -> str | None:
    """Return the key of the linears that read one input; a second factor reads its first's."""
    if part is None or key not in _reads_together(part) or is_second_factor(name):
        return None
    return f"{part.entry}:{name[len(base_name(name)) :]}"


_NORMS = (nn.LayerNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer or RMS norm: torch's own, or one that is called so."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
