"""How sites are found in a model: the table of architectures and the one search that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from leantune.core.adapters import base_name, is_second_factor
from leantune.core.linear import is_linear
from leantune.core.sites import Child, Site


@dataclass(frozen=True)
class _Part:
    """An attention or an MLP inside a block.

    Args:
        role: ``attention`` or ``mlp``.
        entry: path of the module that stands for it, relative to the block.
        paths: part -> path relative to the block; ``a|b`` takes the first that exists, and a part
            without one is left out.
        reads_together: the parts that read one input.
        is_cross: for attention, whether keys come from another sequence.
        also_replaced: paths of modules that belong to the part and lie beside ``entry``.
    """

    role: str
    entry: str
    paths: Mapping[str, str]
    reads_together: tuple[str, ...]
    is_cross: bool = False
    also_replaced: tuple[str, ...] = ()


def _attention(entry: str, prefix: str, names: str, output: str) -> _Part:
    """Describe self-attention with three projections, whose names are those of q, k and v."""
    paths = dict(zip(_QKV, [f"{prefix}.{name}" for name in names.split()], strict=True))
    return _Part("attention", entry, paths | {"output": output}, _QKV)


def _cross(part: _Part) -> _Part:
    return replace(part, reads_together=("key", "value"), is_cross=True)


def _mlp(entry: str, paths: Mapping[str, str], also_replaced: tuple[str, ...] = ()) -> _Part:
    return _Part("mlp", entry, paths, ("gate", "up"), also_replaced=also_replaced)


def _t5_mlp(entry: str) -> _Part:
    # `wi` in the plain layer; `wi_0` (gate) and `wi_1` (up) in the gated one.
    paths = {"up": f"{entry}.wi|{entry}.wi_1", "gate": f"{entry}.wi_0", "down": f"{entry}.wo"}
    inner = {"activation": f"{entry}.act", "hidden_dropout": f"{entry}.dropout"}
    return _mlp(entry, paths | inner)


_QKV = ("query", "key", "value")
_PROJ = "q_proj k_proj v_proj"
_BERT = (
    _attention("attention.self", "attention.self", "query key value", "attention.output.dense"),
    _cross(
        _attention(
            "crossattention.self",
            "crossattention.self",
            "query key value",
            "crossattention.output.dense",
        )
    ),
    _mlp(
        "intermediate",
        {
            "up": "intermediate.dense",
            "down": "output.dense",
            "activation": "intermediate.intermediate_act_fn",
        },
        also_replaced=("output.dense",),
    ),
)
_LLAMA = (
    _attention("self_attn", "self_attn", _PROJ, "self_attn.o_proj"),
    _mlp(
        "mlp",
        {
            "gate": "mlp.gate_proj",
            "up": "mlp.up_proj",
            "down": "mlp.down_proj",
            "activation": "mlp.act_fn",
        },
    ),
)
_DISTILBERT = (
    _attention("attention", "attention", "q_lin k_lin v_lin", "attention.out_lin"),
    _mlp(
        "ffn",
        {
            "up": "ffn.lin1",
            "down": "ffn.lin2",
            "activation": "ffn.activation",
            "output_dropout": "ffn.dropout",
        },
    ),
)
_T5 = (
    _attention(
        "layer.0.SelfAttention", "layer.0.SelfAttention", "q k v", "layer.0.SelfAttention.o"
    ),
    _cross(
        _attention(
            "layer.1.EncDecAttention",
            "layer.1.EncDecAttention",
            "q k v",
            "layer.1.EncDecAttention.o",
        )
    ),
    _t5_mlp("layer.1.DenseReluDense"),
    _t5_mlp("layer.2.DenseReluDense"),
)
_GPT2 = (
    _Part("attention", "attn", {"qkv": "attn.c_attn", "output": "attn.c_proj"}, ()),
    _Part(
        "attention",
        "crossattention",
        {
            "query": "crossattention.q_attn",
            "key_value": "crossattention.c_attn",
            "output": "crossattention.c_proj",
        },
        (),
        is_cross=True,
    ),
    _mlp(
        "mlp",
        {
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
            "activation": "mlp.act",
            "output_dropout": "mlp.dropout",
        },
    ),
)
_OPT = (
    _attention("self_attn", "self_attn", _PROJ, "self_attn.out_proj"),
    _mlp(
        "fc1",
        {"up": "fc1", "down": "fc2", "activation": "activation_fn"},
        also_replaced=("activation_fn", "fc2"),
    ),
)

ARCHITECTURES: Mapping[str, tuple[_Part, ...]] = {
    "bert.modeling_bert.BertLayer": _BERT,
    "roberta.modeling_roberta.RobertaLayer": _BERT,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "electra.modeling_electra.ElectraLayer": _BERT,
    "distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
    "t5.modeling_t5.T5Block": _T5,
    "gpt2.modeling_gpt2.GPT2Block": _GPT2,
    "opt.modeling_opt.OPTDecoderLayer": _OPT,
    "llama.modeling_llama.LlamaDecoderLayer": _LLAMA,
    "mistral.modeling_mistral.MistralDecoderLayer": _LLAMA,
    "qwen2.modeling_qwen2.Qwen2DecoderLayer": _LLAMA,
    "qwen3.modeling_qwen3.Qwen3DecoderLayer": _LLAMA,
    # Mixtures of experts: their attention is known; their MLP has none of the parts.
    "mixtral.modeling_mixtral.MixtralDecoderLayer": _LLAMA,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer": _LLAMA,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer": _LLAMA,
}
"""Block class, below ``transformers.models`` -> layout. One more architecture is one more entry.

The module path is part of the name: a user's own class of the same name has a layout of its own.
"""

_LIBRARY = "transformers.models."
# All of it is called a decoder, though it reads one sequence.
_DECODER_ONLY = "opt.modeling_opt.OPTDecoderLayer"


def find_sites(model: nn.Module) -> list[Site]:
    """List every site of ``model``, in the order of ``named_modules``.

    Linears and norms are found in any ``nn.Module``; blocks, attention, MLPs and their activations
    in the architectures of ``ARCHITECTURES``.
    """
    modules = dict(model.named_modules())
    finder = _Finder(modules)
    for name, module in modules.items():
        layout = ARCHITECTURES.get(_class_of(module))
        if layout is not None:
            finder.add_block(name, layout)
    for name, module in modules.items():
        finder.add_leaf(name, module)
    order = {name: i for i, name in enumerate(modules)}
    return sorted(finder.sites, key=lambda s: order[s.name])


def _class_of(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix(_LIBRARY)


class _Finder:
    """Collects sites, block by block, and what a block says of the linears inside it."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.sites: list[Site] = []
        self._blocks: list[str] = []
        self._parts: dict[str, str] = {}
        self._inputs: dict[str, str] = {}
        self._masks: dict[str, str] = {}

    def add_block(self, name: str, layout: tuple[_Part, ...]) -> None:
        """Add a block, its attention, its MLP and their activations."""
        mask = self._mask_of(name)
        self._blocks.append(name)
        self.sites.append(Site(name, "block", self.modules[name], block=name, mask_field=mask))
        for part in layout:
            if f"{name}.{part.entry}" in self.modules:
                self._add_part(name, part, mask)

    def _add_part(self, block: str, part: _Part, mask: str) -> None:
        entry, children = f"{block}.{part.entry}", self._children(block, part.paths)
        for name, child in children.items():
            self._parts[child.name] = f"{part.role}.{name}"
            if name in part.reads_together:
                self._inputs[child.name] = entry
                if part.is_cross:
                    self._masks[child.name] = "attention_mask"
        site = Site(
            entry,
            part.role,
            self.modules[entry],
            children,
            tuple(f"{block}.{path}" for path in part.also_replaced),
            block=block,
            mask_field=mask,
            is_cross=part.is_cross,
        )
        self.sites.append(site)
        if part.role == "mlp" and "activation" in children:
            name, module = children["activation"]
            self.sites.append(Site(name, "activation", module, block=block, mask_field=mask))

    def _children(self, block: str, paths: Mapping[str, str]) -> dict[str, Child]:
        found: dict[str, Child] = {}
        for part, alternatives in paths.items():
            names = [f"{block}.{path}" for path in alternatives.split("|")]
            name = next((name for name in names if name in self.modules), None)
            if name is not None:
                found[part] = Child(name, self.modules[name])
        return found

    def add_leaf(self, name: str, module: nn.Module) -> None:
        """Add a linear or a norm, wherever it lies."""
        if is_linear(module):
            role = "linear"
        elif _is_norm(module):
            role = "norm"
        else:
            return
        block = next((b for b in self._blocks if name.startswith(b + ".")), None)
        # A mask is trusted inside a known block only: elsewhere rows may mean anything.
        base = base_name(name)
        mask = None if block is None else self._masks.get(base) or self._mask_of(block)
        self.sites.append(
            Site(
                name,
                role,
                module,
                block=block,
                part=self._parts.get(base),
                shared_input=self._shared_input(name),
                mask_field=mask,
            )
        )

    def _mask_of(self, block: str) -> str:
        """Name the batch field that marks real rows; a decoder beside an encoder has its own."""
        is_decoder = "decoder" in block.split(".")
        if is_decoder and _class_of(self.modules[block]) != _DECODER_ONLY:
            return "decoder_attention_mask"
        return "attention_mask"

    def _shared_input(self, name: str) -> str | None:
        """Return the key of the linears that read one input; a second factor reads its first's."""
        base = base_name(name)
        if is_second_factor(name) or base not in self._inputs:
            return None
        return f"{self._inputs[base]}:{name[len(base) :]}"


_NORMS = (nn.LayerNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer or RMS norm: torch's own, or one that is called so."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
