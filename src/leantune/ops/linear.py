"""The one linear autograd Function: exact output and input gradient, and a choice of what is kept.

Legend: n rows (all leading dimensions flattened), d_in, d_out, w features kept of each row.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.codec import EXACT, Codec
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct, RowPolicy


class TrainedSubspace(Protocol):
    """A trained subspace says which parameter a linear trains instead of its weight.

    Output and input gradient stay those of the weight. Input rows are projected before anything is
    stored, so that a small subspace also keeps little; the weight gradient comes in factored form,
    so that what the subspace does not want is never formed.
    """

    @property
    def parameter(self) -> Tensor:
        """The trained parameter, of any shape; asked anew at each call, since sharding replaces it.

        The linear's own weight is allowed: the subspace then changes its gradient alone.
        """
        ...

    def project(self, rows: Tensor) -> Tensor:
        """Return what the subspace needs of input rows (n, d_in), (n, w); linear, row by row."""
        ...

    def grad(self, outer: OuterProduct) -> Tensor:
        """Return the gradient of :attr:`parameter`, in its shape."""
        ...


def flatten(x: Tensor) -> Tensor:
    """Return ``x`` (..., d) as rows, (n, d)."""
    return x.reshape(-1, x.shape[-1])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rows: RowPolicy | None = None,
    codec: Codec = EXACT,
    key: RandomKey | None = None,
    subspace: TrainedSubspace | None = None,
) -> Tensor:
    """Return ``x weight^T + bias``; only the weight gradient comes from what was kept of ``x``.

    The output, the input gradient and the bias gradient are the plain linear's, to the bit in
    float32. Under autocast the product runs in the autocast dtype; the weight is cast again in
    backward, so that no second copy of it is kept. A weight without a gradient keeps no input.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in); a tensor with a graph of its own gets its gradient, too.
        bias: (d_out,) or None.
        rows: which rows of ``x`` are kept; None for all of them.
        codec: in how many bits they are kept.
        key: the random numbers of ``rows``; needed with it.
        subspace: what is trained instead of the weight, which then gets no gradient.

    Returns:
        (..., d_out).
    """
    dtype = autocast_dtype(x)
    xc = x.detach()
    if dtype is not None:
        xc = xc.to(dtype)
    trained = None if subspace is None else subspace.parameter
    # Saved first, multiplied second: see _SaveForBackward.
    placeholder: Tensor = _SaveForBackward.apply(
        x, xc, weight, bias, trained, rows, codec, key, subspace
    )
    bc = None if bias is None else bias.detach()
    return _MatMul.apply(placeholder, xc, weight.detach(), bc, dtype)  # type: ignore[no-any-return]


class _SaveForBackward(torch.autograd.Function):
    """The first half of a linear decides what backward keeps, and returns a placeholder.

    A linear is two autograd nodes so that *saving happens before multiplying*. When a checkpointed
    block is recomputed, torch stops as soon as the last saved tensor exists; because this half
    saves first, the block's last matrix product is skipped (a quarter to a third of a norm-first
    block). ``_MatMul`` computes the output and passes its gradient to this node unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xc: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Tensor | None,
        rows: RowPolicy | None,
        codec: Codec,
        key: RandomKey | None,
        subspace: TrainedSubspace | None,
    ) -> Tensor:
        ctx.num_rows = ctx.note = None
        saved: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[2 if subspace is None else 4]:
            # The caller's own tensor, where it is the one to keep: nothing is stored twice.
            inputs = x if xc.dtype == x.dtype else xc
            with autocast_off(x):
                if subspace is not None:
                    inputs = subspace.project(flatten(inputs)).view(*x.shape[:-1], -1)
                kept = KeptRows(inputs)
                if rows is not None:
                    assert key is not None
                    kept, ctx.note = rows.keep(inputs, x if subspace is None else inputs, key)
                saved = codec.encode(kept.rows)
            if kept.indices is not None:
                assert kept.weights is not None
                saved = (kept.indices, kept.weights, *saved)
                ctx.num_rows = len(kept.indices)
        ctx.save_for_backward(weight, *saved)
        ctx.rows, ctx.codec, ctx.subspace = rows, codec, subspace
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, trained)]
        ctx.shape = x.shape
        # One element however large the output: the placeholder is never read.
        return xc.new_empty(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        weight, *saved = ctx.saved_tensors
        subspace: TrainedSubspace | None = ctx.subspace
        grad_x = grad_weight = grad_bias = grad_trained = None
        g2 = flatten(grad_output)
        with autocast_off(grad_output):
            if ctx.needs_input_grad[0]:
                grad_x = (g2 @ weight.to(g2.dtype)).view(ctx.shape)
            if saved:
                outer = _outer_product(ctx, saved, g2)
                if subspace is None:
                    grad_weight = outer.dense()
                else:
                    grad_trained = subspace.grad(outer)
            if ctx.needs_input_grad[3]:
                grad_bias = g2.sum(0)
        grads = (grad_x, grad_weight, grad_bias, grad_trained)
        for_x, *others = [
            g if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)
        ]
        return (for_x, None, *others, None, None, None, None)


def _outer_product(ctx: Any, saved: list[Tensor], grad_output: Tensor) -> OuterProduct:
    """Return the weight gradient in factored form, from what was saved."""
    indices = weights = None
    if ctx.num_rows is not None:
        indices, weights, *saved = saved
    kept = ctx.codec.decode(tuple(saved))
    if ctx.rows is None:
        return OuterProduct(grad_output, flatten(kept))
    return ctx.rows.outer_product(KeptRows(kept, indices, weights), ctx.note, grad_output)


class _MatMul(torch.autograd.Function):
    """The second half of a linear multiplies; it keeps nothing and hands its gradient back."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: Tensor,
        xc: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        if dtype is not None:
            weight = weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with autocast_off(xc):
            return F.linear(xc, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return grad_output, None, None, None, None
