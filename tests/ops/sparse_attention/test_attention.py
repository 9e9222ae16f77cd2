"""Sparse attention equals dense attention with a mask, forward and backward, in bounded memory."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leantune.ops.random import RandomKey, uniform_at
from leantune.ops.sparse_attention import tiles
from leantune.ops.sparse_attention.attention import sparse_attention
from leantune.ops.sparse_attention.tiles import pack_bits, unpack_bits
from leantune.ops.sparse_attention.top_keys import Visibility

Operands = tuple[Tensor, Tensor, Tensor]
# b, h, hk, n, m, d, dv: grouped heads, odd sizes, one of everything, more keys than queries.
SHAPES = [
    (2, 4, 2, 13, 13, 6, 5),
    (1, 3, 1, 7, 11, 4, 4),
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 5, 3, 8, 2),
]
SCALE = 0.7


def over_bits(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, *, is_causal: bool = False, **how: Any
) -> Tensor:
    view = Visibility("causal" if is_causal else "cross", None)
    return sparse_attention(q, k, v, bits, view, **how)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Operands:
    b, h, hk, n, m, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    sizes = [(b, h, n, d), (b, hk, m, d), (b, hk, m, dv)]
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def choose(
    shape: tuple[int, ...], heads: int, num_kept: int, *, causal: bool, seed: int = 1
) -> Tensor:
    """Random visible keys of each query, at most num_kept; (b, heads, n, m) bool."""
    b, _, _, n, m, _, _ = shape
    rng = np.random.default_rng(seed)
    keep = np.zeros((b, heads, n, m), dtype=bool)
    for place in np.ndindex(b, heads, n):
        num_visible = max(0, min(m, m - n + place[2] + 1)) if causal else m
        keep[place][rng.permutation(num_visible)[:num_kept]] = True
    return torch.from_numpy(keep)


def expected(
    x: Operands, keep: Tensor, grad_output: Tensor, kept: Any = 1.0, **how: Any
) -> tuple[np.ndarray, ...]:
    """Output and the three gradients by the oracle, key heads repeated and summed again."""
    q, k, v = (t.detach().double().numpy() for t in x)
    h, hk = q.shape[1], k.shape[1]
    k, v = k.repeat(h // hk, 1), v.repeat(h // hk, 1)
    chosen = keep.numpy().repeat(h // keep.shape[1], 1)
    out = oracle.attention(q, k, v, chosen, SCALE, kept)
    dq, dk, dv = oracle.gradients(q, k, v, chosen, SCALE, grad_output.double().numpy(), kept, **how)
    groups = (dk.shape[0], hk, h // hk)
    return (
        out,
        dq,
        dk.reshape(*groups, *dk.shape[2:]).sum(2),
        dv.reshape(*groups, *dv.shape[2:]).sum(2),
    )


def run(x: Operands, keep: Tensor, grad_output: Tensor, **how: Any) -> tuple[np.ndarray, ...]:
    out = over_bits(*x, pack_bits(keep), scale=SCALE, **how)
    grads = torch.autograd.grad(out, x, grad_output.to(out.dtype))
    return tuple(t.detach().double().numpy() for t in (out, *grads))


def error(actual: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> float:
    """Largest deviation, relative to the largest entry of each tensor."""
    assert [a.shape for a in actual] == [w.shape for w in wanted]
    return max(
        float(np.abs(a - w).max() / max(np.abs(w).max(), 1e-300))
        for a, w in zip(actual, wanted, strict=True)
        if np.abs(w).max() > 0 or np.abs(a).max() > 0
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_kept", [1, 4, 20])
@pytest.mark.parametrize("part", [70, 2**21])
def test_equals_dense_attention_under_the_scattered_mask(
    part: int,
    shape: tuple[int, ...],
    num_kept: int,
    causal: bool,
    monkeypatch: Any,
) -> None:
    """20 keys exceed every m, so that case is dense attention; parts of one to all rows."""
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", part)
    x = operands(shape)
    keep = choose(shape, shape[1], num_kept, causal=causal)
    grad_output = torch.randn(*x[0].shape[:3], shape[6], dtype=torch.float64)
    wanted = expected(x, keep, grad_output)
    actual = run(x, keep, grad_output, is_causal=causal)
    assert error(actual, wanted) < 1e-12
    assert error(actual, tuple(1.01 * w for w in wanted)) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_low_precision_accumulates_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    shape = (2, 4, 2, 33, 33, 16, 16)
    x = operands(shape, dtype)
    keep = choose(shape, 4, 33, causal=True)
    grad_output = torch.randn(2, 4, 33, 16).to(dtype)
    actual = run(x, keep, grad_output)
    assert error(actual, expected(x, keep, grad_output)) < tolerance
    assert over_bits(*x, pack_bits(keep), scale=SCALE).dtype == dtype


def test_gradcheck_where_row_dots_are_negative() -> None:
    shape = (1, 2, 1, 4, 5, 3, 2)
    x = operands(shape)
    bits = pack_bits(choose(shape, 2, 3, causal=True))
    out = over_bits(*x, bits, scale=SCALE)
    # sum_j P dP = dO . O; half of the rows get either sign.
    for sign in (1.0, -1.0):
        assert torch.autograd.gradcheck(
            lambda *t, s=sign: (s * over_bits(*t, bits, scale=SCALE) * out.detach()).sum(),
            x,
        )


def test_score_gradients_sum_to_zero_in_each_row() -> None:
    """A shift of all keys by one vector moves every score of a row alike, so nothing may change."""
    shape = (1, 2, 2, 9, 9, 4, 4)
    x = operands(shape)
    grad_output = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    # With equal queries the sum of grad_k over keys is q times the sum of all grad_scores.
    q = x[0].detach()[:, :, :1].expand_as(x[0]).clone().requires_grad_()
    keep = choose(shape, 2, 4, causal=True)
    _, _, grad_k, _ = run((q, *x[1:]), keep, grad_output)
    assert np.abs(grad_k.sum(2)).max() < 1e-13
    broken = expected((q, *x[1:]), keep, grad_output, clamp_row_dot=True)
    assert np.abs(broken[2].sum(2)).max() > 1e-2


def test_the_prototypes_gradient_and_layout_are_noticed() -> None:
    """Controls: a row dot clamped at zero, and the scrambled output, fail the comparison above."""
    shape = (2, 4, 4, 13, 13, 6, 6)
    x = operands(shape)
    keep = choose(shape, 4, 4, causal=True)
    grad_output = torch.randn(2, 4, 13, 6, dtype=torch.float64)
    actual = run(x, keep, grad_output)
    wanted = expected(x, keep, grad_output)
    clamped = expected(x, keep, grad_output, clamp_row_dot=True)
    assert error(actual, wanted) < 1e-12
    assert error(actual[1:3], clamped[1:3]) > 1e-2
    assert error(actual[:1], (oracle.scramble(wanted[0]),)) > 1e-1


@pytest.mark.parametrize("scrambled", [False, True])
def test_an_output_feature_reads_its_own_head_and_feature_only(scrambled: bool) -> None:
    shape = (1, 4, 2, 6, 6, 3, 5)
    q, k, _ = operands(shape)
    bits = pack_bits(choose(shape, 4, 3, causal=True))
    lands = []
    for head, feature in np.ndindex(2, 5):
        v = torch.zeros(1, 2, 6, 5, dtype=torch.float64)
        v[:, head, :, feature] = 1.0
        out = over_bits(q, k, v, bits, scale=SCALE).detach().numpy()
        out = oracle.scramble(out) if scrambled else out
        wanted = np.zeros_like(out)
        wanted[:, 2 * head : 2 * head + 2, :, feature] = 1.0
        lands.append(bool(np.allclose(out, wanted)))
    assert not any(lands) if scrambled else all(lands)


def test_batch_and_head_permutations_commute() -> None:
    shape = (3, 4, 4, 8, 8, 4, 4)
    x = operands(shape)
    bits = pack_bits(choose(shape, 4, 3, causal=True))
    out = over_bits(*x, bits, scale=SCALE)
    batch, head = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = [t[batch][:, head] for t in (*x, bits)]
    assert torch.equal(over_bits(*moved, scale=SCALE), out[batch][:, head])


def test_short_rows_that_count_key_0_again_are_noticed() -> None:
    """Control: the prototype's padding slots mean key 0, and its softmax counts them."""
    shape = (1, 2, 2, 9, 9, 4, 4)
    x = operands(shape)
    keep = choose(shape, 2, 5, causal=True)
    grad_output = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    actual = run(x, keep, grad_output)
    q, k, v = (t.detach().numpy() for t in x)
    chosen = keep.numpy()
    wrong = np.stack(
        [oracle.counted_attention(q[0, h], k[0, h], v[0, h], chosen[0, h], SCALE) for h in range(2)]
    )[None]
    right = expected(x, keep, grad_output)[0]
    assert error(actual[:1], (right,)) < 1e-12
    assert error(actual[:1], (wrong,)) > 1e-1
    # Rows without an empty slot agree: it is the short ones that the control is about.
    full = chosen.sum(-1) == 5
    assert np.allclose(right[full], wrong[full])


def test_queries_without_a_key_give_zero_and_no_gradient() -> None:
    shape = (1, 2, 1, 6, 6, 4, 4)
    x = operands(shape)
    keep = choose(shape, 2, 3, causal=False)
    keep[:, :, :2] = False
    grad_output = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    clean = run(x, keep, grad_output)
    assert not clean[0][:, :, :2].any() and not clean[1][:, :, :2].any()
    with torch.no_grad():
        x[0][:, :, :2] = 7.0
    grad_output[:, :, :2] = float("nan")
    dirty = run(x, keep, grad_output)
    for a, b in zip(clean, dirty, strict=True):
        assert np.isfinite(a).all() and np.array_equal(a, b)


def test_no_chosen_keys_and_no_keys_give_zero() -> None:
    for m in (5, 0):
        x = operands((1, 2, 2, 4, m, 3, 3))
        keep = torch.zeros(1, 2, 4, m, dtype=torch.bool)
        for part in run(x, keep, torch.ones(1, 2, 4, 3, dtype=torch.float64)):
            assert not part.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    shape = (1, 2, 2, 16, 16, 8, 8)
    q, k, v = (t.detach() for t in operands(shape, dtype))
    q, k = q * 60, k * 60
    assert (q.double() @ k.double().mT).abs().max() > 1e4
    x = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    parts = run(x, choose(shape, 2, 5, causal=True), torch.randn(1, 2, 16, 8))
    assert all(np.isfinite(p).all() for p in parts)


def test_later_tokens_change_no_earlier_bit() -> None:
    shape = (2, 4, 2, 40, 40, 8, 8)
    x = tuple(t.detach() for t in operands(shape, torch.float32))
    bits = pack_bits(choose(shape, 4, 9, causal=True))
    out = over_bits(*x, bits, scale=SCALE, is_causal=True)
    changed = [t.clone() for t in x]
    for t in changed:
        t[:, :, 23:] = torch.randn_like(t[:, :, 23:])
    other = over_bits(*changed, bits, scale=SCALE, is_causal=True)
    assert torch.equal(out[:, :, :23], other[:, :, :23])
    assert not torch.equal(out[:, :, 23:], other[:, :, 23:])
    # The prototype's layout carries later positions into earlier ones.
    a, b = (oracle.scramble(t.numpy()) for t in (out, other))
    assert not np.array_equal(a[:, :, :23], b[:, :, :23])


def dropped(number: int = 3, stream: int = 7) -> dict[str, Any]:
    return {"dropout": 0.4, "key": RandomKey(5, torch.tensor(number), stream)}


@pytest.mark.parametrize("part", [30, 2**21])
def test_dropout_is_the_counted_mask_however_it_is_cut(part: int, monkeypatch: Any) -> None:
    shape = (2, 3, 1, 10, 10, 4, 4)
    x = operands(shape)
    keep = choose(shape, 3, 4, causal=False)
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", part)
    u = uniform_at(dropped()["key"], torch.arange(60)[:, None], torch.arange(10))
    kept = (u >= 0.4).double().div(0.6).view(2, 3, 10, 10).numpy()
    grad_output = torch.randn(2, 3, 10, 4, dtype=torch.float64)
    wanted = expected(x, keep, grad_output, kept)
    assert error(run(x, keep, grad_output, **dropped()), wanted) < 1e-12
    assert error(run(x, keep, grad_output), wanted) > 1e-1


@pytest.mark.parametrize("bias_shape", [(1, 4, 9, 9), (2, 1, 9, 9), (2, 4, 1, 9), (1, 1, 1, 9)])
def test_bias_is_added_and_has_its_gradient(bias_shape: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 60)
    shape = (2, 4, 2, 9, 9, 4, 4)
    q, k, v = operands(shape)
    bias = torch.randn(bias_shape, dtype=torch.float64).requires_grad_()
    keep = choose(shape, 4, 5, causal=True)
    grad_output = torch.randn(2, 4, 9, 4, dtype=torch.float64)
    out = over_bits(q, k, v, pack_bits(keep), scale=SCALE, bias=bias, is_causal=True)
    # Dense attention by torch's own operations; the first row has a key, so no NaN.
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (SCALE * q @ wide_k.mT + bias).masked_fill(~keep, -torch.inf)
    dense = scores.softmax(-1) @ wide_v
    assert torch.allclose(out, dense, rtol=0, atol=1e-12)
    got, wanted = (torch.autograd.grad(o, (q, k, v, bias), grad_output) for o in (out, dense))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
        assert not torch.allclose(1.01 * a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_keys", [1, 7, 8, 9, 64, 77])
def test_bits_round_trip_and_bit_j_is_key_j(num_keys: int) -> None:
    keep = torch.rand(3, 5, num_keys) > 0.5
    bits = pack_bits(keep)
    assert bits.dtype == torch.uint8 and bits.shape == (3, 5, -(-num_keys // 8))
    assert torch.equal(unpack_bits(bits, num_keys), keep)
    wanted = np.packbits(keep.numpy(), axis=-1, bitorder="little")
    assert np.array_equal(bits.numpy(), wanted)


def test_dropout_depends_on_draw_stream_and_chunk_and_drops_its_share() -> None:
    shape = (1, 1, 1, 1024, 64, 2, 1)
    q, k, v = (t.detach() for t in operands(shape, torch.float32))
    v = torch.ones_like(v)
    keep = torch.ones(1, 1, 1024, 64, dtype=torch.bool)
    q = torch.zeros_like(q)  # equal weights: an output is the share kept, over 1 - p
    out = [
        over_bits(q, k, v, pack_bits(keep), scale=1.0, **d)
        for d in (dropped(), dropped(number=4), dropped(stream=8), dropped())
    ]
    assert torch.equal(out[0], out[3])
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    kept = out[0].double() * 0.6
    z = (kept.mean() - 0.6) / math.sqrt(0.6 * 0.4 / (1024 * 64))
    assert abs(float(z)) < 4.9
    wrong = (kept.mean() - 0.62) / math.sqrt(0.6 * 0.4 / (1024 * 64))
    assert abs(float(wrong)) > 4.9


class _Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.num_bytes = max(self.num_bytes, *sizes, 0)
        return result


@pytest.mark.parametrize("with_dropout", [False, True])
def test_only_q_k_v_and_the_bits_are_saved_and_no_square_is_made(
    with_dropout: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 2**12)
    n, num_kept = 256, 16
    shape = (1, 2, 1, n, n, 8, 4)
    x = operands(shape, torch.float32)
    bits = pack_bits(choose(shape, 2, num_kept, causal=True))
    saved: list[Tensor] = []
    how = dropped() if with_dropout else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        _Largest() as seen,
    ):
        out = over_bits(*x, bits, scale=SCALE, **how)
        out.sum().backward()
    kept = sum(t.numel() * t.itemsize for t in saved)
    # The draw number of dropout is one int64.
    chosen = 2 * n * n // 8
    assert kept == 4 * sum(t.numel() for t in x) + chosen + 8 * with_dropout
    # The specification's formula, values and an int32 index for every kept key, is the bound.
    assert chosen <= 2 * n * num_kept * (4 + 4)
    assert seen.num_bytes < n * n
    with _Largest() as square:
        torch.softmax(x[0][0] @ x[1][0].mT, -1)
    assert square.num_bytes >= 4 * n * n


def test_nothing_is_saved_or_computed_for_frozen_inputs() -> None:
    shape = (1, 2, 2, 5, 5, 3, 3)
    q, k, v = operands(shape)
    keep = choose(shape, 2, 3, causal=True)
    saved: list[Tensor] = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        over_bits(q, k, v, pack_bits(keep), scale=SCALE)
    assert not saved
    out = over_bits(q, k, v, pack_bits(keep), scale=SCALE)
    full = torch.autograd.grad(out.sum(), (q, k, v))
    for i in range(3):
        alone = [t if j == i else t.detach() for j, t in enumerate((q, k, v))]
        out = over_bits(*alone, pack_bits(keep), scale=SCALE)
        assert torch.equal(torch.autograd.grad(out.sum(), alone[i])[0], full[i])


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs() -> None:
    shape = (1, 2, 2, 9, 9, 4, 4)
    x = operands(shape, torch.float32)
    keep = choose(shape, 2, 4, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = over_bits(*x, pack_bits(keep), scale=SCALE)
    low = [t.detach().bfloat16() for t in x]
    assert torch.equal(out, over_bits(*low, pack_bits(keep), scale=SCALE))
    out.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in x)


def test_strided_inputs_and_grad_outputs() -> None:
    shape = (2, 4, 2, 13, 13, 6, 5)
    x = operands(shape)
    strided = tuple(
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in x
    )
    keep = choose(shape, 4, 4, causal=True)
    grad_output = torch.randn(2, 13, 4, 5, dtype=torch.float64).transpose(1, 2)
    for a, b in zip(
        run(x, keep, grad_output.contiguous()),
        run(strided, keep, grad_output),
        strict=True,
    ):
        assert np.array_equal(a, b)


def test_two_runs_give_the_same_bits() -> None:
    shape = (2, 4, 2, 64, 64, 16, 16)
    x = operands(shape, torch.float32)
    keep = choose(shape, 4, 16, causal=True)
    grad_output = torch.randn(2, 4, 64, 16)
    for a, b in zip(*(run(x, keep, grad_output) for _ in range(2)), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_twice_and_the_cpus_values() -> None:
    shape = (2, 4, 2, 64, 64, 16, 16)
    x = operands(shape, torch.float32)
    keep = choose(shape, 4, 16, causal=True)
    grad_output = torch.randn(2, 4, 64, 16)
    there = tuple(t.detach().cuda().requires_grad_() for t in x)
    first, second = (over_bits(*there, pack_bits(keep).cuda(), scale=SCALE) for _ in range(2))
    grads = [torch.autograd.grad(o, there, grad_output.cuda()) for o in (first, second)]
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    on_gpu = tuple(t.detach().double().cpu().numpy() for t in (first, *grads[0]))
    assert error(on_gpu, run(x, keep, grad_output)) < 1e-5
