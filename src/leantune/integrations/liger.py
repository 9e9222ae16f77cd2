"""Where Liger's kernels meet one model: what Liger's own functions would set on its modules.

Liger has a function for each architecture. It patches the modules of a model that it is given, and
replaces classes and functions in transformers, and at times in torch, for every model after it.
Here it runs to be read: whatever it sets, inside the model and outside, is taken back at once.
"""

import inspect
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from leantune.errors import UnsupportedError


class Patch(NamedTuple):
    """What Liger sets on one module.

    Args:
        site: the module that computes another way; for the loss, the output head.
        owner: the module that gets the attributes: the same one, or the model.
        attributes: name -> value, methods bound to the owner.
    """

    site: nn.Module
    owner: nn.Module
    attributes: dict[str, Any]


def find_patches(model: nn.Module) -> list[Patch]:
    """Return what Liger would set on the modules of a model; nothing is changed.

    Args:
        model: one of transformers, or around one.

    Raises:
        UnsupportedError: Liger does not know the type of the model, or fails on it.
    """
    from liger_kernel.transformers import monkey_patch as liger  # type: ignore  # Linux has it
    from transformers import PreTrainedModel

    table: dict[str, Any] = liger.MODEL_TYPE_TO_APPLY_LIGER_FN
    target = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    kind: Any = None if target is None else target.config.model_type
    if target is None or kind not in table:
        raise UnsupportedError(
            f"Liger: model must be of a type that Liger knows, got {kind or type(model).__name__}; "
            f"leave Liger out (types: {', '.join(sorted(table))})"
        )
    head = target.get_output_embeddings()
    fuses = inspect.signature(table[kind]).parameters.get("fused_linear_cross_entropy")
    # A classifier's loss, and a subclass's, may be another than Liger's.
    has_its_loss = head is not None and type(target).__module__.startswith(_MODELS)
    is_fused = has_its_loss and fuses is not None and fuses.default is True
    before = [(module, dict(vars(module))) for module in target.modules()]
    try:
        with _put_back_outside(type(module) for module, _ in before):
            # Rotary embeddings, the plain loss and squared ReLU exist for all models at once only.
            liger._apply_liger_kernel_to_instance(
                target,
                rope=False,
                cross_entropy=False,
                relu_squared=False,
                fused_linear_cross_entropy=is_fused,
            )
        after = [(module, dict(vars(module))) for module, _ in before]
    except Exception as error:  # whatever Liger meets in a model that is built in another way
        raise UnsupportedError(
            f"Liger: model must be built as Liger knows its type, got {type(error).__name__} for "
            f"{kind!r}: {error}; leave Liger out"
        ) from error
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
    patches: list[Patch] = []
    for (module, old), (_, new) in zip(before, after, strict=True):
        found = {k: v for k, v in new.items() if k not in old or old[k] is not v}
        site = head if module is target and head is not None else module
        if "forward" in found:
            patches.append(Patch(site, module, found))
    return patches


def is_ligers(module: nn.Module) -> bool:
    """Return whether a module computes by Liger already, by its class or patched by itself."""
    forward = vars(module).get("forward", type(module).forward)
    return getattr(forward, "__module__", "").startswith("liger_kernel.")


_MODELS = "transformers.models."


@contextmanager
def _put_back_outside(kinds: Iterable[type]) -> Generator[None]:
    """Put back what is replaced inside in transformers' models, in torch.nn and in some classes."""
    modules = [m for name, m in sys.modules.items() if name.startswith(_MODELS)]
    before = [(p, dict(vars(p))) for p in (*modules, nn, nn.functional, *set(kinds))]
    try:
        yield
    finally:
        for place, attributes in before:
            now = vars(place)
            for name, value in attributes.items():
                if now.get(name) is not value:
                    setattr(place, name, value)
