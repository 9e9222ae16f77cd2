"""Attention over chosen keys: exact for the choice, and nothing of queries times keys is ever made.

Legend: b batch, h query heads, hk key heads, g query heads per row of indices, n queries, m keys,
l kept keys per query (the ELL layout: a plain axis, short rows padded), d width of queries and
keys, dv width of values, r rows of indices in one chunk (b, heads and n flattened).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.errors import LeantuneError
from leantune.ops.linear import _autocast_dtype, _autocast_off
from leantune.ops.rows import uniform
from leantune.ops.stores import Draw

# Gathered numbers per chunk and tensor. The same on every device, since the chunks decide which
# dropout number a weight gets.
_CHUNK_NUMBERS = 2**20


class Dropout(NamedTuple):
    """Dropout of attention weights by counted numbers: backward replays it, no mask is kept.

    Args:
        p: probability that a weight is dropped, in [0, 1).
        draw: seed and number of the draw.
        stream: tells sites apart.
    """

    p: float
    draw: Draw
    stream: int


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float,
    is_valid: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """Return attention of each query over its chosen keys; the gradient is exact for that choice.

    ``out_i = sum_l P_il v_idx(i,l)`` with ``P_i = softmax_l(scale * q_i k_idx(i,l))`` over the
    valid slots. Backward recomputes P and uses ``dS = P (dP - sum_l P dP)``. Saved are q, k, v
    and the indices alone: a chunk holds whole rows, so neither the output nor a log-sum-exp is
    needed. Queries go chunk by chunk, a transient tensor holds about 2**20 gathered numbers, or
    one query's if those are more. Products accumulate in float32 (float64 stays). Two runs give
    the same bits, on a GPU too. Under autocast q, k and v are cast to its dtype first.

    A query without a valid key gets output 0 and gives gradient 0. What an invisible key holds,
    NaN included, reaches nothing.

    Args:
        q: (b, h, n, d), float16, bfloat16, float32 or float64; k and v alike.
        k: (b, hk, m, d), hk a divisor of h: query head i reads key head ``i // (h / hk)``.
        v: (b, hk, m, dv).
        indices: (b, h or hk, n, l) int32 or int64, in [0, m) or negative in slots without a key;
            one choice per query head, or one shared by the query heads of a key head. The valid
            ones of a row must ascend; equal neighbours count once.
        scale: factor of the products, usually ``d ** -0.5``.
        is_valid: like indices, bool; None: valid is what is not negative. It saves a copy of the
            indices to leave it out.
        dropout: of the weights P, or None.

    Returns:
        (b, h, n, dv) in the dtype of q.

    Raises:
        LeantuneError: heads or indices that do not fit.

    Source: arXiv 2312.10365, sparse multi-head attention; the recomputation is an addition.
    """
    _check(q, k, v, indices)
    if is_valid is not None:
        indices = indices.masked_fill(~is_valid, -1)
    dtype = _autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    number = None if dropout is None else dropout.draw.number
    plain = None if dropout is None else (dropout.p, dropout.draw.seed, dropout.stream)
    return _SparseAttention.apply(q, k, v, indices, number, scale, plain)  # type: ignore[no-any-return]


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add ``rows`` to the rows of ``target`` that ``index`` names, in an order that never changes.

    Args:
        target: (n, d).
        index: (k,) int64, in [0, n), repeats possible.
        rows: (k, d).
    """
    if target.is_cuda:
        # Sorts by index, while index_add_ and scatter_add_ use atomics there.
        target.index_put_((index,), rows, accumulate=True)
    else:
        # One thread after the other on the CPU, where it is index_put_ that races.
        target.index_add_(0, index, rows)


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> None:
    b, h, n, _ = q.shape
    hk = k.shape[1]
    if h % hk or v.shape[:3] != k.shape[:3]:
        raise LeantuneError(
            f"sparse_attention: k and v must have a number of heads that divides the {h} heads of "
            f"q, got {hk} and {v.shape[1]}; their (batch, heads, keys) must be equal"
        )
    if indices.shape[:3] not in ((b, h, n), (b, hk, n)):
        raise LeantuneError(
            f"sparse_attention: indices must have shape ({b}, {h} or {hk}, {n}, keys kept), got "
            f"{tuple(indices.shape)}; choose per query head, or once per key head"
        )


class _Chunk(NamedTuple):
    """Some rows of indices: where they are, and the weights that belong to them."""

    rows: slice
    flat: Tensor  # (r * l,) int64, into keys of all batches and heads
    is_valid: Tensor  # (r, 1, l)
    has_key: Tensor  # (r, 1, 1)
    keys: Tensor  # (r, l, d)
    values: Tensor  # (r, l, dv)
    weights: Tensor  # (r, g, l), before dropout
    kept: Tensor | None  # (r, g, l), 0 or 1 / (1 - p)


class _Operands(NamedTuple):
    """The inputs with batch, heads and positions flattened, in their own dtype."""

    q: Tensor  # (rows, g, d)
    k: Tensor  # (b * hk * m, d)
    v: Tensor  # (b * hk * m, dv)
    indices: Tensor  # (rows, l)
    heads: int  # of the indices
    heads_per_key_head: int
    num_queries: int
    num_keys: int
    dtype: torch.dtype  # of the products

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> "_Operands":
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return cls(
            _by_row(q, indices.shape[1]),
            k.flatten(0, 2),
            v.flatten(0, 2),
            indices.flatten(0, 2),
            indices.shape[1],
            indices.shape[1] // k.shape[1],
            q.shape[2],
            k.shape[2],
            dtype,
        )


def _by_row(x: Tensor, heads: int) -> Tensor:
    """Lay (b, h, n, d) out as (b * heads * n, h / heads, d)."""
    return x.unflatten(1, (heads, -1)).transpose(2, 3).flatten(0, 2)


def _by_head(rows: Tensor, shape: torch.Size, heads: int) -> Tensor:
    """Undo ``_by_row`` for a result of ``shape`` (b, h, n, d)."""
    b, h, n, d = shape
    return rows.view(b, heads, n, h // heads, d).transpose(2, 3).reshape(shape)


def _chunks(
    x: _Operands, scale: float, number: Tensor | None, plain: tuple[float, int, int] | None
) -> Iterator[_Chunk]:
    """Yield the chunks in order; an index without rows or slots yields none."""
    num_rows, l = x.indices.shape  # noqa: E741
    if l == 0 or x.num_keys == 0:
        return
    step = max(1, _CHUNK_NUMBERS // (l * max(x.k.shape[-1], x.v.shape[-1])))
    for position, start in enumerate(range(0, num_rows, step)):
        rows = slice(start, min(start + step, num_rows))
        index = x.indices[rows].long()
        row = torch.arange(start, rows.stop, device=index.device)
        # Batches and heads are numbered together, so one division leads to the key head.
        base = row // (x.num_queries * x.heads_per_key_head) * x.num_keys
        is_valid = index >= 0
        is_valid[:, 1:] &= index[:, 1:] != index[:, :-1]
        # An empty slot reads another key of its own row, so that no invisible key is touched.
        index = torch.where(is_valid, index, index.amax(1, keepdim=True).clamp(min=0))
        flat = (index + base[:, None]).view(-1)
        keys = x.k.index_select(0, flat).view(-1, l, x.k.shape[-1]).to(x.dtype)
        values = x.v.index_select(0, flat).view(-1, l, x.v.shape[-1]).to(x.dtype)
        has_key = is_valid.any(1)[:, None, None]
        is_valid = is_valid[:, None]
        scores = torch.bmm(x.q[rows].to(x.dtype), keys.mT).mul_(scale)
        weights = scores.masked_fill_(~is_valid, -torch.inf).softmax(-1)
        weights = weights.masked_fill_(~has_key, 0.0)
        kept = _dropout(weights, position, number, plain)
        yield _Chunk(rows, flat, is_valid, has_key, keys, values, weights, kept)


def _dropout(
    weights: Tensor, position: int, number: Tensor | None, plain: tuple[float, int, int] | None
) -> Tensor | None:
    if number is None or plain is None:
        return None
    p, seed, stream = plain
    # Seeds are small: the upper half of the word is free to count chunks.
    u = uniform(seed + (position << 32), stream, number, weights.numel(), device=weights.device)
    return (u >= p).to(weights.dtype).div_(1.0 - p).view(weights.shape)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        number: Tensor | None,
        scale: float,
        plain: tuple[float, int, int] | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, indices, number)
        ctx.plain = (scale, plain)
        x = _Operands.of(q, k, v, indices)
        out = q.new_zeros(*x.q.shape[:2], v.shape[-1])
        with _autocast_off(q):
            for c in _chunks(x, scale, number, plain):
                weights = c.weights if c.kept is None else c.weights * c.kept
                out[c.rows] = torch.bmm(weights, c.values).masked_fill_(~c.has_key, 0.0)
        return _by_head(out, torch.Size((*q.shape[:3], v.shape[-1])), x.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        q, k, v, indices, number = ctx.saved_tensors
        scale, plain = ctx.plain
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        x = _Operands.of(q, k, v, indices)
        grad_rows = _by_row(grad_output, x.heads)
        grad_q = torch.zeros_like(x.q) if needs_q else None
        grad_k = torch.zeros_like(x.k, dtype=x.dtype) if needs_k else None
        grad_v = torch.zeros_like(x.v, dtype=x.dtype) if needs_v else None
        with _autocast_off(q):
            for c in _chunks(x, scale, number, plain):
                grad_out = grad_rows[c.rows].to(x.dtype).masked_fill(~c.has_key, 0.0)  # (r, g, dv)
                if grad_v is not None:
                    weights = c.weights if c.kept is None else c.weights * c.kept
                    add_rows_(grad_v, c.flat, torch.bmm(weights.mT, grad_out).flatten(0, 1))
                if grad_q is None and grad_k is None:
                    continue
                grad_scores = _grad_scores(c, grad_out).mul_(scale)
                if grad_q is not None:
                    grad_q[c.rows] = torch.bmm(grad_scores, c.keys).masked_fill_(~c.has_key, 0.0)
                if grad_k is not None:
                    queries = x.q[c.rows].to(x.dtype).masked_fill(~c.has_key, 0.0)
                    rows = torch.bmm(grad_scores.mT, queries)  # (r, l, d)
                    add_rows_(grad_k, c.flat, rows.flatten(0, 1))
        return (
            None if grad_q is None else _by_head(grad_q, q.shape, x.heads),
            None if grad_k is None else grad_k.view(k.shape).to(k.dtype),
            None if grad_v is None else grad_v.view(v.shape).to(v.dtype),
            *(None,) * 4,
        )


def _grad_scores(c: _Chunk, grad_out: Tensor) -> Tensor:
    """Return ``P (dP - sum_l P dP)``, (r, g, l); the sum is as often negative as positive."""
    grad_weights = torch.bmm(grad_out, c.values.mT)
    if c.kept is not None:
        grad_weights *= c.kept
    row_dot = (c.weights * grad_weights).sum(-1, keepdim=True)
    return grad_weights.sub_(row_dot).mul_(c.weights).masked_fill_(~c.is_valid, 0.0)
