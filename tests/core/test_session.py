"""The session: draws, batch facts, sample ids, and the exact computation on demand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MODELS, NUM_SAMPLES
from torch import Tensor, nn

import leantune as lt
from leantune.core.batch import IGNORED_LABEL, Batch
from leantune.errors import ConfigError, UnsupportedError

TINY = MODELS["bert"]


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def make(**options: Any) -> tuple[nn.Module, lt.Session]:
    model = TINY.build()
    return model, lt.apply(model, lt.WTACRS(min_rows=2, **options))


def test_draw_counts_training_forwards_only() -> None:
    model, session = make()
    batch = TINY.batch()
    assert session.draw == 0
    model(**batch)
    assert session.draw == 1
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    assert session.draw == 1
    model.train()
    model(**batch)
    assert session.draw == 2


def test_accumulated_micro_batches_draw_anew() -> None:
    model, _ = make(norms="activation")
    batch = TINY.batch()
    model(**batch).loss.backward()
    first = grads(model)
    model(**batch).loss.backward()
    second = [total - one for total, one in zip(grads(model), first, strict=True)]
    assert any(not torch.allclose(a, b) for a, b in zip(first, second, strict=True))


def test_two_forwards_before_their_backwards_keep_their_own_draws() -> None:
    """The order of the backwards does not matter."""
    results = []
    for order in ((0, 1), (1, 0)):
        model, _ = make(norms="activation")
        losses = [model(**TINY.batch(i)).loss for i in range(2)]
        for i in order:
            losses[i].backward()
        results.append(grads(model))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*results, strict=True))


def test_exact_runs_the_plain_computation() -> None:
    model, session = make()
    plain = TINY.build()
    batch = TINY.batch()
    plain(**batch).loss.backward()
    with session.exact():
        assert not session.is_sampling
        model(**batch).loss.backward()
    assert session.is_sampling
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(plain), strict=True))
    with pytest.raises(RuntimeError), session.exact():
        raise RuntimeError
    assert session.is_sampling


def test_sample_id_is_consumed_by_every_model() -> None:
    """A model that knows no such argument never sees it, in training and in evaluation."""
    model, _ = make()
    model(**TINY.batch(), sample_id=torch.arange(NUM_SAMPLES))
    model.eval()
    model(**TINY.batch(), sample_id=torch.arange(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (None, "sample_id must be in every training batch .* got None"),
        ([0, 1, 2, 3], r"sample_id must be in every training batch .* got \[0, 1, 2, 3\]"),
        (torch.tensor([0, 1, 2, 9]), "sample_id must be at least 0 and below 9, got 9"),
        (torch.tensor([0, -1, 2, 3]), "sample_id must be at least 0 and below 9, got -1"),
        (torch.tensor([0, 1, 0, 3]), "distinct within a batch, got 0 more than once"),
        (torch.tensor([], dtype=torch.int64), "must not be empty, got a batch of no samples"),
    ],
)
def test_bad_sample_ids(ids, match) -> None:
    model, session = make(norms="cache")
    session.num_samples = 9
    with pytest.raises(ConfigError, match=match):
        model(**TINY.batch(), sample_id=ids)


def test_missing_sample_id_names_the_way_out() -> None:
    model, _ = make(norms="cache")
    with pytest.raises(
        ConfigError, match=r"leantune\.with_sample_ids.*remove_unused_columns=False"
    ):
        model(**TINY.batch())


def test_sample_ids_are_not_needed_where_nothing_is_sampled() -> None:
    model, session = make(norms="cache")
    with session.exact():
        model(**TINY.batch())
    model.eval()
    model(**TINY.batch())
    for options in ({"norms": "cache", "draw_at": "backward"}, {"norms": "running"}):
        other, other_session = make(**options)
        other(**TINY.batch())
        assert not other_session.needs_sample_ids


def test_hooks_end_with_the_session() -> None:
    model, session = make()
    session.remove()
    model(**TINY.batch())
    assert session.draw == 0 and not model._forward_hooks and not model._forward_pre_hooks
    session.remove()


def row_mask(batch: Batch, name: str, shape: tuple[int, ...]) -> Tensor:
    mask = batch.row_mask(name, torch.Size((*shape, 16)))
    assert mask is not None
    return mask.view(shape)


def test_masks_of_a_classifier() -> None:
    model, session = make()
    batch = TINY.batch()
    model(**batch)
    wanted = batch["attention_mask"].bool()
    assert torch.equal(row_mask(session.batch, "attention_mask", wanted.shape), wanted)
    assert session.batch.row_mask("attention_mask", torch.Size((3, 2, 16))) is None
    assert session.batch.row_mask(None, torch.Size((*wanted.shape, 16))) is None
    assert session.batch.row_mask("decoder_attention_mask", torch.Size((4, 8, 16))) is None


def test_padding_with_a_label_is_no_padding() -> None:
    tiny = MODELS["llama"]
    model = tiny.build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    batch = tiny.batch()
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    batch["labels"][1, 6] = 5  # sample 1 has five real tokens
    model(**batch)
    wanted = batch["attention_mask"].bool()
    # Scored against its own label or, shifted, against the next one.
    wanted[1, 6] = wanted[1, 5] = True
    assert torch.equal(row_mask(session.batch, "attention_mask", wanted.shape), wanted)


def test_batch_of_an_evaluation_does_not_replace_the_training_batch() -> None:
    model, session = make()
    model(**TINY.batch(), sample_id=torch.arange(NUM_SAMPLES))
    held = session.batch
    model.eval()
    model(**TINY.batch(1))
    assert session.batch is held


def test_optimizer_takes_what_trains() -> None:
    model = TINY.build()
    session = lt.apply(model, lt.LoRA(rank=2))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert optimizer.defaults["lr"] == 0.5
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="must have a trainable parameter, got none"):
        session.optimizer()


def test_auxiliary_losses_are_those_of_the_last_forward() -> None:
    model, session = make()
    assert session.auxiliary_loss().item() == 0.0
    terms = [2.0, 0.5]

    def add(*args: object) -> None:
        for term in terms:
            session.add_auxiliary_loss(torch.tensor(term))

    model.bert.register_forward_hook(add)
    model(**TINY.batch())
    assert session.auxiliary_loss().item() == 2.5
    terms.clear()
    model(**TINY.batch())
    assert session.auxiliary_loss().item() == 0.0


def test_auxiliary_loss_counts_inside_a_training_forward_only() -> None:
    """Outside lies the backward pass, where checkpointing runs blocks again."""
    model, session = make()
    model(**TINY.batch())
    session.add_auxiliary_loss(torch.tensor(2.0))
    assert session.auxiliary_loss().item() == 0.0
    model.bert.register_forward_hook(lambda *_: session.add_auxiliary_loss(torch.tensor(2.0)))
    with torch.no_grad():
        model(**TINY.batch())
    model.eval()(**TINY.batch())
    assert session.auxiliary_loss().item() == 0.0


def test_auxiliary_loss_without_a_graph_is_refused() -> None:
    model, session = make()

    def add(*args: object) -> None:
        with torch.no_grad():
            session.add_auxiliary_loss(torch.tensor(2.0))

    model.bert.register_forward_hook(add)
    with pytest.raises(UnsupportedError, match="auxiliary loss must have a gradient"):
        model(**TINY.batch())


def test_steps_and_calibration_reach_the_methods_that_ask(monkeypatch) -> None:
    from leantune.core import registry

    _, session = make()
    session.calibrate(iter([TINY.batch()]))  # nobody asks: not even read
    seen: list[Any] = []
    spec = SimpleNamespace(
        on_step=lambda s, step: seen.append(step),
        calibrate=lambda s, batches: seen.extend(batches),
    )
    monkeypatch.setattr(registry, "get", lambda name: spec)
    session.on_step()
    session.calibrate(iter(["a", "b"]))
    assert seen == [1, "a", "b"] and session.step == 1


def test_ranks_draw_different_rows(monkeypatch) -> None:
    from leantune.core import session as session_module

    _, session = make()
    here = session.current_draw(torch.device("cpu"))
    monkeypatch.setattr(session_module, "rank", lambda: 3)
    there = session.current_draw(torch.device("cpu"))
    assert here.seed != there.seed and here.number == there.number


def test_empty_batch_is_refused() -> None:
    model, _ = make()
    batch = {name: value[:0] for name, value in TINY.batch().items()}
    with pytest.raises(ConfigError, match=r"batch must hold at least one row, got .* \(0, "):
        model(**batch)


def test_calibration_neither_reads_nor_moves_the_callers_generators(monkeypatch) -> None:
    from leantune.core import registry

    _, session = make()
    drawn: list[Tensor] = []
    spec = SimpleNamespace(calibrate=lambda s, batches: drawn.append(torch.rand(3)))
    monkeypatch.setattr(registry, "get", lambda name: spec)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        session.calibrate([])
        assert torch.equal(torch.get_rng_state(), before)
    session.seed += 1
    session.calibrate([])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
