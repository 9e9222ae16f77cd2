"""The table of architectures: where a block's attention and FFN lie, by module paths alone.

A line holds a role, the path of the module that stands for the part, and the paths of its modules,
all inside the block. A path that begins with a dot lies inside that first module; ``a|b`` is the
first that exists; a path in brackets may be missing. A line holds for a block that has all the rest
of its paths, whatever its class is called. The first line that names a module describes it.
"""

from collections.abc import Container
from typing import NamedTuple

from leantune.core.sites import Part

_TABLE = """
attention attention.self query=.query key=.key value=.value output=attention.output.dense
cross crossattention.self query=.query key=.key value=.value output=crossattention.output.dense
mlp intermediate up=.dense down=output.dense activation=.intermediate_act_fn

attention self_attn query=.q_proj key=.k_proj value=.v_proj output=.o_proj|.out_proj|.dense
attention self_attn qkv=.qkv_proj output=.o_proj
cross encoder_attn query=.q_proj key=.k_proj value=.v_proj output=.out_proj
mlp mlp|feed_forward gate=.gate_proj up=.up_proj down=.down_proj (activation)=.act_fn|.activation_fn
mlp mlp.shared_expert|mlp.shared_experts|feed_forward.shared_expert gate=.gate_proj up=.up_proj \
    down=.down_proj (activation)=.act_fn|.activation_fn
mlp mlp up=.up_proj down=.down_proj activation=.act_fn
mlp mlp up=.fc1 down=.fc2 activation=.activation_fn
mlp fc1 up=fc1 down=fc2 activation=activation_fn

attention attention query=.q_lin key=.k_lin value=.v_lin output=.out_lin
mlp ffn up=.lin1 down=.lin2 activation=.activation output_dropout=.dropout

attention layer.0.SelfAttention query=.q key=.k value=.v output=.o
cross layer.1.EncDecAttention query=.q key=.k value=.v output=.o
mlp layer.1.DenseReluDense|layer.2.DenseReluDense up=.wi down=.wo activation=.act \
    hidden_dropout=.dropout
mlp layer.1.DenseReluDense|layer.2.DenseReluDense gate=.wi_0 up=.wi_1 down=.wo activation=.act \
    hidden_dropout=.dropout

attention attn qkv=.c_attn output=.c_proj
cross crossattention query=.q_attn key_value=.c_attn output=.c_proj
mlp mlp up=.c_fc down=.c_proj activation=.act (output_dropout)=.dropout

attention attn|attn.attention query=.q_proj key=.k_proj value=.v_proj output=.out_proj
mlp mlp up=.fc_in down=.fc_out activation=.act output_dropout=.dropout

attention attention|self_attention qkv=.query_key_value output=.dense
mlp mlp up=.dense_h_to_4h down=.dense_4h_to_h activation=.act

attention attention query=.q_proj key=.k_proj value=.v_proj output=.o_proj
attention attn qkv=.Wqkv|.qkv output=.out_proj|.Wo|.proj
"""


class _Line(NamedTuple):
    role: str
    entries: list[str]
    paths: dict[str, list[str]]


def _line(text: str) -> _Line:
    role, entries, *parts = text.split()
    paths = dict(part.split("=") for part in parts)
    return _Line(role, entries.split("|"), {k: path.split("|") for k, path in paths.items()})


ARCHITECTURES = tuple(_line(text) for text in _TABLE.splitlines() if text)


def parts_of(block: str, names: Container[str]) -> list[Part]:
    """List the attentions and FFNs that the table sees in a block.

    Args:
        block: full name of the block.
        names: full names of all modules of the model.
    """
    found: dict[str, Part] = {}
    for line in ARCHITECTURES:
        for entry in line.entries:
            part = _fit(block, entry, line, names)
            if part is not None:
                found.setdefault(part.entry, part)
                break
    return list(found.values())


def _fit(block: str, entry: str, line: _Line, names: Container[str]) -> Part | None:
    """Return the part that a line describes at ``entry``, or None where a path is missing."""
    inside = f"{block}.{entry}"
    if inside not in names:
        return None
    modules: dict[str, str] = {}
    for key, paths in line.paths.items():
        full = [f"{inside}{path}" if path[0] == "." else f"{block}.{path}" for path in paths]
        name = next((name for name in full if name in names), None)
        if name is not None:
            modules[key.strip("()")] = name
        elif key[0] != "(":
            return None
    if line.role != "mlp":
        return Part("attention", inside, block, modules, is_cross=line.role == "cross")
    beside = [n for n in modules.values() if n != inside and not n.startswith(f"{inside}.")]
    return Part("mlp", inside, block, modules, also_replaced=tuple(sorted(beside)))
