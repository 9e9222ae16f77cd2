"""What is still a session's own: nobody else's module is touched, and none of ours is idle."""

from collections.abc import Iterable, Sequence

from torch import nn

from leantune.core import registry
from leantune.core.conversion import Conversion
from leantune.core.linear import Ownership, cannot_train
from leantune.core.runtime import Runtime
from leantune.errors import SiteError, UnsupportedError

_ORDER = "let the other library go first (peft.get_peft_model, then leantune.apply on its model)"


def refuse_not_ours(
    who: str, model: nn.Module, conversions: Sequence[Conversion], runtime: Runtime
) -> None:
    """Raise where undoing the conversions would overwrite or leave behind what others made.

    Args:
        who: what was called; the first words of the error.
        model: the converted model.
        conversions: in the order in which they were made.
        runtime: of their session.

    Raises:
        UnsupportedError: others have replaced, copied or patched a converted module.
    """
    owned = Ownership(model)
    names = [name for c in reversed(conversions) for name in c.not_ours(owned)]
    names += _copies(model, runtime)
    if names:
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise UnsupportedError(
            f"{who}: converted modules must be where they were, or wrapped, got {len(names)} that "
            f"others have replaced, copied or patched since ({shown}); nothing was changed: take "
            "those changes back first"
        )


def refuse_idle(conversions: Iterable[Conversion]) -> None:
    """Raise where all weights that a method would act on are frozen.

    Raises:
        SiteError: there is such a method.
    """
    for conversion in conversions:
        modules = [site.module for site in conversion.sites]
        held = [p for module in modules for p in module.parameters(recurse=False)]
        is_idle = bool(held) and not any(p.requires_grad for p in held)
        if is_idle and registry.get(conversion.config.method).acts_on_weight:
            raise SiteError(
                f"{type(conversion.config).__name__}: sites must have a weight that trains, got "
                f"{len(conversion.sites)} whose weights are all frozen "
                f"({conversion.sites[0].name}, ...); unfreeze some, or {_ORDER}"
            )


def refuse_trained_bits(model: nn.Module) -> None:
    """Raise where a quantised weight is to train, which would get no gradient without a word.

    Raises:
        UnsupportedError: there is such a weight.
    """
    named = model.named_parameters()
    bits = [(n, p) for n, p in named if p.requires_grad and cannot_train(p)]
    if bits:
        name, weight = bits[0]
        raise UnsupportedError(
            f"apply: quantised weights must be frozen, got {len(bits)} that are to train ({name}, "
            f"{type(weight).__name__}, ...); freeze them with requires_grad_(False) and train "
            "leantune.LoRA beside them"
        )


def refuse_copies(model: nn.Module, runtime: Runtime) -> None:
    """Raise where a copy of a converted module would train in the model.

    Raises:
        SiteError: there is a copy, as of what peft trains as a whole.
    """
    copies = _copies(model, runtime)
    if copies:
        raise SiteError(
            f"session: converted modules must not be copied, got a copy at {copies[0]} "
            f"({len(copies)} such); {_ORDER}"
        )


def _copies(model: nn.Module, runtime: Runtime) -> list[str]:
    """Return the names of modules that are copies of converted ones, or another session's."""
    held = {name: vars(module).get("runtime") for name, module in model.named_modules()}
    return [n for n, r in held.items() if isinstance(r, Runtime) and r is not runtime]
