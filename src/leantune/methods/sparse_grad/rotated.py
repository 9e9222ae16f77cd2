"""The paper's form: the whole weight trains in rotated form, by the largest entries of each step.

Legend: n rows, d_out and d_in the sides of a weight.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.linear import ConvertedConv1D
from leantune.methods.sparse_grad.subspace import Bases, SubspaceRule
from leantune.ops import entries as maths
from leantune.ops.linear import linear
from leantune.ops.rows import OuterProduct


class RotatedRule(SubspaceRule):
    """A rotated rule trains ``W~ = Q_out^T W Q_in`` in complete bases; a sparse gradient moves it.

    The linear's own weight stands beside it and is written anew where somebody wants it.
    """

    trained_name: ClassVar[str] = "rotated_weight"
    _written: tuple[int, int] | None = None

    def make_parameter(self, weight: Tensor) -> nn.Parameter:
        """Return the weight, which is yet to be rotated."""
        dense = self.laid_out(weight).detach()
        return nn.Parameter(dense.clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def start(self) -> None:
        """Rotate the parameter into the new bases; the dense weight stays as it is."""
        assert self.bases is not None
        trained = self.parameter
        trained.copy_(maths.rotate(trained, *self.bases.on(trained.device)))
        self._written = (id(trained), trained._version)

    def effective(self, base: Tensor, trained: Tensor) -> Tensor:
        """Return the weight itself, which is up to date wherever it is read."""
        return base

    @torch.no_grad()
    def fold(self) -> None:
        """Write the dense weight anew where the rotated one has moved."""
        trained, bases = self.parameter, self.bases
        now = (id(trained), trained._version)
        if bases is None or now == self._written:
            return
        q_out, q_in = bases.on(trained.device)
        dense = maths.rotate(trained, q_out.t(), q_in.t())
        self.module.weight.copy_(self.laid_out(dense))
        self._written = now

    def project(self, rows: Tensor) -> Tensor:
        """Return the rows, which are rotated already."""
        return rows

    def grad_in(self, bases: Bases, outer: OuterProduct) -> Tensor:
        """Return the largest entries of the gradient as a sparse tensor."""
        grad = outer.dense()
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
        rule = cast(RotatedRule, self.subspace)
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
