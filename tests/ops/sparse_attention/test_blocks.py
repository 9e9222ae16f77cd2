"""Blocks are chosen by means, looking at nothing later or hidden; attention over them is exact."""

from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leantune.ops.random import RandomKey, uniform_at
from leantune.ops.sparse_attention import attention, flex, tiles
from leantune.ops.sparse_attention.attention import sparse_attention
from leantune.ops.sparse_attention.blocks import BlockList, choose_blocks, readers
from leantune.ops.sparse_attention.flex import block_mask
from leantune.ops.sparse_attention.top_keys import AttentionKind, KeyBudget, Visibility

KINDS = get_args(AttentionKind)
SCALE = 0.7


def causal(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]


def lists(chosen: BlockList) -> list[list[int]]:
    flat = zip(chosen.indices.flatten(0, 2), chosen.counts.flatten(), strict=True)
    return [row[:count].tolist() for row, count in flat]


def pairs(chosen: BlockList, view: Visibility, shape: Sequence[int], num_keys: int) -> Tensor:
    """Return the chosen visible pairs (b, h, n, m) bool, from the definition."""
    b, h, n = shape
    visible = view.rows(torch.empty(b, h, n, 1), slice(0, b), slice(0, n), num_keys)
    keep = torch.zeros(b, h, n, num_keys, dtype=torch.bool)
    share = h // chosen.indices.shape[1]
    for i, j, row in np.ndindex(b, h, chosen.indices.shape[2]):
        queries = slice(row * chosen.query_size, (row + 1) * chosen.query_size)
        count = chosen.counts[i, j // share, row]
        for block in chosen.indices[i, j // share, row, :count].tolist():
            keep[i, j, queries, block * chosen.block_size : (block + 1) * chosen.block_size] = True
    return keep & visible


@pytest.mark.parametrize("always_keep", [0, 1, 5, 9, 99])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(40, 40), (37, 37), (23, 40), (1, 17), (5, 5)])
def test_the_choice_is_by_products_of_means(
    n: int, m: int, kind: AttentionKind, always_keep: int
) -> None:
    b, h, size = 2, 4, 8
    if kind == "self":
        n = m
    q, k = torch.randn(b, h, n, 5).double(), torch.randn(b, 2, m, 5).double()
    view = Visibility(kind, None if kind != "causal" or n in (1, m) else causal(n, m))
    budget = KeyBudget(0.4, always_keep=always_keep)
    group = 1 if kind == "causal" and n != m else size
    scores = (q @ k.repeat_interleave(2, 1).mT).numpy()
    rule = (group, size, m - n, 0.4, kind, always_keep)
    chosen = choose_blocks(q, k, budget, view, size)
    assert lists(chosen) == oracle.select_blocks(scores, *rule)
    empty = chosen.indices == -(-m // size)
    assert torch.equal(empty.sum(-1), chosen.indices.shape[-1] - chosen.counts.long())
    shared = choose_blocks(q, k, budget, view, size, num_lists=2)
    together = scores.reshape(b, 2, 2, n, m).mean(2)
    assert lists(shared) == oracle.select_blocks(together, *rule)


@pytest.mark.parametrize("kind", ["causal", "cross"])
def test_later_tokens_change_no_earlier_choice(kind: AttentionKind) -> None:
    n, t, size = 64, 37, 8
    q, k = torch.randn(2, 1, 2, n, 5)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, t:] = 9 * torch.randn(1, 2, n - t, 5)
    if kind == "causal":
        changed_k[:, :, t:] = 9 * torch.randn(1, 2, n - t, 5)
    view, how = Visibility(kind, None), KeyBudget(0.3)
    a, b = (choose_blocks(x, y, how, view, size) for x, y in ((q, k), (changed_q, changed_k)))
    keeps = [pairs(c, view, (1, 2, n), n) for c in (a, b)]
    assert torch.equal(keeps[0][:, :, :t], keeps[1][:, :, :t])
    assert not torch.equal(keeps[0], keeps[1])
    # The control: the mean of the whole block looks ahead.
    seen = Visibility("self", causal(n, n) if kind == "causal" else None)
    blind = [choose_blocks(x, k, how, seen, size) for x in (q, changed_q)]
    keeps = [pairs(c, seen, (1, 2, n), n) for c in blind]
    assert not torch.equal(keeps[0][:, :, :t], keeps[1][:, :, :t])


@pytest.mark.parametrize("kind", ["self", "causal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_tokens_are_in_no_mean(side: str, kind: AttentionKind) -> None:
    n, size, pad = 44, 8, 12
    q, k = torch.randn(2, 1, 1, n, 5)
    real = torch.ones(1, 1, 1, n, dtype=torch.bool)
    hidden = slice(0, pad) if side == "left" else slice(n - pad, n)
    real[..., hidden] = False
    view = Visibility(kind, real & causal(n, n) if kind == "causal" else real)
    changed = (q.clone(), k.clone())
    for x in changed:
        x[:, :, hidden] = 50.0
    how = KeyBudget(0.4)
    a, b = (
        pairs(choose_blocks(*x, how, view, size), view, (1, 1, n), n) for x in ((q, k), changed)
    )
    seen = real[0, 0, 0]
    assert torch.equal(a[:, :, seen], b[:, :, seen]) and not a[..., hidden].any()
    # The control: without the mask they are.
    plain = [choose_blocks(*x, how, Visibility("self", None), size) for x in ((q, k), changed)]
    assert lists(plain[0]) != lists(plain[1])
    # A mean of five real tokens is theirs alone: half a block of padding makes it no smaller.
    alone = choose_blocks(q[:, :, seen], k[:, :, seen], how, Visibility(kind, None), size)
    if side == "right":
        got = choose_blocks(q, k, KeyBudget(0.4), view, size)
        assert lists(got)[: len(lists(alone))] == lists(alone)


def test_the_first_real_tokens_are_kept_under_padding() -> None:
    n, size = 64, 8
    q, k = torch.randn(2, 2, 1, n, 5)
    real = torch.ones(2, 1, 1, n, dtype=torch.bool)
    real[0, ..., :21] = False
    view = Visibility("causal", real & causal(n, n))
    chosen = choose_blocks(q, k, KeyBudget(0.1, always_keep=4), view, size)
    keep = pairs(chosen, view, (2, 1, n), n)
    visible = view.mask.expand(2, 1, n, n)
    for i, first in ((0, 21), (1, 0)):
        for row in range(first, n):
            wanted = [*range(first, first + 4), *range(max(first, row - 3), row + 1)]
            wanted = [j for j in wanted if visible[i, 0, row, j]]
            assert keep[i, 0, row, wanted].all()


class _Launches(TorchDispatchMode):
    """Counts operations of the device that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        free = ("empty", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh", "detach")
        result = func(*args, **(kwargs or {}))
        is_there = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(result))
        if is_there and not func.is_view and name not in free:
            self.names.append(name)
        return result


@pytest.mark.parametrize("always_keep", [0, 300])
@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1024, 131072, 5000])
def test_a_choice_takes_few_launches_at_any_length(
    n: int, kind: AttentionKind, share: int, always_keep: int
) -> None:
    q = torch.empty(2, 8, n, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 2, n, 64, dtype=torch.bfloat16, device="meta")
    budget = KeyBudget(1 / 8, 32, always_keep)
    with _Launches() as seen:
        chosen = choose_blocks(q, k, budget, Visibility(kind, None), 128, num_lists=8 // share)
    assert len(seen.names) <= 15, seen.names
    assert chosen.indices.shape[:3] == (2, 8 // share, -(-n // 128))
    with _Launches() as direct:
        q.float().mean(2) + 1
    assert len(direct.names) == 3


class _Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.num_bytes = max(self.num_bytes, *(t.untyped_storage().nbytes() for t in tensors), 0)
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_saved_are_q_k_v_and_the_list_and_no_square_is_made(
    dropout: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 2**12)
    n, size = 1024, 16
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, n, 8))
    view, saved = Visibility("causal", None), []
    key = RandomKey(5, torch.tensor(3), 7)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        _Largest() as seen,
    ):
        chosen = choose_blocks(q, k, KeyBudget(0.125), view, size)
        out = sparse_attention(q, k, v, chosen, view, scale=SCALE, dropout=dropout, key=key)
        out.sum().backward()
    num_rows = n // size
    wanted = 3 * n * 8 * 4 + 4 * num_rows * (num_rows // 8) + (8 if dropout else 0)
    assert sum(t.numel() * t.itemsize for t in saved) == wanted
    assert seen.num_bytes <= n * n // 8
    with _Largest() as square:
        q[0] @ k[0].mT
    assert square.num_bytes == 4 * n * n


def test_readers_are_the_transpose_of_a_list() -> None:
    b, num_lists, num_rows, num_blocks = 2, 3, 5, 7
    reads = torch.rand(b, num_lists, num_rows, num_blocks) > 0.6
    order = torch.arange(num_blocks).expand_as(reads).masked_fill(~reads, num_blocks).sort().values
    counts, rows = readers(order.int(), num_blocks)
    assert torch.equal(counts, reads.sum(2, dtype=torch.int32))
    for i, j, block in np.ndindex(b, num_lists, num_blocks):
        wanted = reads[i, j, :, block].nonzero()[:, 0].tolist()
        assert rows[i, j, block, : counts[i, j, block]].tolist() == wanted


def of_blocks(counts: Tensor, indices: Tensor, num_blocks: int) -> Tensor:
    """Return (b, h, rows, num_blocks) bool of lists whose first ``counts`` slots count."""
    out = torch.zeros(*counts.shape, num_blocks, dtype=torch.bool)
    for place in np.ndindex(*counts.shape):
        out[place][indices[place][: counts[place]].long()] = True
    return out


@pytest.mark.parametrize("num_lists", [2, 4])
@pytest.mark.parametrize("kind", ["causal", "mask", "cross"])
def test_the_mask_of_flex_attention_is_the_list_and_its_transpose(
    kind: str, num_lists: int
) -> None:
    """The kernel that reads it is torch's own, and needs a GPU."""
    from torch.nn.attention.flex_attention import create_mask

    n, m, size = 38, 38 if kind != "cross" else 21, 8
    q, k = torch.randn(2, 4, n, 4), torch.randn(2, 2, m, 4)
    mask = torch.rand(2, 1, n, m) > 0.2 if kind == "mask" else None
    view = Visibility("self" if kind == "mask" else kind, mask)  # type: ignore[arg-type]
    chosen = choose_blocks(q, k, KeyBudget(0.4), view, size, num_lists=num_lists)
    made = block_mask(chosen, view, q, k)
    num_rows, num_blocks = -(-n // size), -(-m // size)
    read, partial = torch.zeros(2, 2, 4, num_rows, num_blocks, dtype=torch.bool)
    for prefix, out in (("", partial), ("full_", read)):
        parts = [getattr(made, f"{prefix}{x}") for x in ("kv_num_blocks", "kv_indices")]
        back = [getattr(made, f"{prefix}{x}") for x in ("q_num_blocks", "q_indices")]
        if parts[0] is None:
            assert prefix and kind != "causal" and back == [None, None]
            continue
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (*parts, *back))
        out |= of_blocks(*parts, num_blocks)
        assert torch.equal(out, of_blocks(*back, num_rows).mT)
    share = 4 // num_lists
    repeated = BlockList(*(x.repeat_interleave(share, 1) for x in chosen[:2]), size, size)
    wanted = of_blocks(repeated.counts, repeated.indices, num_blocks)
    assert torch.equal(read | partial, wanted) and not (read & partial).any()
    inside = create_mask(made.mask_mod, 2, 4, n, m, device="cpu")
    visible = view.rows(q, slice(0, 2), slice(0, n), m).expand(2, 4, n, m)
    assert torch.equal(inside, visible)
    if kind == "causal":
        assert made.kv_indices.shape == made.full_kv_indices.shape
        assert made.q_indices.shape == made.full_q_indices.shape
        whole = read.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :n, :m]
        assert not (whole & ~visible).any()


def dense(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | float = 0.0, kept: Any = 1.0
) -> Tensor:
    """Attention over the pairs by torch's own operations."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    scores = (SCALE * q @ k.mT + bias).masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) * kept) @ v


CASES = {
    "causal": ("causal", 29, 29, None),
    "self": ("self", 29, 29, None),
    "cross": ("cross", 29, 18, None),
    "aligned": ("self", 32, 32, None),
    "decode": ("causal", 1, 29, None),
    "cached": ("causal", 5, 29, causal(5, 29)),
    "pairs": ("self", 29, 29, torch.rand(2, 1, 29, 29) > 0.3),
    "heads": ("self", 29, 29, torch.rand(1, 4, 29, 29) > 0.5),
    "padding": ("causal", 29, 29, causal(29, 29) & (torch.arange(29) > 10)),
    "keys": ("self", 29, 29, (torch.arange(29) < torch.tensor([[29], [0]]))[:, None, None]),
    "one block": ("causal", 5, 5, None),
    "one block, masked": ("self", 5, 5, torch.rand(2, 1, 5, 5) > 0.3),
}


@pytest.mark.parametrize("part", [70, 2**19])
@pytest.mark.parametrize("num_lists", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention_under_the_choice(
    name: str, num_lists: int, part: int, monkeypatch: Any
) -> None:
    """A batch with an all-padding row, and fewer keys than a block, are among the cases."""
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", part)
    kind, n, m, mask = CASES[name]
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, n, 6), (2, 2, m, 6), (2, 2, m, 3))
    q, k, v = (torch.randn(s, generator=g).double().requires_grad_() for s in shapes)
    view = Visibility(kind, mask)
    chosen = choose_blocks(q, k, KeyBudget(0.4), view, 8, num_lists=num_lists)
    keep = pairs(chosen, view, (2, 4, n), m)
    out = sparse_attention(q, k, v, chosen, view, scale=SCALE)
    wanted = dense(q, k, v, keep)
    grad_output = torch.randn(out.shape, generator=g).double()
    got = [out, *torch.autograd.grad(out, (q, k, v), grad_output)]
    right = [wanted, *torch.autograd.grad(wanted, (q, k, v), grad_output)]
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(1.01 * a, b, rtol=0, atol=1e-4)


def test_gradients_are_the_oracles_and_checked_numerically() -> None:
    q, k, v = (torch.randn(1, 2, 21, 4).double().requires_grad_() for _ in range(3))
    view = Visibility("causal", None)
    chosen = choose_blocks(q, k, KeyBudget(0.4), view, 4)
    keep = pairs(chosen, view, (1, 2, 21), 21).numpy()
    out = sparse_attention(q, k, v, chosen, view, scale=SCALE)
    grad_output = torch.randn_like(out)
    args = [x.detach().numpy() for x in (q, k, v)]
    wanted = oracle.gradients(*args, keep, SCALE, grad_output.numpy())
    np.testing.assert_allclose(out.detach().numpy(), oracle.attention(*args, keep, SCALE))
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad_output), wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *x: sparse_attention(*x, chosen, view, scale=SCALE), (q, k, v)
    )


BIASES = [(1, 4, 19, 19), (2, 1, 19, 19), (2, 4, 1, 19), (1, 1, 1, 19)]


@pytest.mark.parametrize("bias_shape", BIASES)
def test_bias_and_dropout_are_those_of_the_pairs(
    bias_shape: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 300)
    shapes = ((2, 4, 19, 4), (2, 2, 19, 4), (2, 2, 19, 4))
    q, k, v = (torch.randn(s).double().requires_grad_() for s in shapes)
    bias = torch.randn(bias_shape).double().requires_grad_()
    view, key = Visibility("causal", None), RandomKey(5, torch.tensor(3), 7)
    chosen = choose_blocks(q, k, KeyBudget(0.4), view, 4)
    u = uniform_at(key, torch.arange(2 * 4 * 19)[:, None], torch.arange(19))
    kept = (u >= 0.4).double().div(0.6).view(2, 4, 19, 19)
    how = {"scale": SCALE, "bias": bias, "dropout": 0.4, "key": key}
    out = sparse_attention(q, k, v, chosen, view, **how)
    wanted = dense(q, k, v, pairs(chosen, view, (2, 4, 19), 19), bias, kept)
    grad_output, inputs = torch.randn_like(out), (q, k, v, bias)
    got = [out, *torch.autograd.grad(out, inputs, grad_output)]
    right = [wanted, *torch.autograd.grad(wanted, inputs, grad_output)]
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(1.01 * a, b, rtol=0, atol=1e-4)


def test_two_runs_give_the_same_bits_and_strides_change_none() -> None:
    q, k, v = (torch.randn(2, 40, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3))
    view, grads = Visibility("causal", None), []
    for x in ((q, k, v), (q, k, v), [t.detach().contiguous().requires_grad_() for t in (q, k, v)]):
        chosen = choose_blocks(*x[:2], KeyBudget(0.4), view, 8)
        out = sparse_attention(*x, chosen, view, scale=SCALE)
        grads.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b, c in zip(*grads, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_low_precision_is_near_float32_and_keeps_its_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8).bfloat16().requires_grad_() for _ in range(3))
    view = Visibility("causal", None)
    chosen = choose_blocks(q, k, KeyBudget(0.4), view, 8)
    out = sparse_attention(q, k, v, chosen, view, scale=SCALE)
    assert out.dtype == torch.bfloat16
    wanted = dense(*(x.float() for x in (q, k, v)), pairs(chosen, view, (1, 2, 40), 40))
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)


def test_without_a_mask_no_list_is_read_from_the_device() -> None:
    """A tensor on the meta device has nothing to read."""
    view = Visibility("causal", None)
    for device in ("cpu", "meta"):
        q = torch.randn(2, 2, 100, 4, device=device)
        chosen = choose_blocks(q, q, KeyBudget(0.3, always_keep=20), view, 8)
        fewest, most = chosen.bounds()
        if device == "cpu":
            assert fewest == most == chosen.counts[1, 1].tolist()
    masked = choose_blocks(q, q, KeyBudget(0.3), Visibility("self", q[:, :1, :, :1].mT > 0), 8)
    with pytest.raises(RuntimeError, match="meta"):
        masked.bounds()


def test_flex_attention_serves_what_its_kernels_can_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(flex, "on_gpu", lambda where: True)
    x = torch.randn(1, 1, 300, 64)

    def serves(q: Tensor = x, v: Tensor = x, sizes: tuple[int, int] = (128, 128)) -> bool:
        return flex.serves(BlockList(q, q, *sizes), q, v)

    assert serves() and serves(sizes=(256, 256))
    assert not (serves(sizes=(64, 64)) or serves(sizes=(192, 192)) or serves(sizes=(1, 128)))
    assert not (serves(v=x[..., :8]) or serves(q=x[..., :8]) or serves(q=x.double()))


def listed(made: Any, num_blocks: int) -> Any:
    """Give torch's uncompiled function, which reads the mask alone, the lists as well."""
    reads = of_blocks(made.kv_num_blocks, made.kv_indices, num_blocks)
    if made.full_kv_num_blocks is not None:
        reads |= of_blocks(made.full_kv_num_blocks, made.full_kv_indices, num_blocks)
    size, visible = made.BLOCK_SIZE[0], made.mask_mod
    made.mask_mod = lambda i, j, q, k: visible(i, j, q, k) & reads[i, j, q // size, k // size]
    return made


@pytest.mark.parametrize("kind", ["causal", "mask", "cross"])
def test_flex_attention_is_called_as_torch_wants_at_any_number_of_lengths(
    kind: str, monkeypatch: Any
) -> None:
    """With kernels for each length the ninth one would fail. Kernels need a GPU, the rest not."""
    from torch.nn.attention import flex_attention as torch_flex

    right, compile_ = flex.block_mask, torch.compile
    lists = {"on": True}

    def block_mask_with_lists(chosen: BlockList, view: Visibility, q: Tensor, k: Tensor) -> Any:
        made = right(chosen, view, q, k)
        return listed(made, -(-k.shape[2] // chosen.block_size)) if lists["on"] else made

    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="eager"))
    monkeypatch.setattr(flex, "block_mask", block_mask_with_lists)
    monkeypatch.setattr(attention, "serves", lambda *args: True)
    flex._compiled.cache_clear()
    torch.compiler.reset()
    try:
        for i in range(10):
            n, m = 45 + 3 * i, 60 if kind == "cross" else 45 + 3 * i
            shapes = ((2, 4, n, 16), (2, 2, m, 16), (2, 2, m, 16))
            q, k, v = (torch.randn(s).requires_grad_() for s in shapes)
            mask = torch.rand(2, 1, n, m) > 0.3 if kind == "mask" else None
            view = Visibility("self" if kind == "mask" else kind, mask)  # type: ignore[arg-type]
            chosen = choose_blocks(q, k, KeyBudget(0.3), view, 8, num_lists=2 + 2 * (i % 2))
            out = sparse_attention(q, k, v, chosen, view, scale=SCALE)
            wanted = dense(q, k, v, pairs(chosen, view, (2, 4, n), m))
            grad_output = torch.randn_like(out)
            got = [out, *torch.autograd.grad(out, (q, k, v), grad_output)]
            expected = [wanted, *torch.autograd.grad(wanted, (q, k, v), grad_output)]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        lists["on"] = False
        control = sparse_attention(q, k, v, chosen, view, scale=SCALE)
        assert not torch.allclose(control, wanted, rtol=1e-2, atol=1e-2)
    finally:
        flex._compiled.cache_clear()
        torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "mask", "cross"])
@pytest.mark.parametrize("num_lists", [2, 4])
def test_flex_attention_has_the_oracles_gradients(kind: str, num_lists: int) -> None:
    """A kernel with other gradients than the float64 definition's is not used."""
    n, m = 700, 700 if kind != "cross" else 450
    shapes = ((2, 4, n, 64), (2, 2, m, 64), (2, 2, m, 64))
    q, k, v = (torch.randn(s).cuda().requires_grad_() for s in shapes)
    mask = (torch.arange(m) < torch.tensor([[m], [300]]))[:, None, None] if kind == "mask" else None
    view = Visibility("self" if kind == "mask" else kind, None if mask is None else mask.cuda())  # type: ignore[arg-type]
    chosen = choose_blocks(q, k, KeyBudget(0.3), view, 128, num_lists=num_lists)
    out = sparse_attention(q, k, v, chosen, view, scale=SCALE / 8)
    grad_output = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, (q, k, v), grad_output)]
    here = BlockList(chosen.indices.cpu(), chosen.counts.cpu(), 128, 128)
    keep = pairs(here, view._replace(mask=mask), (2, 4, n), m)
    x = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    wanted = dense(x[0] / 8, *x[1:], keep)
    right = [wanted, *torch.autograd.grad(wanted, x, grad_output.cpu().double())]
    for a, b in zip(got, right, strict=True):
        error = (a.detach().cpu().double() - b).abs().max() / b.abs().max()
        assert float(error) < 1e-2
