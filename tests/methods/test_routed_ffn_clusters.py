"""Balanced clustering: equal groups, what belongs together together, the same on every run."""

import pytest
import torch

from leantune.methods.routed_ffn.clusters import balanced_groups


@pytest.mark.parametrize(("num_rows", "num_groups"), [(12, 3), (12, 12), (12, 1), (64, 4)])
def test_groups_are_an_order_of_all_rows(num_rows: int, num_groups: int) -> None:
    features, start = torch.randn(num_rows, 5), torch.rand(num_rows)
    order = balanced_groups(features, num_groups, start)
    assert order.sort().values.tolist() == list(range(num_rows))
    groups = order.view(num_groups, -1)
    assert (groups.diff(dim=1) > 0).all()
    assert torch.equal(order, balanced_groups(features, num_groups, start))


def test_rows_that_point_alike_end_in_one_group() -> None:
    centres = torch.eye(4).repeat_interleave(2, 1)
    labels = torch.arange(40) % 4
    features = centres[labels] * (1 + torch.rand(40, 1)) + 0.1 * torch.randn(40, 8)
    # One start in each cluster: k-means finds the nearest optimum, whichever it is.
    start = torch.arange(40.0)
    found = labels[balanced_groups(features, 4, start)].view(4, 10)
    assert (found == found[:, :1]).all()
    shuffled = labels[balanced_groups(features[torch.randperm(40)], 4, start)].view(4, 10)
    assert not (shuffled == shuffled[:, :1]).all()


def test_capacity_holds_where_all_rows_are_alike() -> None:
    features = torch.ones(8, 3)
    order = balanced_groups(features, 2, torch.arange(8.0))
    assert order.sort().values.tolist() == list(range(8))
    assert torch.isfinite(features[order]).all()
    assert balanced_groups(torch.zeros(8, 3), 2, torch.arange(8.0)).sort().values.tolist() == list(
        range(8)
    )
