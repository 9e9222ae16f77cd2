"""Sparse attention by blocks in real architectures: no calibration, no state, the same masks."""

from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.errors import UnsupportedError
from leantune.integrations.attention import CHILD
from leantune.methods.spt_attention import attention
from leantune.ops.sparse_attention.attention import sparse_attention

SMALL: dict[str, Any] = {"granularity": "block", "block_size": 8, "keep_ratio": 0.3, "min_keys": 2}


def ids(num_tokens: int = 30, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (batch, num_tokens), generator=generator)


def block_model(name: str = "llama", **options: Any) -> nn.Module:
    model = MODELS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    lt.apply(model, lt.SPTAttention(**{**SMALL, **options}))
    return model


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_blocks_need_no_calibration_and_have_no_state(name: str) -> None:
    model = MODELS[name].build()
    session = lt.apply(model, lt.SPTAttention(**SMALL, subspace_width=3))
    assert [c.num_calibration_batches for c in session.conversions] == [0]
    assert not any("codebooks" in key for key in session.state_dict())
    batch = {"input_ids": ids()} | ({"labels": ids()} if name == "t5" else {})
    model.eval()
    out = model(**batch)
    with session.exact():
        assert not torch.equal(out.logits, model(**batch).logits)
    assert not any(b.numel() for n, b in model.named_buffers() if CHILD in n)


def test_a_saved_session_of_blocks_loads_and_computes_the_same(tmp_path: Any) -> None:
    model = MODELS["llama"].build()
    lt.apply(model, lt.SPTAttention(**SMALL)).save(tmp_path)
    other = MODELS["llama"].build()
    lt.load(other, tmp_path)
    assert torch.equal(model(input_ids=ids()).logits, other(input_ids=ids()).logits)


@pytest.mark.parametrize(
    "options", [{}, {"share_choice": "group", "block_size": 9}, {"always_keep": 3}]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_later_tokens_change_no_earlier_bit(name: str, options: dict[str, Any]) -> None:
    model, plain = block_model(name, **options), block_model(name, keep_ratio=0.1)
    x, t = ids(), 17
    changed = x.clone()
    changed[:, t:] = ids(seed=5)[:, t:]
    with torch.no_grad():
        a, b = (model(input_ids=y).logits for y in (x, changed))
        other = plain(input_ids=x).logits
    assert torch.equal(a[:, :t], b[:, :t])
    assert not torch.equal(a[:, t:], b[:, t:]) and not torch.equal(a, other)


TOKENS: dict[str, Any] = {"granularity": "token", "subspace_width": 2, "num_codewords": 4}


@pytest.mark.parametrize("options", [{}, {"block_size": 11}, TOKENS])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_all_padding_row_spoils_nothing(name: str, options: dict[str, Any]) -> None:
    model = block_model(name, **options).train()
    model._leantune_session.calibrate([{"input_ids": ids(seed=7)}])
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1] = 0
    batch = {"input_ids": ids(), "labels": ids() if name == "llama" else torch.tensor([0, 1])}
    out = model(**batch, attention_mask=mask)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(t).all() for t in [out.logits, *grads])
    alone = model(input_ids=batch["input_ids"][:1]).logits
    torch.testing.assert_close(out.logits[:1], alone, rtol=1e-4, atol=1e-5)


def test_fewer_keys_than_a_block_is_dense_attention() -> None:
    model = block_model(block_size=32)
    out = model(input_ids=ids()).logits
    with model._leantune_session.exact():
        torch.testing.assert_close(out, model(input_ids=ids()).logits, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    """A query keeps all blocks of its own document here, so alone is as packed."""
    model = block_model(keep_ratio=0.7)
    first, second = ids(13, 1), ids(19, 1, seed=3)
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(13), torch.arange(19)])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=x).logits for x in (first, second)], 1)
        out = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        mixed = model(input_ids=packed, use_cache=False).logits
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed, alone, rtol=1e-4, atol=1e-4)


def test_heads_of_a_group_share_a_choice_and_read_it(monkeypatch: Any) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, chosen: Any, *rest: Any, **how: Any) -> Tensor:
        seen.append((q.shape[1], k.shape[1], chosen.indices.shape[1]))
        return sparse_attention(q, k, v, chosen, *rest, **how)

    monkeypatch.setattr(attention, "sparse_attention", watched)
    with torch.no_grad():
        own = block_model("llama")(input_ids=ids()).logits
        shared = block_model("llama", share_choice="group")(input_ids=ids()).logits
    assert {lists for _, _, lists in seen} == {seen[0][0], seen[0][1]}
    assert seen[0][0] > seen[0][1] and not torch.equal(own, shared)


@pytest.mark.parametrize("options", [{}, TOKENS])
def test_heads_that_key_heads_do_not_divide_are_an_error(options: dict[str, Any]) -> None:
    choice = block_model(**options).model.layers[0].self_attn._modules[CHILD]
    q, k = torch.randn(1, 3, 40, 8), torch.randn(1, 2, 40, 8)
    with pytest.raises(UnsupportedError, match="query heads must be a multiple of the 2 key heads"):
        choice(q, k, k, None, None, is_causal=True, scale=1.0, dropout=0.0)


def test_what_is_always_kept_is_read(monkeypatch: Any) -> None:
    """A first token that no mean speaks for is read by every query with the option alone."""
    x = ids(64, 1)
    changed = x.clone()
    changed[:, 0] = 70 - changed[:, 0]
    moved = {}
    for granularity in ("token", "block"):
        for always_keep in (0, 1):
            model = block_model(
                granularity=granularity,
                always_keep=always_keep,
                keep_ratio=0.1,
                subspace_width=2,
                num_codewords=4,
            )
            model._leantune_session.calibrate([{"input_ids": ids(seed=7)}])
            layer = model.model.layers[0].self_attn
            outs: list[Tensor] = []
            layer.o_proj.register_forward_pre_hook(lambda m, a, outs=outs: outs.append(a[0]))
            with torch.no_grad():
                for y in (x, changed):
                    model(input_ids=y)
            moved[granularity, always_keep] = (outs[0] != outs[1]).any(-1)[0]
    for granularity in ("token", "block"):
        assert moved[granularity, 1].all() and not moved[granularity, 0].all()
