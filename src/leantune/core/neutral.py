"""With neutral options a method must leave a model's output as it is: a check before conversion.

It finds what no name and no shape tells: attention whose masks would change, an FFN that computes
something more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.registry import MethodSpec
from leantune.core.rehearsal import Rehearsal, can_rehearse, rehearse
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.core.tensors import iter_tensors
from leantune.errors import LeantuneError


def refusals(model: nn.Module, spec: MethodSpec, sites: Sequence[Site]) -> dict[str, str]:
    """Return site -> why not, for sites where the method changes the output under neutral options.

    The model is run on its dummy inputs, plain and converted, and converted site by site where
    that differs; it is left as it was. A model that cannot be run so is not checked.
    """
    has_neutral = spec.axis == "evaluated" and spec.identity_options is not None
    if not (sites and has_neutral and can_rehearse(model)):
        return {}
    try:
        plain = rehearse(model)
    except LeantuneError:  # The model's own, or that of a method which awaits its calibration.
        return {}
    together = _refusal(model, spec, sites, plain)
    if together is None:
        return {}
    alone = {site.name: _refusal(model, spec, [site], plain) for site in sites}
    found = {name: reason for name, reason in alone.items() if reason is not None}
    return found or dict.fromkeys(alone, together)


def _refusal(
    model: nn.Module, spec: MethodSpec, sites: Sequence[Site], plain: Rehearsal
) -> str | None:
    config = spec.config(**(spec.identity_options or {}))
    conversion = spec.convert(model, list(sites), config, Runtime(model, seed=0))
    try:
        output = rehearse(model, plain.batch).output
    except LeantuneError as error:
        return str(error)
    finally:
        conversion.undo()
    if _is_close(output, plain.output):
        return None
    return "output must stay the same under neutral options, got another; leave it out with sites="


def _is_close(one: Any, other: Any) -> bool:
    """Return whether two outputs differ by no more than sums in another order do."""
    tensors = list(iter_tensors(one)), list(iter_tensors(other))
    return len(tensors[0]) == len(tensors[1]) and all(map(_are_close, *tensors))


def _are_close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool((a - b).norm() <= tolerance * b.norm())
