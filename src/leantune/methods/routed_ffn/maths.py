"""Pure functions of the routed FFN: choice of groups, gates, losses, splits and router start.

Legend: n tokens, d_model, F hidden units, G groups, A active groups, s calibration tokens.
"""

import torch
from torch import Tensor


def num_active_at(step: int, num_groups: int, num_active: int, warm_down_steps: int) -> int:
    """Return how many groups are active after ``step`` optimiser steps: from G down to A."""
    left = warm_down_steps - step
    if left <= 0:
        return num_active
    return num_active - (-(num_groups - num_active) * left // warm_down_steps)


def choose(logits: Tensor, num_active: int) -> Tensor:
    """Return the A groups with the largest logits, in ascending order; ties go to the lowest.

    Args:
        logits: (n, G).

    Returns:
        (n, A) int64.
    """
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    return order[:, :num_active].sort(dim=-1).values


def coefficients(gate: str, p: Tensor, chosen: Tensor) -> Tensor | None:
    """Return what multiplies each chosen group, (n, A), or None for nothing.

    ``output`` and ``spt``: ``2 p``; ``output_norm``: ``A p / sum of the chosen p``; ``ste``:
    ``1 + p - stopgrad(p)``, whose value is 1.

    Args:
        gate: one of the config's choices.
        p: (n, G) sigmoid of the logits.
        chosen: (n, A).
    """
    if gate == "none":
        return None
    picked = p.gather(1, chosen)
    if gate == "ste":
        return 1.0 + (picked - picked.detach())
    if gate == "output_norm":
        return picked.shape[1] * picked / picked.sum(-1, keepdim=True)
    return 2.0 * picked


def balance_loss(p: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``G / A * sum_g f_g P_g``: 1 where the load is even, up to G / A where it is not.

    ``f_g`` is the share of tokens that go to group g, ``P_g`` the mean over all tokens of ``p_g``
    normalised over groups. Only ``P`` has a gradient.

    Args:
        p: (n, G).
        chosen: (n, A).
        mask: (n,) bool, the tokens that count; None for all.

    Returns:
        () tensor.
    """
    weights = _token_weights(mask, p)
    share = weights @ torch.zeros_like(p).scatter_(1, chosen, 1.0)  # f, (G,)
    mean = weights @ (p / p.sum(-1, keepdim=True))  # P, (G,)
    return p.shape[1] / chosen.shape[1] * (share * mean).sum()


def z_loss(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean square of the logits (n, G) over tokens and groups: 0 where c is 1."""
    return _token_weights(mask, logits) @ logits.square().mean(-1)


def _token_weights(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return (n,) weights that sum to 1 over the tokens that count."""
    n = like.shape[0]
    if mask is None:
        return like.new_full((n,), 1.0 / n)
    return mask.to(like) / mask.sum().clamp(min=1)


def fit_router(x: Tensor, norms: Tensor, ridge: float, spread: float) -> tuple[Tensor, Tensor]:
    """Regress the norms of the groups' activations on the input: ``z = W x + b``.

    Ridge regression in its dual form, (s, s), of ``norms`` less their mean over groups, scaled so
    that the logits' spread is ``spread``: the order of groups is what counts, and gates start
    near 1.

    Args:
        x: (s, d_model) calibration inputs.
        norms: (s, G) of the groups' hidden activations.
        ridge: relative to the mean squared norm of the centred inputs.
        spread: root mean square of the targets.

    Returns:
        weight (G, d_model), bias (G,).

    Source: router regression as in Zheng et al., "Learn To be Efficient", arXiv 2402.06126.
    """
    x, norms = x.double(), norms.double()
    targets = norms - norms.mean(1, keepdim=True)
    targets = targets * (spread / targets.square().mean().sqrt().clamp(min=1e-30))
    mean_x, mean_t = x.mean(0), targets.mean(0)
    centred = x - mean_x
    kernel = centred @ centred.t()
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    damping = ridge * kernel.diagonal().mean().clamp(min=1e-30)
    weight = torch.linalg.solve(kernel + damping * eye, targets - mean_t).t() @ centred
    return weight, mean_t - weight @ mean_x
