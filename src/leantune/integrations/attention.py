"""Where other attention meets transformers: its attention registry, and the models that use it.

Nothing of transformers is patched. A model's configuration names :func:`attend`, which hands the
call of a module to that module's child called ``CHILD``, if the module has such a child, and runs
SDPA everywhere else.
"""

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from leantune.errors import UnsupportedError

NAME = "leantune_attention"
"""The entry in transformers' registries of attention and mask functions."""

CHILD = "leantune_attention"
"""The child that computes a module's attention in ``forward``, or returns None for SDPA."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute one attention call of a transformers model by the module's child, or by SDPA.

    Args and returns: as transformers' attention functions; the output is (b, n, h, dv).

    Raises:
        UnsupportedError: the call of a module with a child asks for more than masks and dropout.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    child = module._modules.get(CHILD)
    if child is not None:
        asked = [n for n in ("softcap", "s_aux", "cache") if kwargs.get(n) is not None]
        if asked:
            raise UnsupportedError(
                f"attention: calls must be without {asked[0]} where a method computes them, got "
                f"one with it in {type(module).__name__}; leave such sites out with sites="
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        out = child(
            query,
            key,
            value,
            attention_mask,
            position_bias,
            is_causal=bool(causal),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
        )
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    how: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    how["position_bias"] = position_bias
    return sdpa_attention_forward(module, query, key, value, attention_mask, **how, **kwargs)  # type: ignore[return-value]


def register_interface() -> None:
    """Add :func:`attend` to transformers' attention functions, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def refusal(module: nn.Module) -> str | None:
    """Say why :func:`attend` cannot be called in the place of a module's attention, or None."""
    source = vars(sys.modules.get(type(module).__module__, sys))
    config = getattr(module, "config", None)
    if "ALL_ATTENTION_FUNCTIONS" not in source or config is None or head_width(module) is None:
        return (
            "module must compute attention through transformers' attention interface, got "
            f"{type(module).__name__}, which computes its own; leave it out with sites="
        )
    how = getattr(config, "_attn_implementation", None)
    if how not in (None, "sdpa", "eager", NAME):
        return (
            f"attn_implementation must be 'sdpa' or 'eager', got {how!r}; load the model with "
            "attn_implementation='sdpa'"
        )
    return None


def head_width(module: nn.Module) -> int | None:
    """Return the width of a module's query and key heads, or None where it does not say."""
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "qk_head_dim")
    return _first(names, module)


def num_key_heads(module: nn.Module, key: nn.Module | None) -> int | None:
    """Return the number of a module's key heads, or None where it does not say.

    Args:
        module: an attention module.
        key: its linear that makes keys alone, if there is one.
    """
    width, features = head_width(module), getattr(key, "out_features", None)
    if width is not None and features is not None:
        return features // width
    names = ("num_key_value_heads", "num_heads", "num_attention_heads")
    return _first(names, module, getattr(module, "config", None))


def _first(names: Iterable[str], *places: Any) -> int | None:
    found = (getattr(place, name, None) for name in names for place in places)
    return next((number for number in found if number is not None), None)


Redirected = list[tuple[Any, str | None]]
"""Configurations that name :func:`attend`, and what each of them named before."""


def redirect(model: nn.Module, names: Iterable[str]) -> Redirected:
    """Let the configurations of some modules, and of the models around them, name :func:`attend`.

    The models around a module make its masks, so both must agree.
    """
    register_interface()
    names = list(names)
    found: dict[int, Any] = {}
    for outer, module in model.named_modules():
        is_around = any(n == outer or not outer or n.startswith(f"{outer}.") for n in names)
        config = getattr(module, "config", None)
        if is_around and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    redirected = [(config, config._attn_implementation) for config in found.values()]
    for config in found.values():
        # The public setter reaches into all configurations below this one.
        config._attn_implementation_internal = NAME
    return redirected


def direct_back(redirected: Redirected) -> None:
    """Undo :func:`redirect`, except where somebody has chosen another attention since."""
    for config, before in redirected:
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = before
