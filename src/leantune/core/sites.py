"""Where a method can act: sites, and the one table of architectures they are found by."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from leantune.core.config import SiteFilter
from leantune.core.swap import StoredConv1D, StoredLinear
from leantune.errors import SiteError

ROLES = ("linear", "mlp", "attention", "block")


@dataclass(frozen=True)
class Site:
    """One module that a method can act on.

    Args:
        name: the module's full name in the model.
        role: one of ``ROLES``.
        module: the module itself.
        parts: for attention, mlp: part (``query``, ``key``, ``value``, ``qkv``, ``output``;
            ``up``, ``gate``, ``down``, ``activation``, ``hidden_dropout``, ``output_dropout``)
            -> full module name.
        modules: part -> its module.
        bypass: modules that become the identity when ``module`` is replaced by one that computes
            the whole part (an FFN whose linears lie apart in their block).
        block: name of the enclosing block; None for a linear outside every known block.
        part: for a linear in a known block, which of those parts it is.
        reads: key that linears reading one and the same input share, or None.
        mask: batch field that marks the real rows (``attention_mask``), or None where unknown.
        is_cross: for attention, whether keys come from another sequence than queries.
    """

    name: str
    role: str
    module: nn.Module = field(repr=False)
    parts: Mapping[str, str] = field(default_factory=dict, repr=False)
    modules: Mapping[str, nn.Module] = field(default_factory=dict, repr=False, kw_only=True)
    bypass: tuple[str, ...] = ()
    block: str | None = None
    part: str | None = None
    reads: str | None = None
    mask: str | None = None
    is_cross: bool = False

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter held directly by the module trains."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    @property
    def is_head_or_embedding(self) -> bool:
        """Whether the name says head, classifier, pooler or embedding (outside known blocks)."""
        return self.block is None and bool(_HEAD.search(self.name))


_HEAD = re.compile(
    r"(^|[._])(\w*head|classifier|score|pooler|pre_classifier|qa_outputs|embed\w*|wte|wpe|shared"
    r"|project_in|project_out|cls|summary)([._]|$)"
)


@dataclass(frozen=True, kw_only=True)
class _Attention:
    entry: str
    parts: Mapping[str, str]
    cross: bool = False


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    entry: str
    parts: Mapping[str, str]
    bypass: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Layout of one block class: paths are relative to the block; those that do not exist in a
    given block (T5's cross attention in an encoder) are left out."""

    attention: tuple[_Attention, ...]
    mlp: tuple[_Mlp, ...]


def _attention(entry: str, query: str, key: str, value: str, output: str, cross: bool = False):
    names = {"query": query, "key": key, "value": value, "output": output}
    return _Attention(entry=entry, parts=names, cross=cross)


_BERT = _Block(
    attention=(
        _attention(
            "attention.self",
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        ),
        _attention(
            "crossattention.self",
            "crossattention.self.query",
            "crossattention.self.key",
            "crossattention.self.value",
            "crossattention.output.dense",
            cross=True,
        ),
    ),
    mlp=(
        _Mlp(
            entry="intermediate",
            parts={
                "up": "intermediate.dense",
                "down": "output.dense",
                "activation": "intermediate.intermediate_act_fn",
            },
            bypass=("output.dense",),
        ),
    ),
)
_LLAMA = _Block(
    attention=(
        _attention(
            "self_attn",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
    ),
    mlp=(
        _Mlp(
            entry="mlp",
            parts={
                "gate": "mlp.gate_proj",
                "up": "mlp.up_proj",
                "down": "mlp.down_proj",
                "activation": "mlp.act_fn",
            },
        ),
    ),
)


def _t5_attention(entry: str, cross: bool) -> _Attention:
    return _attention(entry, f"{entry}.q", f"{entry}.k", f"{entry}.v", f"{entry}.o", cross)


def _t5_mlp(entry: str) -> _Mlp:
    # `wi` in the plain layer; `wi_0` (gate) and `wi_1` (up) in the gated one.
    return _Mlp(
        entry=entry,
        parts={
            "up": f"{entry}.wi|{entry}.wi_1",
            "gate": f"{entry}.wi_0",
            "down": f"{entry}.wo",
            "activation": f"{entry}.act",
            "hidden_dropout": f"{entry}.dropout",
        },
    )


ARCHITECTURES: Mapping[str, _Block] = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "ElectraLayer": _BERT,
    "TransformerBlock": _Block(  # DistilBERT
        attention=(
            _attention(
                "attention",
                "attention.q_lin",
                "attention.k_lin",
                "attention.v_lin",
                "attention.out_lin",
            ),
        ),
        mlp=(
            _Mlp(
                entry="ffn",
                parts={
                    "up": "ffn.lin1",
                    "down": "ffn.lin2",
                    "activation": "ffn.activation",
                    "output_dropout": "ffn.dropout",
                },
            ),
        ),
    ),
    "T5Block": _Block(
        attention=(
            _t5_attention("layer.0.SelfAttention", cross=False),
            _t5_attention("layer.1.EncDecAttention", cross=True),
        ),
        mlp=(_t5_mlp("layer.1.DenseReluDense"), _t5_mlp("layer.2.DenseReluDense")),
    ),
    "GPT2Block": _Block(
        attention=(
            _Attention(entry="attn", parts={"qkv": "attn.c_attn", "output": "attn.c_proj"}),
            _Attention(
                entry="crossattention",
                parts={
                    "query": "crossattention.q_attn",
                    "key_value": "crossattention.c_attn",
                    "output": "crossattention.c_proj",
                },
                cross=True,
            ),
        ),
        mlp=(
            _Mlp(
                entry="mlp",
                parts={
                    "up": "mlp.c_fc",
                    "down": "mlp.c_proj",
                    "activation": "mlp.act",
                    "output_dropout": "mlp.dropout",
                },
            ),
        ),
    ),
    "OPTDecoderLayer": _Block(
        attention=(
            _attention(
                "self_attn",
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
            ),
        ),
        mlp=(
            _Mlp(
                entry="fc1",
                parts={"up": "fc1", "down": "fc2", "activation": "activation_fn"},
                bypass=("activation_fn", "fc2"),
            ),
        ),
    ),
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    # Mixtures of experts: their attention is known; their MLP has none of the parts.
    "MixtralDecoderLayer": _LLAMA,
    "Qwen2MoeDecoderLayer": _LLAMA,
    "Qwen3MoeDecoderLayer": _LLAMA,
}
"""Block class name -> layout. Support for one more architecture is one more entry here."""


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear: ``nn.Linear`` or transformers' ``Conv1D``.

    So is one that a method has converted already. Other subclasses are left alone: quantised or
    otherwise special linears compute something else.
    """
    is_ours = isinstance(module, StoredLinear | StoredConv1D)
    return is_ours or type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def find_sites(model: nn.Module) -> list[Site]:
    """List every site of ``model``, in the order of ``named_modules``.

    Linears are found in any ``nn.Module``; blocks, attention and MLPs in the architectures of
    ``ARCHITECTURES``.
    """
    modules = dict(model.named_modules())
    sites: list[Site] = []
    inputs: dict[str, str] = {}
    masks: dict[str, str] = {}
    parts: dict[str, str] = {}
    blocks = [n for n, m in modules.items() if type(m).__name__ in ARCHITECTURES]
    for name in blocks:
        for site in _block_sites(name, modules, inputs, masks):
            sites.append(site)
            parts.update({linear: part for part, linear in site.parts.items()})
    for name, module in modules.items():
        if is_linear(module):
            block = next((b for b in blocks if name.startswith(b + ".")), None)
            reads = _reads(name, inputs)
            # A mask is trusted inside a known block only: elsewhere rows may mean anything.
            mask = None if block is None else _prefix(name, masks) or _mask(block, modules)
            part = _prefix(name, parts)
            site = Site(name, "linear", module, block=block, part=part, reads=reads, mask=mask)
            sites.append(site)
    order = {name: i for i, name in enumerate(modules)}
    return sorted(sites, key=lambda s: order[s.name])


def _block_sites(
    name: str, modules: Mapping[str, nn.Module], inputs: dict[str, str], masks: dict[str, str]
) -> Iterator[Site]:
    """Yield one block's sites; note which linears read one input, and cross-attention masks."""
    layout = ARCHITECTURES[type(modules[name]).__name__]
    mask = _mask(name, modules)
    yield Site(name, "block", modules[name], block=name, mask=mask)
    for part in (*layout.attention, *layout.mlp):
        entry = f"{name}.{part.entry}"
        if entry not in modules:
            continue
        found = _existing(name, part.parts, modules)
        if isinstance(part, _Attention):
            together = ("key", "value") if part.cross else ("query", "key", "value")
            role, bypass = "attention", ()
            if part.cross:
                masks.update({found[p]: "attention_mask" for p in ("key", "value") if p in found})
        else:
            together, role = ("gate", "up"), "mlp"
            bypass = tuple(f"{name}.{path}" for path in part.bypass)
        inputs.update({found[p]: entry for p in together if p in found})
        inside = {p: modules[path] for p, path in found.items()}
        yield Site(
            entry,
            role,
            modules[entry],
            found,
            bypass,
            block=name,
            mask=mask,
            modules=inside,
            is_cross=isinstance(part, _Attention) and part.cross,
        )


def _existing(
    block: str, parts: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Resolve part paths, taking the first alternative (``a|b``) that exists."""
    found = {}
    for part, paths in parts.items():
        for path in paths.split("|"):
            if f"{block}.{path}" in modules:
                found[part] = f"{block}.{path}"
                break
    return found


def _mask(block: str, modules: Mapping[str, nn.Module]) -> str:
    """Name the batch field that marks real rows in a block: a decoder beside an encoder has its
    own; OPT calls all of itself a decoder."""
    is_decoder = (
        "decoder" in block.split(".") and type(modules[block]).__name__ != "OPTDecoderLayer"
    )
    return "decoder_attention_mask" if is_decoder else "attention_mask"


def _prefix(name: str, table: Mapping[str, str]) -> str | None:
    """Look up ``name`` or the wrapped linear that it is a factor of (``q_proj.lora_A.default``)."""
    for key, value in table.items():
        if name == key or name.startswith(key + "."):
            return value
    return None


def _reads(name: str, inputs: Mapping[str, str]) -> str | None:
    """Key of the linears that read one input; a LoRA layer's second factor reads its first's."""
    if ".lora_B." in name:
        return None
    for key, entry in inputs.items():
        if name == key or name.startswith(key + "."):
            return f"{entry}:{name[len(key) :]}"
    return None


def match_sites(
    sites: Iterable[Site], wanted: SiteFilter, default: Callable[[Site], bool], who: str
) -> list[Site]:
    """Select sites by role, pattern or predicate; ``None`` means ``default``.

    A pattern is a role name, a glob on the full name or on its last components (``query`` matches
    ``encoder.layer.0.attention.self.query``), or ``re:`` and a regular expression searched in the
    full name.

    Raises:
        SiteError: a pattern matches nothing.
    """
    sites = list(sites)
    if wanted is None:
        return [s for s in sites if default(s)]
    if callable(wanted):
        return [s for s in sites if wanted(s)]
    chosen: dict[str, Site] = {}
    for pattern in wanted:
        hits = [s for s in sites if _matches(s, pattern, who)]
        if not hits:
            shown = sorted({s.name for s in sites})
            more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
            raise SiteError(
                f"{who}: sites must match at least one module, got {pattern!r}, which matches "
                f"none; roles: {', '.join(ROLES)}; modules it can act on: "
                f"{', '.join(shown[:6]) or 'none'}{more}"
            )
        chosen.update({s.name: s for s in hits})
    return [s for s in sites if s.name in chosen]


def _matches(site: Site, pattern: str, who: str) -> bool:
    if pattern in ROLES:
        return site.role == pattern
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], site.name) is not None
        except re.error as error:
            raise SiteError(
                f"{who}: sites must hold valid regular expressions, got {pattern!r}: {error}"
            ) from error
    return fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.name, f"*.{pattern}")
