"""Checkpointing by blocks: exact gradients, fewer bytes, nothing left behind."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import zoo
from models import MODELS
from single import saved_by
from torch import Tensor, nn

import leantune as lt
from leantune.core.linear import ConvertedLinear
from leantune.errors import SiteError, UnsupportedError
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


class Net(nn.Module):
    """A user's own model, whose blocks no library knows."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        parts = [norm(8), nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 8)]
        self.layers = nn.ModuleList([nn.Sequential(*parts), copy.deepcopy(nn.Sequential(*parts))])

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def gradients(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(*args, **kwargs)
    (output if isinstance(output, Tensor) else output.loss).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["albert", "mpnet", "xlnet"])
def test_blocks_without_a_flag_are_recomputed_exactly(name: str) -> None:
    plain, batch = zoo.build(name, dropout=0.1)
    model, _ = zoo.build(name, dropout=0.1)
    session = lt.apply(model, lt.Checkpoint())
    wanted, found = gradients(plain, **batch), gradients(model, **batch)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert ledger(model, batch).activations < 0.3 * ledger(plain, batch).activations
    session.remove()
    assert [sorted(vars(a)) for a in plain.modules()] == [sorted(vars(b)) for b in model.modules()]


def test_a_users_own_blocks_copied_pickled_and_chosen() -> None:
    plain, x = Net(), torch.randn(4, 8)
    model = copy.deepcopy(plain)
    lt.apply(model, lt.Checkpoint(sites="layers.1"))
    assert "forward" not in vars(model.layers[0])
    for way in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        copied = way(model)
        wanted, found = gradients(plain, x), gradients(copied, x)
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        assert 0 < len(saved_by(lambda c=copied: c(x))) < len(saved_by(lambda: plain(x)))
        copied.eval()
        assert torch.equal(copied(x), plain.eval()(x))
        copied.train(), plain.train()


def test_rows_are_drawn_in_the_backward_of_blocks_without_a_flag() -> None:
    """Else the sample would be drawn in forward, by a guess of the norms."""
    model = Net()
    lt.apply(model, lt.WTACRS(keep_ratio=0.5, min_rows=1), lt.Checkpoint(sites="layers.1"))
    policies = [m.rows for m in model.modules() if isinstance(m, ConvertedLinear)]
    assert [policy._draws_in_backward() for policy in policies] == [False, False, True, True]


def test_what_others_put_around_a_block_since_stays_and_ours_is_off() -> None:
    model, x = Net(), torch.randn(4, 8)
    before = len(saved_by(lambda: model(x)))
    session = lt.apply(model, lt.Checkpoint())
    theirs = functools.partial(lambda forward, x: 2 * forward(x), model.layers[0].forward)
    model.layers[0].forward = theirs
    session.remove()
    assert model.layers[0].forward is theirs and "forward" not in vars(model.layers[1])
    assert len(saved_by(lambda: model(x))) == before


class Cache:
    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Caching(nn.Module):
    """A block that would write a cache twice when it is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if cache is not None:
            cache.length += 1
        return self.down(self.up(x).relu())


def test_a_recomputed_block_gets_no_cache() -> None:
    model, cache = nn.Sequential(Caching(), Caching()), Cache(0)
    lt.apply(model, lt.Checkpoint())
    model[0](torch.ones(2, 4), cache=cache).sum().backward()
    assert cache.length == 0
    with pytest.raises(
        UnsupportedError, match=r"Checkpoint: 0 must be called without a cache .* holds 3"
    ):
        model[0](torch.ones(2, 4), Cache(3))
    # Nothing is recomputed here, so the cache is the block's to write.
    with torch.no_grad():
        model[0](torch.ones(2, 4), cache)
    model.eval()
    model[0](torch.ones(2, 4), cache)
    assert cache.length == 2


def test_a_block_that_cannot_is_named() -> None:
    with pytest.raises(
        SiteError, match=r"2 of 2 sites cannot be used: layers\.0: block must have no"
    ):
        lt.apply(Net(nn.BatchNorm1d), lt.Checkpoint())
    with pytest.raises(
        SiteError, match=r"none by the method's own choice \(roles: block\); the mod"
    ):
        lt.apply(nn.Sequential(nn.Linear(2, 2)), lt.Checkpoint())
