"""Batches shown to a model: no graph, no stream moved, modes put back, facts at hand."""

import pytest
import torch
from models import MODELS

import leantune as lt
from leantune.core.calibration import run_batches


def test_batches_run_without_a_trace() -> None:
    tiny = MODELS["bert"]
    model = tiny.build()
    runtime = lt.apply(model, lt.WTACRS(min_rows=2))._runtime
    model.bert.encoder.layer[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model.bert.register_forward_hook(
        lambda *_: seen.append(
            (
                torch.is_grad_enabled(),
                runtime.batch.real_rows(torch.Size([4, 8, 1])),
            )
        )
    )
    state, before = torch.get_rng_state(), runtime.batch
    facts = list(run_batches(model, runtime, [tiny.batch(0), tiny.batch(1)]))
    assert len(facts) == len(seen) == 2 and int(runtime.counter) == 0
    mask = tiny.batch()["attention_mask"].bool().flatten()
    assert all(not graph and torch.equal(m, mask) for graph, m in seen)
    assert runtime.batch is before and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and not runtime.is_exact


def test_modes_come_back_after_an_error() -> None:
    model = MODELS["bert"].build()
    runtime = lt.apply(model, lt.WTACRS(min_rows=2))._runtime
    with pytest.raises(ValueError, match="input_ids"):
        list(run_batches(model, runtime, [{"no_such_field": 1}]))
    assert all(m.training for m in model.modules())


def test_single_arguments() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    runtime = lt.apply(model, lt.WTACRS(min_rows=2))._runtime
    assert len(list(run_batches(model, runtime, [torch.randn(4, 3)]))) == 1
