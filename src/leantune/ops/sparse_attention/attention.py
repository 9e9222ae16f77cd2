"""Attention over chosen keys: exact for that choice, and no tensor of queries times keys is kept.

Legend: b batch, h query heads, hk key heads, n queries, m keys, d width of queries and keys, dv
width of values; a tile holds p pairs of a batch and a head, x queries and y keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.random import RandomKey, uniform_at
from leantune.ops.sparse_attention.block_tiles import BlockTiles
from leantune.ops.sparse_attention.blocks import BlockList
from leantune.ops.sparse_attention.flex import flex_attention, serves
from leantune.ops.sparse_attention.tiles import Tile, Tiles, accumulator
from leantune.ops.sparse_attention.top_keys import Visibility


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor | BlockList,
    visibility: Visibility,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    key: RandomKey | None = None,
) -> Tensor:
    """Return attention of each query over its chosen keys; the gradient is exact for that choice.

    ``out_i = sum_j P_ij v_j`` over the chosen j, with ``P_i = softmax_j(scale * q_i k_j + bias)``.
    Backward recomputes P and uses ``dS = P (dP - sum_j P dP)``. Saved are q, k, v and the choice
    alone (with blocks the mask, too; and the bias, if any): a tile holds whole rows, so neither
    the output nor a log-sum-exp is needed. Products accumulate in float32 (float64 stays). Two runs
    give the same bits, on a GPU too. Under autocast q, k and v are cast to its dtype first.

    A query without a key gets output 0 and gives gradient 0. On a GPU FlexAttention reads lists of
    blocks where it can (:func:`leantune.ops.sparse_attention.flex.serves`).

    Args:
        q: (b, h, n, d), float16, bfloat16, float32 or float64; k and v alike, all finite.
        k: (b, hk, m, d), hk a divisor of h: query head i reads key head ``i // (h / hk)``.
        v: (b, hk, m, dv).
        chosen: bits of the chosen visible keys, (b, h, n, ceil(m / 8)) uint8, as ``top_keys``
            returns them; or lists of blocks for h heads, or for hk that their query heads share.
        visibility: of the keys; inside chosen blocks it hides some.
        scale: factor of the products, usually ``d ** -0.5``.
        bias: (b or 1, h or 1, n or 1, m), added to the scaled products.
        dropout: probability that a weight P is dropped, in [0, 1).
        key: of dropout, which is a function of counted numbers: backward replays it, no mask is
            kept. Needed where dropout > 0.

    Returns:
        (b, h, n, dv) in the dtype of q.

    Source: arXiv 2312.10365, sparse multi-head attention; the recomputation is an addition.
    """
    _check(q, k, v, bias)
    assert dropout == 0 or key is not None
    dtype, n = autocast_dtype(q), q.shape[2]
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    how: dict[str, Any] = {"is_causal": visibility.hides_later(n)}
    if isinstance(chosen, BlockList):
        if bias is None and dropout == 0 and serves(chosen, q, v):
            return flex_attention(q, k, v, chosen, visibility, scale)
        sizes = (chosen.query_size, chosen.block_size)
        how |= {"shape": (n, k.shape[2]), "sizes": sizes, "bounds": chosen.bounds()}
        tiles, choice = partial(BlockTiles, **how), (chosen.indices, visibility.mask)
    else:
        sizes, tiles, choice = (1, 1), partial(Tiles, **how), (chosen,)
    q, k, v = (_whole_blocks(x, s) for x, s in ((q, sizes[0]), (k, sizes[1]), (v, sizes[1])))
    seed, counter, stream = (0, None, 0) if key is None or dropout == 0 else key
    args = _Args(tiles, scale, dropout, seed, stream)
    out: Tensor = _SparseAttention.apply(q, k, v, bias, args, counter, *choice)  # type: ignore[assignment]
    return out if out.shape[2] == n else out[:, :, :n]


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    assert q.shape[1] % k.shape[1] == 0 and v.shape[:3] == k.shape[:3], (q.shape, k.shape, v.shape)
    if bias is not None:
        fits = all(x in (1, y) for x, y in zip(bias.shape, q.shape[:3], strict=False))
        assert fits and bias.shape[3:] == k.shape[2:3], bias.shape


def _whole_blocks(x: Tensor, size: int) -> Tensor:
    """Return ``x`` (b, any, n, any) contiguous, with zeros to whole blocks of ``size`` rows."""
    missing = -x.shape[2] % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


class _Args(NamedTuple):
    """The arguments of attention that are no tensors.

    Attributes:
        tiles: makes the tiles of (q, k, *choice).
        scale: the factor of the products.
        dropout: the probability that a weight is dropped.
        seed, stream: of the random key of dropout, without its counter.
    """

    tiles: Callable[..., Tiles]
    scale: float
    dropout: float
    seed: int
    stream: int


class _Weights(NamedTuple):
    """The weights of one tile."""

    queries: Tensor  # (p, x, d), scaled
    keys: Tensor  # (p, y, d)
    weights: Tensor  # (p, x, y), before dropout
    factors: Tensor | None  # (p, x, y), 0 or 1 / (1 - p)

    @property
    def dropped(self) -> Tensor:
        return self.weights if self.factors is None else self.weights * self.factors


def _weigh(
    args: _Args,
    tiles: Tiles,
    tile: Tile,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    counter: Tensor | None,
) -> _Weights:
    wide = accumulator(q)
    queries = tiles.load_queries(q, tile.queries).to(wide) * args.scale
    keys = tiles.load_keys(k, tile).to(wide)
    scores = torch.bmm(queries, keys.mT)
    if bias is not None:
        scores += tiles.load_bias(bias, tile)
    scores[..., tile.num_open :].masked_fill_(tile.hidden, -torch.inf)
    weights = scores.softmax(-1)
    if tile.is_empty is not None:
        weights.masked_fill_(tile.is_empty, 0.0)
    factors = None
    if counter is not None:
        key = RandomKey(args.seed, counter, args.stream)
        head, query = tiles.places(tile.queries, q.device)
        u = uniform_at(key, head * tiles.num_queries + query, tile.columns)
        factors = (u >= args.dropout).to(weights.dtype).div_(1.0 - args.dropout)
    return _Weights(queries, keys, weights, factors)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        args: _Args,
        counter: Tensor | None,
        *choice: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, counter, *choice)
        ctx.args = args
        tiles = args.tiles(q, k, *choice)
        bias = tiles.whole(bias)
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        with autocast_off(q):
            for tile in tiles:
                w = _weigh(args, tiles, tile, q, k, bias, counter)
                values = tiles.load_keys(v, tile).to(accumulator(q))
                tiles.store_queries_(out, tile.queries, torch.bmm(w.dropped, values))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # type: ignore[override]
        q, k, v, bias, counter, *choice = ctx.saved_tensors
        args, needs = ctx.args, ctx.needs_input_grad
        wide = accumulator(q)
        tiles = args.tiles(q, k, *choice)
        grad_output = grad_output.contiguous()
        grad_q = torch.zeros_like(q) if needs[0] else None
        grad_k = torch.zeros_like(k, dtype=wide) if needs[1] else None
        grad_v = torch.zeros_like(v, dtype=wide) if needs[2] else None
        whole = tiles.whole(bias)
        grad_bias = torch.zeros_like(whole, dtype=wide) if needs[3] else None
        with autocast_off(q):
            for tile in tiles:
                w = _weigh(args, tiles, tile, q, k, whole, counter)
                grad_out = tiles.load_queries(grad_output, tile.queries).to(wide)
                if tile.is_empty is not None:
                    grad_out = grad_out.masked_fill(tile.is_empty, 0.0)
                if grad_v is not None:
                    tiles.add_keys_(grad_v, tile, torch.bmm(w.dropped.mT, grad_out))
                if grad_q is None and grad_k is None and grad_bias is None:
                    continue
                grad_scores = _grad_scores(w, grad_out, tiles.load_keys(v, tile).to(wide))
                if grad_bias is not None:
                    tiles.add_bias_(grad_bias, tile, grad_scores)
                if grad_q is not None:
                    part = torch.bmm(grad_scores, w.keys).mul_(args.scale)
                    tiles.store_queries_(grad_q, tile.queries, part)
                if grad_k is not None:
                    tiles.add_keys_(grad_k, tile, torch.bmm(grad_scores.mT, w.queries))
        if grad_bias is not None:
            grad_bias = grad_bias[:, :, : bias.shape[2], : bias.shape[3]]
        # Autograd casts each to the dtype of its input.
        return grad_q, grad_k, grad_v, grad_bias, None, None, *(None for _ in choice)


def _grad_scores(w: _Weights, grad_out: Tensor, values: Tensor) -> Tensor:
    """Return ``P (dP - sum_j P dP)``, (p, x, y); the sum is as often negative as positive."""
    grad_weights = torch.bmm(grad_out, values.mT)
    if w.factors is not None:
        grad_weights *= w.factors
    backward = torch.ops.aten._softmax_backward_data
    return backward(grad_weights, w.weights, -1, w.weights.dtype)  # type: ignore[no-any-return]
