"""What one linear trains under SparseGrad, the weight that this gives, and its gradient.

Legend: n rows, d_out and d_in the sides of a weight, r_out and r_in the basis vectors in use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from leantune.core.distributed import full_tensor, shard_like
from leantune.core.linear import Converted, is_conv1d
from leantune.core.runtime import Runtime
from leantune.core.sites import Site
from leantune.errors import ConfigError
from leantune.methods.sparse_grad.config import SparseGrad
from leantune.ops import entries as maths
from leantune.ops.autocast import autocast_off
from leantune.ops.rows import OuterProduct

NOT_CALIBRATED = (
    "SparseGrad: bases must be calibrated before training, got none; call "
    "session.calibrate(batches) with a few training batches (the trainer callback does so by "
    "itself), or load a session that was calibrated"
)


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

    def leading(self, r_out: int, r_in: int) -> "Bases":
        """Return the leading vectors, rounded to bfloat16: gradients are exact in any basis.

        The rounded values are the same in every dtype that a product may have later on.
        """
        dtype = torch.float64 if self.stored == torch.float64 else torch.bfloat16
        how = {"dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
        return Bases(self.q_out[:, :r_out].to(**how), self.q_in[:, :r_in].to(**how))


class SubspaceRule:
    """A subspace rule says which parameter one linear trains, and forms weight and gradient of it.

    With ``W0`` the linear's own weight, which stays as it is, the linear computes with ``W0 + Q_out
    delta Q_in^T``. The sum is formed anew in every forward and backward and rounded once, so that
    no step is lost in a half-precision weight, and nothing but ``delta`` is kept. The linear knows
    nothing else of SparseGrad. Once the bases are set, nothing in a rule changes.

    Attributes:
        trained_name: what the linear calls the parameter; part of the model's state.
        group: linears with the same group share their bases.
        shape: (d_out, d_in) of the weight.
        num_entries: how many entries may train.
        num_vectors: (r_out, r_in), how many basis vectors are in use.
        bases: None before calibration; then in the dtype of the products.
        collect: calibration's, while it runs: called with each gradient of the weight.
    """

    trained_name: ClassVar[str] = "delta"
    module: Converted

    def __init__(self, site: Site, config: SparseGrad, runtime: Runtime) -> None:
        self.name, self.runtime = site.name, runtime
        shape = site.module.get_parameter("weight").shape
        self.group = f"{site.part or 'linear'} {tuple(shape)}"
        self.is_transposed = is_conv1d(site.module)
        d_out, d_in = shape[::-1] if self.is_transposed else shape
        self.shape = (d_out, d_in)
        self.num_entries = maths.num_entries(self.shape, config.density)
        self.num_vectors = self.shape
        if config.selection == "block":
            self.num_vectors = maths.block_shape(self.shape, self.num_entries)
        self.bases: Bases | None = None
        self.collect: Callable[[SubspaceRule, Tensor], None] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that trains instead of the weight; sharding may replace the object."""
        return self.module.get_parameter(self.trained_name)

    def laid_out(self, weight: Tensor) -> Tensor:
        """Return a matrix (d_out, d_in) as the module's weight lies, or the reverse."""
        return weight.t() if self.is_transposed else weight

    def make_parameter(self, weight: Tensor) -> nn.Parameter:
        """Return the parameter's start."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return nn.Parameter(torch.zeros(self.num_vectors, dtype=dtype, device=weight.device))

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        """Return ``W0 + Q_out trained Q_in^T``, rounded once to the dtype of ``base``.

        The change is formed in that dtype, in the cheaper order, and adds up with the weight inside
        one product.
        """
        if self.bases is None:
            return base
        q_out, q_in = (q.to(base.dtype) for q in self.bases.on(base.device))
        with autocast_off(base):
            values = trained.to(base.dtype)
            if values.shape[0] <= values.shape[1]:
                return torch.addmm(base, q_out, values @ q_in.t())
            return torch.addmm(base, q_out @ values, q_in.t())

    def merged(self, weight: Tensor, trained: Tensor) -> Tensor:
        """Return the plain module's weight, as it lies there, of what the linear has."""
        return self.laid_out(self.effective(self.laid_out(weight), trained))

    @torch.no_grad()
    def fold(self) -> None:
        """Put what the linear computes with into its own weight, a shard of it where it is one."""
        weight = self.module.weight
        folded = self.merged(full_tensor(weight), full_tensor(self.parameter))
        weight.copy_(shard_like(folded, weight))

    def project(self, rows: Tensor) -> Tensor:
        """Return what the gradient needs of input rows (n, d_in): (n, r_in) of it."""
        return rows if self.bases is None else rows @ self.bases.on(rows.device, rows.dtype)[1]

    def grad(self, outer: OuterProduct) -> Tensor:
        """Return the parameter's gradient; a block's never forms the weight's own.

        Raises:
            ConfigError: there are no bases yet, and the gradient is not one of a calibration.
        """
        if self.bases is not None:
            return self.grad_in(self.bases, outer)
        if self.collect is not None:
            self.collect(self, outer.dense())
        elif not self.runtime.is_exact:
            raise ConfigError(NOT_CALIBRATED)
        # Where nothing collects, another conversion calibrates on the exact gradients.
        return torch.zeros_like(self.parameter)

    def grad_in(self, bases: Bases, outer: OuterProduct) -> Tensor:
        """Return the gradient in the bases of what :meth:`project` has kept."""
        g = outer.grad_rows
        return outer._replace(grad_rows=g @ bases.on(g.device, g.dtype)[0]).dense()
