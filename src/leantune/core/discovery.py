"""How sites are found in a model: the table of architectures and the one search that reads it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from leantune.core.adapters import is_second_factor
from leantune.core.linear import is_linear
from leantune.core.sites import Child, Site


@dataclass(frozen=True, kw_only=True)
class _Attention:
    entry: str
    parts: Mapping[str, str]
    cross: bool = False


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    entry: str
    parts: Mapping[str, str]
    also_replaced: tuple[str, ...] = ()


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
            also_replaced=("output.dense",),
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
    "bert.modeling_bert.BertLayer": _BERT,
    "roberta.modeling_roberta.RobertaLayer": _BERT,
    "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "electra.modeling_electra.ElectraLayer": _BERT,
    "distilbert.modeling_distilbert.TransformerBlock": _Block(
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
    "t5.modeling_t5.T5Block": _Block(
        attention=(
            _t5_attention("layer.0.SelfAttention", cross=False),
            _t5_attention("layer.1.EncDecAttention", cross=True),
        ),
        mlp=(_t5_mlp("layer.1.DenseReluDense"), _t5_mlp("layer.2.DenseReluDense")),
    ),
    "gpt2.modeling_gpt2.GPT2Block": _Block(
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
    "opt.modeling_opt.OPTDecoderLayer": _Block(
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
                also_replaced=("activation_fn", "fc2"),
            ),
        ),
    ),
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

    def add_block(self, name: str, layout: _Block) -> None:
        """Add a block, its attention, its MLP and their activations."""
        mask = self._mask_of(name)
        self._blocks.append(name)
        self.sites.append(Site(name, "block", self.modules[name], block=name, mask_field=mask))
        for part in (*layout.attention, *layout.mlp):
            if f"{name}.{part.entry}" in self.modules:
                self._add_part(name, part, mask)

    def _add_part(self, block: str, part: _Attention | _Mlp, mask: str) -> None:
        entry = f"{block}.{part.entry}"
        children = self._children(block, part.parts)
        is_cross = isinstance(part, _Attention) and part.cross
        also_replaced: tuple[str, ...] = ()
        if isinstance(part, _Attention):
            role, together = "attention", ("key", "value") if is_cross else _READ_TOGETHER
        else:
            role, together = "mlp", ("gate", "up")
            also_replaced = tuple(f"{block}.{path}" for path in part.also_replaced)
        for name, child in children.items():
            self._parts[child.name] = f"{role}.{name}"
            if name in together:
                self._inputs[child.name] = entry
                if is_cross:
                    self._masks[child.name] = "attention_mask"
        self.sites.append(
            Site(
                entry,
                role,
                self.modules[entry],
                children,
                also_replaced,
                block=block,
                mask_field=mask,
                is_cross=is_cross,
            )
        )
        if role == "mlp" and "activation" in children:
            name, module = children["activation"]
            self.sites.append(Site(name, "activation", module, block=block, mask_field=mask))

    def _children(self, block: str, parts: Mapping[str, str]) -> dict[str, Child]:
        """Resolve part paths, taking the first alternative (``a|b``) that exists."""
        found: dict[str, Child] = {}
        for part, paths in parts.items():
            for path in paths.split("|"):
                name = f"{block}.{path}"
                if name in self.modules:
                    found[part] = Child(name, self.modules[name])
                    break
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
        mask = None if block is None else _lookup(name, self._masks) or self._mask_of(block)
        self.sites.append(
            Site(
                name,
                role,
                module,
                block=block,
                part=_lookup(name, self._parts),
                shared_input=self._shared_input(name),
                mask_field=mask,
            )
        )

    def _mask_of(self, block: str) -> str:
        """Name the batch field that marks real rows in a block: a decoder beside an encoder has
        its own."""
        is_decoder = "decoder" in block.split(".")
        if is_decoder and _class_of(self.modules[block]) != _DECODER_ONLY:
            return "decoder_attention_mask"
        return "attention_mask"

    def _shared_input(self, name: str) -> str | None:
        """Return the key of the linears that read one input; a second factor reads its first's."""
        if is_second_factor(name):
            return None
        for key, entry in self._inputs.items():
            if name == key or name.startswith(key + "."):
                return f"{entry}:{name[len(key) :]}"
        return None


_READ_TOGETHER = ("query", "key", "value")
_NORMS = (nn.LayerNorm, nn.RMSNorm)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer or RMS norm: torch's own, or one that is called so."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _lookup(name: str, table: Mapping[str, str]) -> str | None:
    """Look up ``name`` or the wrapped linear that it is a factor of (``q_proj.lora_A.default``)."""
    for key, value in table.items():
        if name == key or name.startswith(key + "."):
            return value
    return None
