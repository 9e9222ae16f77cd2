"""Clustering of rows into groups of equal size.

Legend: F rows (hidden units, say), G groups.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_ROUNDS = 20


def balanced_groups(features: Tensor, num_groups: int, start: Tensor) -> Tensor:
    """Cluster rows into groups of equal size and return the order that sorts them.

    Spherical k-means with a capacity: in each round the rows with the clearest preference choose
    first, each the nearest centre that has room.

    Args:
        features: (F, any), what rows are told apart by, up to its length.
        num_groups: G, divides F.
        start: (F,) distinct numbers; the rows with the smallest are the first centres.

    Returns:
        (F,) int64: the rows of group 0, then of group 1, ...; ascending within a group.

    Source: the balanced clustering of Zhang et al., "MoEfication", arXiv 2110.01786, section 3.2.
    """
    units = F.normalize(features.float(), dim=1)
    centres = units.index_select(0, start.argsort()[:num_groups])
    groups = None
    for _ in range(_MAX_ROUNDS):
        before, groups = groups, _fill(units @ centres.t())
        if before is not None and torch.equal(groups, before):
            break
        members = F.one_hot(groups, num_groups).to(units)  # (F, G)
        centres = F.normalize(members.t() @ units, dim=1)
    assert groups is not None
    return groups.argsort(stable=True)


def _fill(similarity: Tensor) -> Tensor:
    """Give every unit a group with room, (F,) int64, from similarities (F, G)."""
    num_rows, num_groups = similarity.shape
    top = similarity.topk(min(2, num_groups), dim=1).values
    first = (top[:, -1] - top[:, 0]).argsort(stable=True).tolist()
    wishes = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    room = [num_rows // num_groups] * num_groups
    groups = [0] * num_rows
    for unit in first:
        group = next(g for g in wishes[unit] if room[g])
        room[group] -= 1
        groups[unit] = group
    return torch.tensor(groups, device=similarity.device)
