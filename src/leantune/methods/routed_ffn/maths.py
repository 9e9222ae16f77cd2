"""Pure functions of the routed FFN: choice of groups, balance loss and the router's start.

Legend: n tokens, d_model, G groups, A active groups, s calibration tokens.
"""

import torch
from torch import Tensor


def choose(logits: Tensor, num_active: int) -> Tensor:
    """Return the A groups with the largest logits, the largest first; ties go to the lowest.

    Args:
        logits: (n, G).

    Returns:
        (n, A) int64.
    """
    return logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :num_active]


def balance_loss(p: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``G / A * sum_g f_g P_g``: 1 where the load is even, up to G / A where it is not.

    ``f_g`` is the share of tokens that go to group g, ``P_g`` the mean over all tokens of ``p_g``
    normalised over groups. Only ``P`` has a gradient.

    Args:
        p: (n, G), sigmoid of the logits.
        chosen: (n, A).
        mask: (n,) bool, the tokens that count; None for all.

    Returns:
        () tensor.
    """
    n, num_groups = p.shape
    weights = p.new_full((n,), 1.0 / n) if mask is None else mask.to(p) / mask.sum().clamp(min=1)
    share = torch.zeros_like(p).scatter_(1, chosen, 1.0).t().mv(weights)  # f, (G,)
    mean = (p / p.sum(-1, keepdim=True)).t().mv(weights)  # P, (G,)
    return num_groups / chosen.shape[1] * share.dot(mean)


def evenly_spaced_rows(x: Tensor, mask: Tensor | None, num_rows: int) -> Tensor:
    """Return the numbers of at most ``num_rows`` real rows, evenly spaced among them; ascending.

    Args:
        x: (..., d).
        mask: bool, one for each row of ``x``: which are real; None for all.
    """
    total = x.shape[:-1].numel()
    rows = torch.arange(total, device=x.device) if mask is None else mask.nonzero().flatten()
    wanted = min(len(rows), num_rows)
    return rows[torch.arange(wanted, device=x.device) * len(rows) // max(wanted, 1)]


def fit_router(x: Tensor, norms: Tensor, ridge: float, spread: float) -> tuple[Tensor, Tensor]:
    """Regress the norms of the groups' activations on the input: ``z = W x + b``.

    Ridge regression of ``norms`` less their mean over groups, scaled so that the logits' spread is
    ``spread``: the order of groups is what counts.

    Args:
        x: (s, d_model) calibration inputs.
        norms: (s, G) of the groups' hidden activations.
        ridge: relative to the mean squared norm of the centred inputs.
        spread: root mean square of the targets.

    Returns:
        weight (G, d_model), bias (G,).

    Source: router regression as in Zheng et al., "Learn To be Efficient", arXiv 2402.06126.
    """
    norms = norms.double()
    targets = norms - norms.mean(1, keepdim=True)
    targets = targets * (spread / targets.square().mean().sqrt().clamp(min=1e-30))
    return ridge_regression(x, targets, ridge)


def ridge_regression(x: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Regress targets on inputs, with a bias, in the dual form, (s, s); in float64.

    Args:
        x: (s, d_in).
        targets: (s, d_out).
        ridge: relative to the mean squared norm of the centred inputs.

    Returns:
        weight (d_out, d_in), bias (d_out,).
    """
    x, targets = x.double(), targets.double()
    mean_x, mean_t = x.mean(0), targets.mean(0)
    centred = x - mean_x
    kernel = centred @ centred.t()
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    damping = ridge * kernel.diagonal().mean().clamp(min=1e-30)
    weight = torch.linalg.solve(kernel + damping * eye, targets - mean_t).t() @ centred
    return weight, mean_t - weight @ mean_x
