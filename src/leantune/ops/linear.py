"""The one linear autograd Function: exact output and input gradient, and a choice of what is kept.

Legend: n rows (all leading dimensions flattened), d_in, d_out, w features kept of each row.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn import functional as F

from leantune.ops.autocast import autocast_dtype, autocast_off
from leantune.ops.codec import EXACT, Codec
from leantune.ops.random import RandomKey
from leantune.ops.rows import KeptRows, OuterProduct, RowPolicy

_as_no_view = torch.ops.aten._unsafe_view.default


class TrainedSubspace(Protocol):
    """A trained subspace says which parameter a linear trains instead of its weight.

    Output and input gradient are those of the weight that it gives. Input rows are projected before
    anything is stored, so that a small subspace also keeps little; the weight gradient comes in
    factored form, so that what the subspace does not want is never formed.
    """

    @property
    def parameter(self) -> Tensor:
        """The trained parameter, of any shape; asked anew at each call, since sharding replaces it.

        The linear's own weight is allowed: the subspace then changes its gradient alone.
        """
        ...

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        """Return the weight (d_out, d_in) that the linear computes with.

        It is asked for in forward and again in backward, so that nothing but the two arguments is
        kept between. What needs no weight of its own returns ``base``.

        Args:
            base: (d_out, d_in), the linear's own weight.
            trained: :attr:`parameter`.
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
    xc = x.detach() if dtype is None else x.detach().to(dtype)
    trained = weight if subspace is None else subspace.parameter
    note = indices = weights = None
    saved: tuple[Tensor, ...] = ()
    if trained.requires_grad and torch.is_grad_enabled():
        # Outside the autograd Function: a compiler lets a policy keep state here, but not there.
        with autocast_off(x):
            inputs, source = xc, x
            if subspace is not None:
                flat = flatten(xc)
                projected = subspace.project(flat)
                if projected is not flat:
                    inputs = source = projected.view(*x.shape[:-1], -1)
            if rows is not None:
                assert key is not None
                (inputs, indices, weights), note = rows.keep(inputs, source, key)
            saved = codec.encode(inputs)
        if indices is not None:
            assert weights is not None
            saved = (indices, weights, *saved)
    used = weight.detach()
    if subspace is not None and trained is not weight:
        used = subspace.effective(used, trained.detach())
    how = _How(rows, codec, subspace, note, indices is not None)
    # Saved first, multiplied second: see _SaveForBackward.
    placeholder: Tensor = _SaveForBackward.apply(
        x, weight, bias, None if subspace is None else trained, xc.dtype, how, *saved
    )
    bc = None if bias is None else bias.detach()
    return _MatMul.apply(placeholder, xc, used, bc, dtype)  # type: ignore[no-any-return]


class _How(NamedTuple):
    """How backward makes the weight gradient of what was saved."""

    rows: RowPolicy | None
    codec: Codec
    subspace: TrainedSubspace | None
    note: Any
    is_sampled: bool


class _SaveForBackward(torch.autograd.Function):
    """The first half of a linear holds what backward keeps, and returns a placeholder.

    A linear is two autograd nodes so that *saving happens before multiplying*. When a checkpointed
    block is recomputed, torch stops as soon as the last saved tensor exists; because this half
    saves first, the block's last matrix product is skipped (a quarter to a third of a norm-first
    block). ``_MatMul`` computes the output and passes its gradient to this node unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        trained: Tensor | None,
        dtype: torch.dtype,
        how: _How,
        *saved: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, trained, *saved)
        ctx.how, ctx.shape = how, x.shape
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.trained_dtype = None if trained is None else trained.dtype
        # One element however large the output: the placeholder is never read.
        shape = (*x.shape[:-1], weight.shape[0])
        return x.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        weight, trained, *saved = ctx.saved_tensors
        how: _How = ctx.how
        grad_x = grad_weight = grad_bias = grad_trained = indices = weights = None
        num_saved = len(saved)
        g2 = grad_output.reshape(-1, grad_output.shape[-1])
        with autocast_off(grad_output):
            if ctx.needs_input_grad[0]:
                if how.subspace is not None:
                    weight = how.subspace.effective(weight, trained)
                grad_x = (g2 @ weight.to(g2.dtype)).view(ctx.shape).to(ctx.x_dtype)
            if how.is_sampled:
                indices, weights, *saved = saved
            if saved:
                kept = how.codec.decode(tuple(saved))
                if how.rows is None:
                    outer = OuterProduct(g2, kept.reshape(-1, kept.shape[-1]))
                else:
                    kept_rows = KeptRows(kept, indices, weights)
                    outer = how.rows.outer_product(kept_rows, how.note, g2)
                if how.subspace is None:
                    grad_weight = outer.dense().to(ctx.weight_dtype)
                else:
                    grad_trained = how.subspace.grad(outer).to(ctx.trained_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = g2.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_trained, None, None, *([None] * num_saved)


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
        if dtype is None:
            y = F.linear(xc, weight, bias)
        else:
            with autocast_off(xc):
                y = F.linear(xc, weight.to(dtype), None if bias is None else bias.to(dtype))
        # A view that an autograd Function returns may not be written to, as in ``y *= 0.5``.
        # A compiler cannot ask whether it is one, and gets the same for nothing.
        is_view = is_compiling() or y._is_view()
        return _as_no_view(y, y.shape) if is_view else y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return grad_output, None, None, None, None
