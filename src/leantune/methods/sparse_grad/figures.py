"""What a run's report shows of SparseGrad: how well its bases gather the gradient's energy.

Legend: d_out and d_in the sides of a weight; a basis has its vectors as columns.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leantune.core.registry import Figure
from leantune.core.session import Session
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.conversion import (
    Conversion,
    Grams,
    add_to_grams,
    bases_of,
    conversions,
)
from leantune.methods.sparse_grad.layer import Bases, Layer, not_calibrated

_TITLE = "Gradient energy in the largest entries"
ORIGINAL, ONE_SIDED, SHARED, OWN = "original", "one-sided", "right, shared", "right, per layer"


def figures(session: Session, calibration: list[Any], held_out: list[Any]) -> list[Figure]:
    """Return the share of gradient energy in the largest entries, by basis; leaves no trace.

    ``energy_share`` of held-out gradients (d_out, d_in): as they are ("original"), rotated on the
    output side ("one-sided"), and on both sides, by the bases that all layers of a type share
    ("right, shared") and by those of the layer alone ("right, per layer"). As many entries count as
    train. The mean is over batches and over one layer of each type and shape, the middle one. With
    ``basis="layer"`` there is no shared basis, hence no such bar.

    A basis that the session does not hold is computed from the calibration batches again, by two
    eigendecompositions: that of each measured layer, and with ``selection="block"``, which keeps
    leading vectors only, the shared one, too.

    Args:
        session: a calibrated one.
        calibration: the batches that it was calibrated on; may be more.
        held_out: others.

    Returns:
        One figure, or none where no held-out gradient has a finite share.

    Raises:
        ConfigError: the session is not calibrated.
    """
    shares: dict[str, list[Tensor]] = {}
    densities: list[float] = []
    for change in conversions(session):
        if not change.is_calibrated:
            raise not_calibrated()
        bases = _bases(change, calibration[: change.config.num_calibration_steps])
        densities += [_density(layer) for layer in change.layers if layer.name in bases]

        def add(layer: Layer, grad: Tensor, bases: Any = bases) -> None:
            if layer.name in bases:
                for label, matrix in _rotated(grad, bases[layer.name]).items():
                    share = maths.energy_share(matrix, _density(layer))
                    shares.setdefault(label, []).append(share)

        change.show(held_out, add)
    # A gradient of zero has no share.
    values = {label: torch.stack(found).nanmean().item() for label, found in shares.items()}
    if not values or not all(map(math.isfinite, values.values())):
        return []
    note = _note(densities, len(held_out), SHARED in values)
    return [Figure(title=_TITLE, note=note, values=values)]


def _bases(change: Conversion, calibration: list[Any]) -> dict[str, dict[str, Bases]]:
    """Return measured layer -> label -> complete bases, the shared ones first."""
    kinds: dict[str, list[Layer]] = {}
    for layer in change.layers:
        kinds.setdefault(layer.kind, []).append(layer)
    measured = [layers[len(layers) // 2] for layers in kinds.values()]
    is_complete = change.config.selection != "block"
    held = {layer.group: layer.bases for layer in measured if layer.bases and is_complete}
    missing = {key for layer in measured for key in (layer.name, layer.group)} - held.keys()
    found = held | _calibrated(change, calibration, missing)
    return {
        layer.name: ({} if layer.group == layer.name else {SHARED: found[layer.group]})
        | {OWN: found[layer.name]}
        for layer in measured
    }


def _calibrated(change: Conversion, batches: list[Any], keys: set[str]) -> dict[str, Bases]:
    """Return the bases of layers and groups of layers, as calibration finds them."""
    grams: Grams = {}

    def add(layer: Layer, grad: Tensor) -> None:
        for key in keys & {layer.name, layer.group}:
            add_to_grams(grams, key, grad, change.config.normalize)

    if keys:
        change.show(batches, add)
    return bases_of(grams)


def _rotated(grad: Tensor, bases: Mapping[str, Bases]) -> dict[str, Tensor]:
    """Return label -> the gradient (d_out, d_in) in that basis."""
    found = {ORIGINAL: grad}
    for label, pair in bases.items():
        q_out, q_in = pair.on(grad)
        found.setdefault(ONE_SIDED, q_out.mT @ grad.to(q_out.dtype))
        found[label] = maths.rotate(grad, q_out, q_in)
    return found


def _density(layer: Layer) -> float:
    return layer.num_entries / math.prod(layer.shape)


def _note(densities: list[float], num_batches: int, has_shared: bool) -> str:
    whose = "all layers of a type or of the layer alone" if has_shared else "the layer alone"
    low, high = (f"{100 * end:.2g}" for end in (min(densities), max(densities)))
    return (
        "Share of a weight gradient's sum of squares in its largest entries, as many as train "
        f"({low if low == high else f'{low} to {high}'} %), before step 1: as it is, rotated on "
        f"the output side only, and on both sides, by bases of {whose}. Layers measured: "
        f"{len(densities)}, one of each type; batches, not seen in calibration: {num_batches}."
    )
