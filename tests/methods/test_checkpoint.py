"""Checkpointing by blocks: exact gradients, fewer bytes, nothing left behind."""

import pytest
import torch
from models import MODELS
from torch import nn

import leantune as lt
from leantune.errors import SiteError
from leantune.measure.ledger import ledger


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_ones(name: str) -> None:
    tiny = MODELS[name]
    plain, model = tiny.build(), tiny.build()
    lt.apply(model, lt.Checkpoint())
    for m in (plain, model):
        m(**tiny.batch()).loss.backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_a_block_keeps_no_more_than_its_input(name: str) -> None:
    tiny = MODELS[name]
    plain, model = tiny.build(), tiny.build()
    lt.apply(model, lt.Checkpoint())
    before, after = ledger(plain, tiny.batch()), ledger(model, tiny.batch())
    assert after.activations < 0.5 * before.activations
    mlp = next(site.name for site in lt.find_sites(plain) if site.role == "mlp")
    # No activation is as small as a hundred bytes; torch keeps a few scalars of its own.
    assert after.saved_bytes(mlp) < 100 < before.saved_bytes(mlp)


def test_chosen_blocks_only() -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.Checkpoint(sites="layer.1"))
    layers = model.bert.encoder.layer
    assert (layers[0].gradient_checkpointing, layers[1].gradient_checkpointing) == (False, True)
    session.remove()
    assert not layers[1].gradient_checkpointing
    assert "gradient_checkpointing" not in vars(layers[1])


def test_checkpointing_that_was_on_before_stays_on() -> None:
    model = MODELS["bert"].build()
    model.activation_checkpointing_enable()
    layers = model.bert.encoder.layer
    function = layers[0]._gradient_checkpointing_func
    session = lt.apply(model, lt.Checkpoint())
    assert layers[0]._gradient_checkpointing_func is not function
    session.merge()
    assert layers[0].gradient_checkpointing
    assert layers[0]._gradient_checkpointing_func is function


def test_a_block_that_cannot_is_named() -> None:
    class BertLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(2, 2)

    # Blocks are known by class and module path: this one as if of another transformers.
    BertLayer.__module__ = "transformers.models.bert.modeling_bert"
    BertLayer.__qualname__ = "BertLayer"
    model = nn.Sequential(BertLayer(), BertLayer())
    with pytest.raises(SiteError, match="2 of 2 sites cannot be used: 0: module must be a transf"):
        lt.apply(model, lt.Checkpoint())
