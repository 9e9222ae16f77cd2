"""Attention over chosen keys: exact for the choice, and nothing of queries times keys is kept.

Legend: b batch, h query heads, hk key heads, g = h / hk, n queries, m keys, l kept keys per query,
d width of queries and keys, dv width of values; x queries and y keys of one part, p times.

A choice is a plain tensor, in whichever form is smaller: bits, (b, h, n, ceil(m / 8)) uint8, bit
j % 8 of byte j // 8 for key j; or indices, (b, h, n, l) int16, int32 or int64, ascending, then
negative in slots without a key. Bits are run by products of whole parts under a mask, indices by
gathering: on a CPU core at width 64 the first is faster above about m / 16 kept keys (m = 2048,
l = 256: 200 against 526 ms; m = 4096, l = 128: 760 against 404 ms), which is also where bits are
smaller than int16 indices.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.errors import LeantuneError
from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.rows import uniform_at
from leantune.ops.sparse_parts import Gathered, How, Masked, Part
from leantune.ops.stores import Draw


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
    choice: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    is_causal: bool = False,
    block_size: int | None = None,
) -> Tensor:
    """Return attention of each query over its chosen keys; the gradient is exact for that choice.

    ``out_i = sum_j P_ij v_j`` over the chosen j, with ``P_i = softmax_j(scale * q_i k_j + bias)``.
    Backward recomputes P and uses ``dS = P (dP - sum_j P dP)``. Saved are q, k, v and the choice
    alone (and the bias, if any): a part holds whole rows, so neither the output nor a log-sum-exp
    is needed. Products accumulate in float32 (float64 stays). Two runs give the same bits, on a
    GPU too. Under autocast q, k and v are cast to its dtype first.

    A query without a key gets output 0 and gives gradient 0.

    Args:
        q: (b, h, n, d), float16, bfloat16, float32 or float64; k and v alike, all finite.
        k: (b, hk, m, d), hk a divisor of h: query head i reads key head ``i // (h / hk)``.
        v: (b, hk, m, dv).
        choice: bits or indices, as in the legend of this file. Equal neighbouring indices count
            once.
        scale: factor of the products, usually ``d ** -0.5``.
        bias: (b or 1, h or 1, n or 1, m), added to the scaled products; with bits only.
        dropout: of the weights P, or None.
        is_causal: promises that query i chose no key behind position ``m - n + i``, which halves
            the work on bits.
        block_size: promises that this many neighbouring queries chose few different keys: parts
            are blocks of queries then, and read the keys that one of them chose. With bits only.

    Returns:
        (b, h, n, dv) in the dtype of q.

    Raises:
        LeantuneError: heads, a choice or a bias that do not fit.

    Source: arXiv 2312.10365, sparse multi-head attention; the recomputation is an addition.
    """
    _check(q, k, v, choice, bias)
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    number = None if dropout is None else dropout.draw.number
    plain = None if dropout is None else (dropout.p, dropout.draw.seed, dropout.stream)
    how = How(scale, plain, is_causal, block_size)
    return _SparseAttention.apply(q, k, v, bias, choice, number, how)  # type: ignore[no-any-return]


def _check(q: Tensor, k: Tensor, v: Tensor, choice: Tensor, bias: Tensor | None) -> None:
    b, h, n, _ = q.shape
    hk, m = k.shape[1:3]
    if h % hk or v.shape[:3] != k.shape[:3]:
        raise LeantuneError(
            f"sparse_attention: k and v must have a number of heads that divides the {h} heads of "
            f"q, got {hk} and {v.shape[1]}; their (batch, heads, keys) must be equal"
        )
    is_bits = choice.dtype == torch.uint8
    wide = -(-m // 8) if is_bits else choice.shape[-1]
    if choice.shape != (b, h, n, wide):
        raise LeantuneError(
            f"sparse_attention: choice must have shape ({b}, {h}, {n}, {wide if is_bits else 'l'}),"
            f" got {tuple(choice.shape)}; choose for every query of every query head"
        )
    if bias is not None and not (is_bits and _fits(bias, (b, h, n, m))):
        raise LeantuneError(
            f"sparse_attention: bias must have shape ({b} or 1, {h} or 1, {n} or 1, {m}) and come "
            f"with a choice in bits, got {tuple(bias.shape)} and {choice.dtype}"
        )


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    same = [have in (1, want) for have, want in zip(x.shape, shape, strict=False)]
    return x.ndim == 4 and all(same) and x.shape[-1] == shape[-1]


class _Weights(NamedTuple):
    """The weights of one part."""

    has_key: Tensor  # (p, x, 1)
    weights: Tensor  # (p, x, y), before dropout
    factors: Tensor | None  # (p, x, y), 0 or 1 / (1 - p)

    @property
    def dropped(self) -> Tensor:
        return self.weights if self.factors is None else self.weights * self.factors


def _weigh(
    layout: Gathered | Masked,
    part: Part,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    number: Tensor | None,
    how: How,
) -> _Weights:
    scores = torch.bmm(queries, keys.mT).mul_(how.scale)
    if bias is not None:
        assert isinstance(layout, Masked)
        scores += layout.bias(bias, part)
    weights = scores.masked_fill_(~part.keep, -torch.inf).softmax(-1)
    has_key = part.keep.any(-1, keepdim=True)
    weights = weights.masked_fill_(~has_key, 0.0)
    factors = None
    if number is not None and how.dropout is not None:
        p, seed, stream = how.dropout
        u = uniform_at(seed, stream, number, layout.row_numbers(part), part.columns)
        factors = (u >= p).to(weights.dtype).div_(1.0 - p)
    return _Weights(has_key, weights, factors)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        choice: Tensor,
        number: Tensor | None,
        how: How,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, choice, number)
        ctx.how = how
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        layout = _layout(choice)(q, k, choice, how)
        queries, keys, values = layout.lay_queries(q), layout.lay_keys(k), layout.lay_keys(v)
        out = layout.lay_queries(q.new_zeros(*q.shape[:3], v.shape[-1]))
        with autocast_off(q):
            for part in layout.parts():
                q_part = layout.take(queries, part).to(wide)
                k_part, v_part = (layout.read(x, part).to(wide) for x in (keys, values))
                w = _weigh(layout, part, q_part, k_part, bias, number, how)
                layout.put_(out, part, torch.bmm(w.dropped, v_part))
        return out.view(*q.shape[:3], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        q, k, v, bias, choice, number = ctx.saved_tensors
        how: How = ctx.how
        needs_q, needs_k, needs_v, needs_bias = ctx.needs_input_grad[:4]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        layout = _layout(choice)(q, k, choice, how)
        queries, keys, values = layout.lay_queries(q), layout.lay_keys(k), layout.lay_keys(v)
        grad_out = layout.lay_queries(grad_output)
        grad_q = torch.zeros_like(queries) if needs_q else None
        grad_k = torch.zeros_like(keys, dtype=wide) if needs_k else None
        grad_v = torch.zeros_like(values, dtype=wide) if needs_v else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with autocast_off(q):
            for part in layout.parts():
                q_part = layout.take(queries, part).to(wide)
                k_part, v_part = (layout.read(x, part).to(wide) for x in (keys, values))
                w = _weigh(layout, part, q_part, k_part, bias, number, how)
                g_part = layout.take(grad_out, part).to(wide).masked_fill(~w.has_key, 0.0)
                if grad_v is not None:
                    layout.add_(grad_v, part, torch.bmm(w.dropped.mT, g_part))
                if grad_q is None and grad_k is None and grad_bias is None:
                    continue
                grad_scores = _grad_scores(w, g_part, v_part)
                if grad_bias is not None:
                    assert isinstance(layout, Masked)
                    layout.add_bias_(grad_bias, part, grad_scores)
                grad_scores *= how.scale
                if grad_q is not None:
                    layout.put_(grad_q, part, torch.bmm(grad_scores, k_part))
                if grad_k is not None:
                    layout.add_(grad_k, part, torch.bmm(grad_scores.mT, q_part))
        return (
            None if grad_q is None else grad_q.view(q.shape),
            None if grad_k is None else grad_k.view(k.shape).to(k.dtype),
            None if grad_v is None else grad_v.view(v.shape).to(v.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 3,
        )


def _layout(choice: Tensor) -> type[Gathered] | type[Masked]:
    return Masked if choice.dtype == torch.uint8 else Gathered


def _grad_scores(w: _Weights, grad_out: Tensor, values: Tensor) -> Tensor:
    """Return ``P (dP - sum_j P dP)``, (p, x, y); the sum is as often negative as positive."""
    grad_weights = torch.bmm(grad_out, values.mT)
    if w.factors is not None:
        grad_weights *= w.factors
    row_dot = (w.weights * grad_weights).sum(-1, keepdim=True)
    return grad_weights.sub_(row_dot).mul_(w.weights)
