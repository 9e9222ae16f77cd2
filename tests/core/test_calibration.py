"""Batches shown to a model: no graph, no stream moved, modes put back, facts at hand."""

import pytest
import torch
from models import MODELS

import leantune as lt
from leantune.core.calibration import run_batches, spread_rows


def test_batches_run_without_a_trace() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    model.bert.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model.bert.register_forward_hook(
        lambda *_: seen.append(
            (
                torch.is_grad_enabled(),
                session.batch.row_mask("attention_mask", torch.Size([4, 8, 1])),
            )
        )
    )
    state, before = torch.get_rng_state(), session.batch
    facts = list(run_batches(session, [tiny.batch(0), tiny.batch(1)]))
    assert len(facts) == len(seen) == 2 and session.draw == 0
    mask = tiny.batch()["attention_mask"].bool().flatten()
    assert all(not graph and torch.equal(m, mask) for graph, m in seen)
    assert session.batch is before and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and session.is_sampling


def test_modes_come_back_after_an_error() -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    with pytest.raises(ValueError, match="input_ids"):
        list(run_batches(session, [{"no_such_field": 1}]))
    assert all(m.training for m in model.modules())


def test_single_arguments() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    assert len(list(run_batches(session, [torch.randn(4, 3)]))) == 1


def test_spread_rows() -> None:
    x = torch.zeros(2, 5, 3)
    assert spread_rows(x, None, 20).tolist() == list(range(10))
    assert spread_rows(x, None, 5).tolist() == [0, 2, 4, 6, 8]
    mask = torch.tensor([False, True] * 5)
    assert spread_rows(x, mask, 20).tolist() == [1, 3, 5, 7, 9]
    assert spread_rows(x, mask, 2).tolist() == [1, 5]
    assert spread_rows(x, torch.zeros(10, dtype=torch.bool), 4).tolist() == []
