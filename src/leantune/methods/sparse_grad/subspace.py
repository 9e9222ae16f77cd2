"""What one linear trains under SparseGrad, the weight that this gives, and its gradient.

Legend: n rows, d_out and d_in the sides of a weight, r_out and r_in the basis vectors in use, k
entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.distributed import full_tensor, shard_like
from leantune.core.linear import Converted, ConvertedConv1D, is_conv1d
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.methods.sparse_grad import maths
from leantune.methods.sparse_grad.config import SparseGrad
from leantune.ops.autocast import autocast_off
from leantune.ops.linear import linear
from leantune.ops.rows import OuterProduct

PARAMETER = {"block": "delta", "fixed": "delta", "step": "rotated_weight"}
"""Selection -> the parameter that a converted linear trains; part of the model's state."""

NOT_CALIBRATED = (
    "SparseGrad: bases must be calibrated before training, got none; call "
    "session.calibrate(batches) with a few training batches (the trainer callback does so by "
    "itself), or load a session that was calibrated"
)

Collect = Callable[["SubspaceRule", Tensor], None]


@dataclass(eq=False)
class Bases:
    """Bases hold the basis vectors of both sides as columns: (d_out, r_out) and (d_in, r_in).

    All linears of one group hold the same object, so that shared bases are in memory once.

    Attributes:
        stored: the dtype that they came in, which holds them without loss in a file.
    """

    q_out: Tensor
    q_in: Tensor

    def __post_init__(self) -> None:
        self.stored = self.q_out.dtype

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Move both to a device, and to a dtype where one is given, for good; return them."""
        dtype = dtype or self.q_out.dtype
        if (self.q_out.device, self.q_out.dtype) != (device, dtype):
            self.q_out, self.q_in = (q.to(device, dtype) for q in (self.q_out, self.q_in))
        return self.q_out, self.q_in


def leading_vectors(bases: Bases, r_out: int, r_in: int) -> Bases:
    """Return the leading vectors, rounded to bfloat16: gradients are exact in any basis.

    The rounded values are the same in every dtype that a product may have later on.
    """
    thin = (bases.q_out[:, :r_out], bases.q_in[:, :r_in])
    dtype = torch.float64 if bases.stored == torch.float64 else torch.bfloat16
    how = {"dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
    return Bases(*(q.to(**how) for q in thin))


class SubspaceRule:
    """A subspace rule says which parameter one linear trains, and forms weight and gradient of it.

    With ``W0`` the linear's own weight, which stays as it is, the linear computes with ``W0 + Q_out
    scatter(delta) Q_in^T``. The sum is formed anew in every forward and backward and rounded once,
    so that no step is lost in a half-precision weight, and nothing but ``delta`` is kept. The
    linear knows nothing else of SparseGrad. Once the bases are set, nothing in a rule changes.

    Attributes:
        group: linears with the same group share their bases.
        shape: (d_out, d_in) of the weight.
        block: (r_out, r_in) of the leading block.
        num_entries: how many entries train where they are chosen one by one.
        bases: None before calibration; a block's are in the dtype of the products.
        indices: (k,) flat positions, int32 or int64, of the entries of the rotated gradient that
            train; None for all of them, or for the largest of each step.
        collect: calibration's, while it runs: called with each gradient of the weight.
    """

    module: Converted

    def __init__(self, site: Site, config: SparseGrad, runtime: Runtime) -> None:
        self.name, self.selection, self.runtime = site.name, config.selection, runtime
        shape = site.module.get_parameter("weight").shape
        kind = f"{site.part or 'linear'} {tuple(shape)}"
        self.group = site.name if config.basis == "layer" else kind
        self.is_transposed = is_conv1d(site.module)
        d_out, d_in = shape[::-1] if self.is_transposed else shape
        self.shape = (d_out, d_in)
        self.num_entries = maths.num_entries(self.shape, config.density)
        self.block = maths.block_shape(self.shape, self.num_entries)
        self.bases: Bases | None = None
        self.indices: Tensor | None = None
        self.collect: Collect | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that trains instead of the weight; sharding may replace the object."""
        return self.module.get_parameter(PARAMETER[self.selection])

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a matrix (d_out, d_in) as the module's weight lies, or the reverse."""
        return weight.t() if self.is_transposed else weight

    def make_parameter(self, weight: Tensor) -> nn.Parameter:
        """Return the parameter's start: zeros, or the weight that is yet to be rotated."""
        if self.selection == "step":
            dense = self.laid_out(weight).detach()
            return nn.Parameter(dense.clone(memory_format=torch.contiguous_format))
        shape = self.block if self.selection == "block" else (self.num_entries,)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        """Return ``W0 + Q_out scatter(trained) Q_in^T``, rounded once to the dtype of ``base``.

        A block's change is formed in that dtype, in the cheaper order, and adds up with the weight
        inside one product.
        """
        if self.bases is None or self.selection == "step":
            return base
        is_block = self.selection == "block"
        dtype = base.dtype if is_block else torch.promote_types(base.dtype, torch.float32)
        q_out, q_in = (q.to(dtype) for q in self.bases.on(base.device))
        with autocast_off(base):
            if is_block:
                values = trained.to(dtype)
            else:
                values = base.new_zeros(self.shape, dtype=dtype)
                values.view(-1)[self.indices] = trained.to(dtype)
            if values.shape[0] <= values.shape[1]:
                left, right = q_out, values @ q_in.t()
            else:
                left, right = q_out @ values, q_in.t()
            return torch.addmm(base.to(dtype), left, right).to(base.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Put what the linear computes with into its own weight, a shard of it where it is one."""
        weight = self.module.weight
        base = self.laid_out(full_tensor(weight))
        folded = self.laid_out(self.effective(base, full_tensor(self.parameter)))
        weight.copy_(shard_like(folded, weight))

    def project(self, rows: Tensor) -> Tensor:
        """Return what the gradient needs of input rows: all of (n, d_in), or (n, r_in) of it."""
        if self.selection != "block" or self.bases is None:
            return rows
        return rows @ self.bases.on(rows.device, rows.dtype)[1]

    def grad(self, outer: OuterProduct) -> Tensor:
        """Return the parameter's gradient; a block's never forms the weight's own.

        Raises:
            ConfigError: there are no bases yet, and the gradient is not one of a calibration.
        """
        if self.bases is None:
            if self.collect is not None:
                self.collect(self, outer.dense())
            elif not self.runtime.is_exact:
                raise ConfigError(NOT_CALIBRATED)
            # Where nothing collects, another conversion calibrates on the exact gradients.
            return torch.zeros_like(self.parameter)
        if self.selection == "step":
            return self._largest(outer.dense())
        g = outer.grad_rows
        if self.indices is not None:
            q_out, q_in = self.bases.on(g.device)
            return maths.rotate(outer.dense(), q_out, q_in).flatten()[self.indices]
        return outer._replace(grad_rows=g @ self.bases.on(g.device, g.dtype)[0]).dense()

    def _largest(self, grad: Tensor) -> Tensor:
        """Return the largest entries of a rotated gradient as a sparse tensor."""
        flat = maths.top_entries(grad, self.num_entries).long()
        at = torch.stack((flat // self.shape[1], flat % self.shape[1]))
        return torch.sparse_coo_tensor(
            at, grad.flatten()[flat], self.shape, is_coalesced=True, check_invariants=False
        )


class RotatedLinear(ConvertedConv1D):
    """A rotated linear computes the paper's form, ``((x Q_in) W~^T) Q_out^T + b``.

    The rotated weight ``W~`` trains. It lies by output units, so that one class serves
    ``nn.Linear`` and ``Conv1D`` alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain linear's output, up to the rounding of two rotations."""
        rule = cast(SubspaceRule, self.subspace)
        rotated = rule.parameter
        if rule.bases is None:
            return linear(x, rotated.detach(), self.bias, subspace=rule)
        q_out, q_in = rule.bases.on(rotated.device)
        kept: dict[str, Any] = {}
        if self.training and torch.is_grad_enabled() and not self.runtime.is_exact:
            key = None if self.rows is None else self.runtime.key(x.device)
            kept = {"rows": self.rows, "codec": self.codec, "key": key}
        y = linear(x @ q_in.to(x.dtype), rotated.detach(), None, subspace=rule, **kept)
        return F.linear(y, q_out.to(y.dtype), self.bias)
