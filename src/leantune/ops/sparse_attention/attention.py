"""Attention over chosen keys: exact for that choice, and no tensor of queries times keys is kept.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width of queries and keys, dv
width of values; a tile holds p pairs of a batch and a key head, x queries and y keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.random import RandomKey, uniform_at
from leantune.ops.sparse_attention.tiles import AttentionArgs, BitmaskTiles, Tile, accumulator


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    key: RandomKey | None = None,
    is_causal: bool = False,
    block_size: int | None = None,
) -> Tensor:
    """Return attention of each query over its chosen keys; the gradient is exact for that choice.

    ``out_i = sum_j P_ij v_j`` over the chosen j, with ``P_i = softmax_j(scale * q_i k_j + bias)``.
    Backward recomputes P and uses ``dS = P (dP - sum_j P dP)``. Saved are q, k, v and the bits
    alone (and the bias, if any): a tile holds whole rows, so neither the output nor a log-sum-exp
    is needed. Products accumulate in float32 (float64 stays). Two runs give the same bits, on a
    GPU too. Under autocast q, k and v are cast to its dtype first.

    A query without a key gets output 0 and gives gradient 0.

    Args:
        q: (b, h, n, d), float16, bfloat16, float32 or float64; k and v alike, all finite.
        k: (b, hk, m, d), hk a divisor of h: query head i reads key head ``i // (h / hk)``.
        v: (b, hk, m, dv).
        bits: (b, h, n, ceil(m / 8)) uint8, the chosen keys; bit j % 8 of byte j // 8 for key j.
        scale: factor of the products, usually ``d ** -0.5``.
        bias: (b or 1, h or 1, n or 1, m), added to the scaled products.
        dropout: probability that a weight P is dropped, in [0, 1).
        key: of dropout, which is a function of counted numbers: backward replays it, no mask is
            kept. Needed where dropout > 0.
        is_causal: promises that query i chose no key behind position ``m - n + i``, which halves
            the work.
        block_size: promises that this many neighbouring queries chose few different keys: tiles
            are blocks of queries then, and read the keys that one of them chose.

    Returns:
        (b, h, n, dv) in the dtype of q.

    Source: arXiv 2312.10365, sparse multi-head attention; the recomputation is an addition.
    """
    _check(q, k, v, bits, bias)
    assert dropout == 0 or key is not None
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed, counter, stream = (0, None, 0) if key is None or dropout == 0 else key
    args = AttentionArgs(scale, dropout, seed, stream, is_causal, block_size)
    return _SparseAttention.apply(q, k, v, bias, bits, counter, args)  # type: ignore[no-any-return]


def _check(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, bias: Tensor | None) -> None:
    b, h, n, m = *q.shape[:3], k.shape[2]
    assert h % k.shape[1] == 0 and v.shape[:3] == k.shape[:3], (q.shape, k.shape, v.shape)
    assert bits.dtype == torch.uint8 and bits.shape == (b, h, n, -(-m // 8)), bits.shape
    if bias is not None:
        wanted = zip(bias.shape, (b, h, n), strict=False)
        assert all(x in (1, y) for x, y in wanted) and bias.shape[3:] == (m,), bias.shape


class _Weights(NamedTuple):
    """The weights of one tile."""

    has_key: Tensor  # (p, x, 1)
    weights: Tensor  # (p, x, y), before dropout
    factors: Tensor | None  # (p, x, y), 0 or 1 / (1 - p)

    @property
    def dropped(self) -> Tensor:
        return self.weights if self.factors is None else self.weights * self.factors


def _weigh(
    tiles: BitmaskTiles,
    tile: Tile,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    counter: Tensor | None,
) -> _Weights:
    args = tiles.args
    scores = torch.bmm(queries, keys.mT).mul_(args.scale)
    if bias is not None:
        scores += tiles.load_bias(bias, tile)
    weights = scores.masked_fill_(~tile.keep, -torch.inf).softmax(-1)
    has_key = tile.keep.any(-1, keepdim=True)
    weights = weights.masked_fill_(~has_key, 0.0)
    factors = None
    if counter is not None:
        key = RandomKey(args.seed, counter, args.stream)
        u = uniform_at(key, tiles.row_numbers(tile), tile.columns)
        factors = (u >= args.dropout).to(weights.dtype).div_(1.0 - args.dropout)
    return _Weights(has_key, weights, factors)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        bits: Tensor,
        counter: Tensor | None,
        args: AttentionArgs,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, bits, counter)
        ctx.args = args
        wide = accumulator(q)
        tiles = BitmaskTiles(q, k, bits, args)
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        with autocast_off(q):
            for tile in tiles:
                queries = tiles.load_queries(q, tile).to(wide)
                keys, values = (tiles.load_keys(x, tile).to(wide) for x in (k, v))
                w = _weigh(tiles, tile, queries, keys, bias, counter)
                tiles.store_queries_(out, tile, torch.bmm(w.dropped, values))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        q, k, v, bias, bits, counter = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_bias = ctx.needs_input_grad[:4]
        wide = accumulator(q)
        tiles = BitmaskTiles(q, k, bits, ctx.args)
        grad_q = torch.zeros_like(q) if needs_q else None
        grad_k = torch.zeros_like(k, dtype=wide) if needs_k else None
        grad_v = torch.zeros_like(v, dtype=wide) if needs_v else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with autocast_off(q):
            for tile in tiles:
                queries = tiles.load_queries(q, tile).to(wide)
                keys, values = (tiles.load_keys(x, tile).to(wide) for x in (k, v))
                w = _weigh(tiles, tile, queries, keys, bias, counter)
                grad_out = tiles.load_queries(grad_output, tile).to(wide)
                grad_out = grad_out.masked_fill(~w.has_key, 0.0)
                if grad_v is not None:
                    tiles.add_keys_(grad_v, tile, torch.bmm(w.dropped.mT, grad_out))
                if grad_q is None and grad_k is None and grad_bias is None:
                    continue
                grad_scores = _grad_scores(w, grad_out, values)
                if grad_bias is not None:
                    tiles.add_bias_(grad_bias, tile, grad_scores)
                grad_scores *= tiles.args.scale
                if grad_q is not None:
                    tiles.store_queries_(grad_q, tile, torch.bmm(grad_scores, keys))
                if grad_k is not None:
                    tiles.add_keys_(grad_k, tile, torch.bmm(grad_scores.mT, queries))
        # Autograd casts each to the dtype of its input.
        return grad_q, grad_k, grad_v, grad_bias, None, None, None


def _grad_scores(w: _Weights, grad_out: Tensor, values: Tensor) -> Tensor:
    """Return ``P (dP - sum_j P dP)``, (p, x, y); the sum is as often negative as positive."""
    grad_weights = torch.bmm(grad_out, values.mT)
    if w.factors is not None:
        grad_weights *= w.factors
    row_dot = (w.weights * grad_weights).sum(-1, keepdim=True)
    return grad_weights.sub_(row_dot).mul_(w.weights)
