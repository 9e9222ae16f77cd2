"""One linear under SparseGrad: what it trains, that one's gradient, and its way into the weight.

Legend: n rows, d_out and d_in the sides of the weight, u and w the basis vectors in use, k entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.core.ranks import is_sharded, share_of, sum_over_ranks, whole
from leantune.core.sites import Site
from leantune.core.swap import StoredConv1D
from leantune.errors import ConfigError
from leantune.methods.sparse_grad import maths
from leantune.ops.linear import linear
from leantune.ops.stores import ExactStore, Factors, grad_weight

if TYPE_CHECKING:
    from leantune.methods.sparse_grad import SparseGrad

Collect = Callable[["Layer", Tensor], None]


@dataclass
class Bases:
    """Two bases, shared by all layers that hold this object: (d_out, u) and (d_in, w)."""

    q_out: Tensor
    q_in: Tensor

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both on the device of ``like``, where they then stay, float32 or wider."""
        if self.q_out.device != like.device:
            self.q_out, self.q_in = self.q_out.to(like.device), self.q_in.to(like.device)
        dtype = torch.promote_types(self.q_out.dtype, torch.float32)
        return self.q_out.to(dtype), self.q_in.to(dtype)


def leading(bases: Bases, r_out: int, r_in: int) -> Bases:
    """Return the leading vectors in half precision: any basis gives exact gradients in itself."""
    return _thin(bases.q_out[:, :r_out], bases.q_in[:, :r_in])


def _thin(*vectors: Tensor) -> Bases:
    owned = (q.clone(memory_format=torch.contiguous_format) for q in vectors)
    return Bases(*(q if q.dtype == torch.float64 else q.half() for q in owned))


def with_outliers(
    bases: Bases, block: tuple[int, int], moment: Tensor, num_outliers: int
) -> tuple[Bases, Tensor]:
    """Return the vectors that the block and its outliers need, and the entries among them."""
    (r_out, r_in), (d_out, d_in) = block, moment.shape
    chosen = maths.outliers(moment, r_out, r_in, num_outliers).long()
    rows = torch.cat((torch.arange(r_out, device=chosen.device), chosen // d_in)).unique()
    columns = torch.cat((torch.arange(r_in, device=chosen.device), chosen % d_in)).unique()
    is_used = torch.zeros(d_out, d_in, dtype=torch.bool, device=chosen.device)
    is_used[:r_out, :r_in] = True
    is_used.view(-1)[chosen] = True
    indices = is_used[rows][:, columns].flatten().nonzero().squeeze(1)
    return _thin(bases.q_out[:, rows], bases.q_in[:, columns]), indices


class Layer:
    """The gradient rule of one linear, and the hand that brings its dense weight up to date.

    With ``W0`` the weight before training the linear has ``W0 + Q_out scatter(trained) Q_in^T``.
    ``applied`` says what of ``trained`` the dense weight holds already; both travel with the
    model's state, so that a checkpoint of all three, or ``trained`` alone on the base model, come
    out right.
    """

    def __init__(self, site: Site, config: "SparseGrad") -> None:
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        self.name, self.config = site.name, config
        self.kind = f"{site.part} {tuple(weight.shape)}"
        # Those that share a basis: linears of one part and shape, or the linear alone.
        self.group = self.name if config.basis == "layer" else self.kind
        self.is_transposed = type(site.module).__name__.endswith("Conv1D")
        d_out, d_in = weight.shape[::-1] if self.is_transposed else weight.shape
        self.shape = (d_out, d_in)
        self.num_entries = config.entries_of(self.shape)
        self.module: Any = None
        self.width: int | None = None
        self.bases: Bases | None = None
        self.indices: Tensor | None = None
        self.lines: maths.Support | None = None
        self.collect: Collect | None = None
        self.start: Tensor | None = None
        self.scores: Tensor | None = None
        self.wants_scores = False
        self.history: tuple[Tensor, Tensor] | None = None
        self.num_refreshes = 0
        self.is_history_in_weight = True
        self._seen: tuple[int, int] | None = None
        self._had_backward = True
        self._counts_versions = False

    def make_parameter(self, weight: Tensor) -> nn.Parameter:
        """Return what is trained in the weight's stead: zeros, or the weight to be rotated."""
        if self.config.selection == "step":
            dense = weight.t() if self.is_transposed else weight
            return nn.Parameter(dense.detach().clone(memory_format=torch.contiguous_format))
        is_block = self.config.selection == "block" and not self.config.num_outliers
        shape = self.block if is_block else (self.num_entries,)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

    @property
    def block(self) -> tuple[int, int]:
        """(r_out, r_in) of the leading block."""
        return maths.block_shape(self.shape, self.num_entries - self.config.num_outliers)

    def use(self, bases: Bases, indices: Tensor | None) -> None:
        """Train these entries (None: all) of the gradient in these bases from now on."""
        self.bases, self.indices, self.lines = bases, indices, None
        if self.config.selection == "block":
            self.width = bases.q_in.shape[1]
        if indices is not None:
            self.lines = maths.support(indices, (bases.q_out.shape[1], bases.q_in.shape[1]))

    # -- the gradient rule -----------------------------------------------------------------

    def project(self, rows: Tensor) -> Tensor:
        """Return what backward needs of input rows: all of them, or their part in the block."""
        if self.width is None or self.collect is not None:
            return rows
        assert self.bases is not None
        return rows @ self.bases.on(rows)[1].to(rows.dtype)

    def grad(self, factors: Sequence[Factors]) -> Tensor:
        """Return the gradient of ``trained``; only what is selected is formed, where that pays."""
        trained = self.module.trained
        if self.collect is not None:
            self.collect(self, self._plain(grad_weight(factors)))
            return torch.zeros_like(trained)
        if self.bases is None:
            raise not_calibrated()
        self._had_backward = True
        if self.config.skip_zero_rows:
            factors = [_without_zero_rows(f) for f in factors]
        if self.config.selection == "step":
            return self._top(grad_weight(factors))
        values = [self._values(f.left, f.right, f.scale) for f in factors]
        return torch.stack(values).sum(0).view(trained.shape)

    def _plain(self, grad: Tensor) -> Tensor:
        if self.config.selection != "step" or self.bases is None:
            return grad
        # This linear multiplies by the rotated weight.
        q_out, q_in = self.bases.on(grad)
        return maths.rotate(grad, q_out.mT, q_in.mT)

    def _values(self, left: Tensor, right: Tensor, scale: Tensor | None) -> Tensor:
        assert self.bases is not None
        q_out, q_in = self.bases.on(left)
        if self.width is not None:
            values = maths.grad_block(right, left, q_out).flatten()
            values = values if self.indices is None else values[self.indices]
        elif self.wants_scores:
            rotated = maths.rotate(left.t() @ right, q_out, q_in)
            if scale is not None:
                rotated, scale = rotated * scale, None
            self.scores = rotated if self.scores is None else self.scores + rotated
            values = rotated.flatten()[self.indices]
        else:
            assert self.indices is not None
            values = maths.selected_gradient(right, left, q_out, q_in, self.indices, self.lines)
        return values if scale is None else values * scale

    def _top(self, grad: Tensor) -> Tensor:
        """Return the largest entries of a rotated gradient as a sparse tensor."""
        flat = maths.top_entries(grad, self.num_entries).long()
        at = torch.stack((flat // self.shape[1], flat % self.shape[1]))
        return torch.sparse_coo_tensor(
            at, grad.flatten()[flat], self.shape, is_coalesced=True, check_invariants=False
        )

    # -- the dense weight ------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> None:
        """Bring the dense weight up to date with ``trained``; does nothing where it is."""
        if self.bases is None:
            return
        if self.config.selection == "step":
            self._write_rotated()
            return
        self._add_history()
        trained, applied = self.module.trained, self.module.applied
        if not self._is_current(trained, applied):
            self._add(whole(trained - applied).flatten(), self.indices)
            applied.copy_(trained)

    def start_from(self, weight: Tensor | None) -> None:
        """Take the dense weight that training began with, where calibration had moved it.

        A weight that has taken a change already comes from a checkpoint and is left alone.
        """
        self.start = weight
        if weight is None:
            return
        module = self.module
        has_refreshed = self.config.selection == "refreshed" and bool(whole(module.refreshes))
        if not (has_refreshed or bool(whole(module.applied).any())):
            with torch.no_grad():
                module.weight.copy_(share_of(weight.to(module.weight.device), module.weight))

    def _is_current(self, trained: Tensor, applied: Tensor) -> bool:
        if trained.device.type == "cpu" and not is_sharded(trained):
            return torch.equal(trained, applied)
        # A comparison would wait for the device, or for other ranks. The version counter tells for
        # most optimisers; fused ones do not move it, so it is trusted once it has moved after a
        # backward.
        now = (id(trained), trained._version)
        has_moved = now != self._seen
        is_same = self._seen is not None and self._seen[0] == now[0]
        self._counts_versions |= has_moved and is_same and self._had_backward
        is_current = not has_moved and (self._counts_versions or not self._had_backward)
        self._seen, self._had_backward = now, False
        return is_current

    def _add(self, values: Tensor, indices: Tensor | None) -> None:
        """Add ``Q_out scatter(values) Q_in^T`` to the dense weight, in float32 or wider."""
        assert self.bases is not None
        q_out, q_in = self.bases.on(values)
        shape = (q_out.shape[1], q_in.shape[1])
        if indices is None:
            change = q_out @ values.view(shape).to(q_out.dtype) @ q_in.t()
        else:
            lines = self.lines if indices is self.indices else None
            change = maths.rotate_back_sparse(indices, values, shape, q_out, q_in, lines)
        weight = self.module.weight
        weight.add_(share_of(change.t() if self.is_transposed else change, weight))

    def _write_rotated(self) -> None:
        trained = self.module.trained
        now = (id(trained), trained._version)
        if now == self._seen:
            return
        assert self.bases is not None
        q_out, q_in = self.bases.on(trained)
        dense = maths.rotate(trained, q_out.t(), q_in.t())
        self.module.weight.copy_(dense.t() if self.is_transposed else dense)
        self._seen = now

    def rotate_weight(self) -> None:
        """Start from the weight in the new bases; the dense weight stays as it is."""
        assert self.bases is not None
        trained = self.module.trained
        with torch.no_grad():
            trained.copy_(maths.rotate(trained, *self.bases.on(trained)))
        self._seen = (id(trained), trained._version)

    # -- refreshing the mask ---------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, moments: dict[str, Any]) -> None:
        """Exchange entries of little momentum for those of the largest gradient.

        What the dropped ones have reached stays in the dense weight and in ``history``; the new
        ones start at zero, moments included.

        Args:
            moments: the optimiser's state of ``trained``, changed in place; may be empty.
        """
        assert self.indices is not None and self.bases is not None
        trained, old = whole(self.module.trained), self.indices
        # A rank without a gradient joins in the sum all the same.
        own = trained.new_zeros(self.shape) if self.scores is None else self.scores
        scores = sum_over_ranks(own)
        if not bool(scores.any()):
            return
        self.update()
        kept = [t for t in moments.values() if isinstance(t, Tensor) and t.shape == trained.shape]
        momentum = moments.get("exp_avg", moments.get("momentum_buffer"))
        num_replace = round(self.config.refresh_ratio * self.num_entries)
        by = trained if momentum is None else whole(momentum)
        new = maths.refresh_mask(old, by, scores, num_replace)
        is_dropped = torch.ones_like(old, dtype=torch.bool)
        is_dropped[new.source[new.source >= 0]] = False
        self._remember(old[is_dropped].long(), trained[is_dropped])
        for tensor in (self.module.trained, self.module.applied, *kept):
            tensor.copy_(share_of(maths.carry_over(whole(tensor), new.source), tensor))
        self.use(self.bases, new.indices)
        self.scores = None
        self.num_refreshes += 1
        self.module.refreshes.fill_(self.num_refreshes)

    def _remember(self, positions: Tensor, values: Tensor) -> None:
        if self.history is not None:
            positions = torch.cat((self.history[0].to(positions.device), positions))
            values = torch.cat((self.history[1].to(values), values))
        unique, slot = torch.unique(positions, return_inverse=True)
        self.history = (unique, values.new_zeros(len(unique)).index_add_(0, slot, values))

    def _add_history(self) -> None:
        """Put dropped entries into a weight that has none yet: one freshly loaded."""
        if self.history is None or self.is_history_in_weight:
            return
        self.is_history_in_weight = True
        if int(whole(self.module.refreshes)) == 0:
            positions, values = (t.to(self.module.weight.device) for t in self.history)
            self._add(values, positions)
            self.module.refreshes.fill_(self.num_refreshes)


class RotatedLinear(StoredConv1D):
    """The paper's form: ``((x Q_in) W~^T) Q_out^T + b``, with the rotated weight trained.

    Serves ``nn.Linear`` and ``Conv1D`` alike, since ``W~`` lies by output units.
    """

    rule: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return the plain linear's output, up to the rounding of two rotations."""
        layer: Layer = self.rule
        trained = self.trained
        if layer.bases is None:
            return linear(x, trained.detach(), self.bias, ExactStore(), None, trained, layer)
        q_out, q_in = layer.bases.on(trained)
        draw = self.draws.draw_for(trained) if self.training else None
        store = ExactStore() if draw is None else self.store
        x = x @ q_in.to(x.dtype)
        y = linear(x, trained.detach(), None, store, draw, trained, layer)
        return F.linear(y, q_out.to(y.dtype), self.bias)


def _without_zero_rows(factors: Factors) -> Factors:
    left, right, scale = factors
    rows = left.any(1).nonzero().squeeze(1)
    return Factors(left.index_select(0, rows), right.index_select(0, rows), scale)


def not_calibrated() -> ConfigError:
    """Return the error of a training step without bases."""
    return ConfigError(
        "SparseGrad: bases must be calibrated before training, got none; call "
        "session.calibrate(batches) with a few training batches (the trainer callback does so by "
        "itself), or load a session that was calibrated"
    )
