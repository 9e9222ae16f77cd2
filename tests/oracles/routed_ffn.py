"""Routed feed-forward layers in float64, token by token and group by group, from the formulas.

Legend: n tokens, d model width, F hidden units, G groups, A active groups, r adapter rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Linear(NamedTuple):
    """Base weight (out, in), bias (out,) or None, and the adapter's a (r, in), b (out, r)."""

    weight: Array
    bias: Array | None = None
    a: Array | None = None
    b: Array | None = None
    scaling: float = 0.0


def relu(z: Array) -> Array:
    return np.maximum(z, 0.0)


def silu(z: Array) -> Array:
    return z / (1.0 + np.exp(-z))


def gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))


def sigmoid(z: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-z))


def best_groups(logits: Array, num_active: int) -> list[list[int]]:
    """Return, for every token, its groups with the largest logits; the lower one among equals."""
    return [
        sorted(sorted(range(len(row)), key=lambda g: (-row[g], g))[:num_active]) for row in logits
    ]


def gate_values(kind: str, p: Array, chosen: list[list[int]]) -> list[list[float]]:
    """Return the factor of every chosen group."""
    return [
        [{"none": 1.0, "output": 2.0 * row[g]}[kind] for g in groups]
        for row, groups in zip(p, chosen, strict=True)
    ]


def routed_ffn(
    x: Array,
    up: Linear,
    down: Linear,
    gate: Linear | None,
    act: Callable[[Array], Array],
    num_groups: int,
    chosen: list[list[int]],
    factors: list[list[float]],
    *,
    before_activation: bool = False,
    num_down_biases: int = 1,
) -> Array:
    """Return the layer's output, (n, d).

    Args:
        chosen: groups of each token.
        factors: what multiplies each group.
        before_activation: multiply the inputs of the activation as well; wrong.
        num_down_biases: how often the down bias is added; anything but 1 is wrong.
    """
    size = len(up.weight) // num_groups
    y = np.zeros((len(x), len(down.weight)))
    for t in range(len(x)):
        if down.bias is not None:
            y[t] += num_down_biases * down.bias
        for g, c in zip(chosen[t], factors[t], strict=True):
            units = slice(g * size, (g + 1) * size)
            hidden = act((c if before_activation else 1.0) * _outputs(gate or up, units, x[t]))
            if gate is not None:
                hidden = hidden * _outputs(up, units, x[t])
            part = down.weight[:, units] @ hidden
            if down.a is not None and down.b is not None:
                part = part + down.scaling * (down.b @ (down.a[:, units] @ hidden))
            y[t] += c * part
    return y


def compensated(
    y: Array, x: Array, read: Array, write: Array, chosen: list[list[int]], num_groups: int = 4
) -> Array:
    """Add to y (n, d) what stands in for each group that a token skips.

    Args:
        read: (G r, d), what a group's r numbers are read with.
        write: (G (1 + r), d), a group's constant and what its numbers add.
    """
    rank, y = len(read) // num_groups, y.copy()
    for t in range(len(x)):
        for g in set(range(num_groups)) - set(chosen[t]):
            own = write[g * (1 + rank) : (g + 1) * (1 + rank)]
            y[t] += own[0]
            for i in range(rank):
                y[t] += (read[g * rank + i] @ x[t]) * own[1 + i]
    return y


def _outputs(layer: Linear, units: slice, x: Array) -> Array:
    out = layer.weight[units] @ x
    if layer.bias is not None:
        out = out + layer.bias[units]
    if layer.a is not None and layer.b is not None:
        out = out + layer.scaling * (layer.b[units] @ (layer.a @ x))
    return out


def balance(p: Array, chosen: list[list[int]], real: list[bool]) -> float:
    """Return G / A sum_g f_g P_g over the real tokens."""
    num_groups, count = p.shape[1], sum(real)
    share, mean = np.zeros(num_groups), np.zeros(num_groups)
    for t in range(len(p)):
        if real[t]:
            share[chosen[t]] += 1.0 / count
            mean += p[t] / p[t].sum() / count
    return float(num_groups / len(chosen[0]) * (share * mean).sum())
