"""The activation stores of WTA-CRS: rows kept for backward, chosen in forward or in backward.

Legend: n rows (all leading dimensions flattened), k kept rows, d_in, d_out, r rank of the part
that is kept exactly.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from leantune.core.sites import Site
from leantune.errors import UnsupportedError
from leantune.methods.wta_crs import maths
from leantune.methods.wta_crs.norms import NormSource, make_source
from leantune.ops.rows import row_norms, stream_of, uniform
from leantune.ops.stores import (
    Draw,
    Factors,
    GradientRule,
    Packed,
    exact_factors,
    flatten,
    width,
)

if TYPE_CHECKING:
    from leantune.core.batch import Batch
    from leantune.core.session import Session
    from leantune.methods.wta_crs import WTACRS


class Sample(NamedTuple):
    """Kept rows of one input.

    Args:
        rows: (k, d_in), unscaled; residual rows where a part is kept exactly.
        indices: (k,) int32 row numbers.
        weights: (k,) float32, applied to the gradient's rows.
        kept: the exact part: (), (mean (d_in,),) or (projection (n, r), basis (d_in, r)).
    """

    rows: Tensor
    indices: Tensor
    weights: Tensor
    kept: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Meta:
    """Plain facts about a packed input: whether rows are chosen already, its shape and batch."""

    is_drawn: bool
    shape: torch.Size
    batch: "Batch"


class Group:
    """Linears that read one input: they share one sample, so that the input itself is released.

    Holds what they share: the random stream, the basis of the exact part, and - during a forward -
    the sample that the first of them made.
    """

    def __init__(self, names: list[str], columns: Sequence[int], config: "WTACRS") -> None:
        self.config = config
        self.columns = columns
        self.num_members = len(names)
        self.stream = stream_of(names[0])
        self.basis: Tensor | None = None
        # Weak, so that an input whose readers turn out not to share it is released all the same.
        self._shared: tuple[weakref.ref[Tensor], Sample] | None = None
        self._num_served = 0

    def share(self, origin: Tensor, make: Callable[[], Sample]) -> Sample:
        """Return the group's sample of ``origin``, made by the first member that asks."""
        if self._shared is not None and self._shared[0]() is origin:
            sample = self._shared[1]
            self._num_served += 1
        else:
            sample = make()
            self._shared, self._num_served = (weakref.ref(origin), sample), 1
        if self._num_served >= self.num_members:
            self.forget()
        return sample

    def forget(self) -> None:
        """Drop the shared sample: the graph alone holds it from now on."""
        self._shared = None

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.basis is None else {"basis": self.basis}

    def load_state_dict(self, state: Any) -> None:
        self.basis = state.get("basis")


class SampledStore:
    """Keeps ``keep_ratio`` of the input rows of one linear; see :class:`leantune.WTACRS`."""

    def __init__(
        self, site: Site, column: int, group: Group, source: NormSource, session: "Session"
    ) -> None:
        self.config = group.config
        self.group = group
        self.source = source
        self.session = session
        self._column = column
        self._mask = site.mask
        self._is_checked = False
        # Transformers sets this flag on the block itself, also after we were applied.
        self._block: nn.Module | None = (
            None if site.block is None else session.model.get_submodule(site.block)
        )

    def pack(
        self, x: Tensor, draw: Draw | None, origin: Tensor, rule: GradientRule | None = None
    ) -> Packed:
        num_rows = x.shape[:-1].numel()
        batch = self.session.batch
        if self._budget(num_rows) >= num_rows:
            return Packed((x if rule is None else rule.project(flatten(x)),), None)
        if self._draws_in_backward():
            return Packed((x,), _Meta(False, x.shape, batch))
        assert draw is not None
        sample = self.group.share(origin, lambda: self._sample(x, draw, batch))
        sample = projected(sample, rule)
        tensors = (sample.rows, sample.indices, sample.weights, *sample.kept)
        return Packed(tensors, _Meta(True, x.shape, batch))

    def grad_factors(
        self, packed: Packed, grad_output: Tensor, rule: GradientRule | None = None
    ) -> Sequence[Factors]:
        meta: _Meta | None = packed.meta
        if meta is None:
            return [exact_factors(packed.tensors[0], grad_output)]
        g = flatten(grad_output)  # (n, d_out)
        if meta.is_drawn:
            rows, indices, weights, *kept = packed.tensors
            sample = Sample(rows, indices, weights, tuple(kept))
            self._learn(row_norms(g) if self._wants_norms() else None, meta)
        else:
            draw = self.session.current_draw(g.device)
            sample = self._sample(packed.tensors[0], draw, meta.batch, row_norms(g))
            sample = projected(sample, rule)
        return factors_of(sample, g)

    def _wants_norms(self) -> bool:
        return self.source.needs_gradients or not (self._is_checked or is_compiling())

    def _learn(self, grad_norms: Tensor | None, meta: _Meta) -> None:
        """Tell the source the exact norms; once, check that what is called padding has none.

        Rows of padding are never drawn. A loss that counts them would make the estimate biased.
        """
        if grad_norms is None:
            return
        mask = meta.batch.row_mask(self._mask, meta.shape)
        if self.source.needs_gradients:
            self.source.observe(self._column, grad_norms, mask, meta.shape, meta.batch)
        if self._is_checked or is_compiling():
            return
        self._is_checked = True
        if mask is not None and bool((grad_norms.masked_fill(mask, 0.0) > 0).any()):
            raise UnsupportedError(
                f"WTACRS: {self._mask} must be 0 only on rows without a gradient, got a loss that "
                "counts padding, which would bias the weight gradient; give the labels to the "
                "model with -100 on padding, or draw_at='backward', which needs no mask"
            )

    def saved_bytes(
        self, shape: torch.Size, dtype: torch.dtype, rule: GradientRule | None = None
    ) -> int:
        """Bytes kept of an input of ``shape``; members of a group share theirs."""
        num_rows, d_in, w = shape[:-1].numel(), shape[-1], width(shape, rule)
        num_kept = self._budget(num_rows)
        if num_kept >= num_rows:
            return num_rows * w * dtype.itemsize
        if self._draws_in_backward():
            return num_rows * d_in * dtype.itemsize
        exact = 0
        if self.config.residual_rank == "mean":
            exact = w
        elif self.config.residual_rank:
            exact = (num_rows + w) * self._rank(num_rows, d_in)
        per_row = w * dtype.itemsize + torch.int32.itemsize + torch.float32.itemsize
        return num_kept * per_row + exact * dtype.itemsize

    def _budget(self, num_rows: int) -> int:
        return maths.budget(num_rows, self.config.keep_ratio, self.config.min_rows)

    def _rank(self, num_rows: int, d_in: int) -> int:
        assert isinstance(self.config.residual_rank, int)
        return min(self.config.residual_rank, num_rows, d_in)

    def _draws_in_backward(self) -> bool:
        if self.config.draw_at == "auto":
            return bool(getattr(self._block, "gradient_checkpointing", False))
        return self.config.draw_at == "backward"

    def _sample(
        self, x: Tensor, draw: Draw, batch: "Batch", grad_norms: Tensor | None = None
    ) -> Sample:
        """Choose and gather rows of ``x`` (..., d_in); exact ``grad_norms`` (n,) in backward."""
        config = self.config
        rows = x.detach().reshape(-1, x.shape[-1])  # (n, d_in)
        mask = batch.row_mask(self._mask, x.shape)
        basis = self._basis(rows)
        norms, kept = split_exact(rows, config.residual_rank == "mean", basis, mask)
        if grad_norms is not None:
            # Exact norms: padding has none, and nothing else needs a floor.
            p = maths.probabilities(norms * grad_norms, None, 0.0)
        else:
            guess = self.source.read(x.shape, self.group.columns, batch)
            scores = norms if guess is None else norms * guess.to(norms.device)
            p = maths.probabilities(scores, mask, config.probability_floor)
        num_kept = self._budget(len(rows))
        num_random = maths.num_uniforms(num_kept, config.estimator)
        u = uniform(draw.seed, self.group.stream, draw.number, num_random, device=x.device)
        return gather(rows, kept, maths.select(p, num_kept, config.estimator, config.c_rule, u))

    def _basis(self, rows: Tensor) -> Tensor | None:
        """Return this use's basis of the exact part, (d_in, r), one step on from the last use's."""
        if self.config.residual_rank in (0, "mean"):
            return None
        shape = (rows.shape[1], self._rank(*rows.shape))
        basis = self.group.basis
        if basis is None or basis.shape != shape:
            zero = torch.zeros((), dtype=torch.int64, device=rows.device)
            u = uniform(0, self.group.stream, zero, math.prod(shape), device=rows.device)
            basis = power_step(rows, u.view(shape) - 0.5)
        # One overflowed forward must not spoil every later one.
        self.group.basis = power_step(rows, basis.nan_to_num(0.0, 0.0, 0.0))
        return self.group.basis


def power_step(rows: Tensor, basis: Tensor) -> Tensor:
    """Return ``orth(H^T H V)``: (d_in, r) float32 orthonormal, nearer the leading directions.

    Args:
        rows: (n, d_in), H.
        basis: (d_in, r), V.
    """
    wide = rows.float()
    # LAPACK's layout is by columns; a saved basis comes back by rows, and products would round
    # another way after a resume.
    return torch.linalg.qr(wide.t() @ (wide @ basis.to(wide)))[0].contiguous()


def split_exact(
    rows: Tensor, centred: bool, basis: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split an input into a part that is kept exactly for all rows and a rest to sample.

    Args:
        rows: (n, d_in).
        centred: whether the exact part is the mean of the real rows.
        basis: (d_in, r) orthonormal, or None; the exact part is then ``H V``.
        mask: (n,) bool, real rows; None for all.

    Returns:
        norms: (n,) float32, of the rest.
        kept: (), (mean (d_in,),) or (projection (n, r), basis (d_in, r)).
    """
    if centred:
        weights = torch.ones(len(rows), device=rows.device) if mask is None else mask.float()
        mean = (weights / weights.sum().clamp(min=1)) @ rows.float()  # (d_in,)
        mean = mean.to(rows.dtype)
        return row_norms(rows - mean), (mean,)
    norms = row_norms(rows)
    if basis is None:
        return norms, ()
    basis = basis.to(rows.dtype)
    projection = rows @ basis  # (n, r)
    left = norms.square() - row_norms(projection).square()
    return left.clamp(min=0).sqrt(), (projection, basis)


def gather(rows: Tensor, kept: tuple[Tensor, ...], chosen: maths.Selection) -> Sample:
    """Gather the chosen rows (k, d_in) of ``rows`` (n, d_in), less the part in ``kept``."""
    picked = rows.index_select(0, chosen.indices)
    if len(kept) == 1:
        picked = picked - kept[0]
    elif kept:
        picked = picked - kept[0].index_select(0, chosen.indices) @ kept[1].t()
    return Sample(picked, chosen.indices, chosen.weights, kept)


def projected(sample: Sample, rule: GradientRule | None) -> Sample:
    """Return the sample with ``rule.project`` of its rows; a linear map, so it may come late."""
    if rule is None:
        return sample
    kept = sample.kept
    if len(kept) == 1:
        kept = (rule.project(kept[0][None])[0],)
    elif kept:
        kept = (kept[0], rule.project(kept[1].t()).t())
    return sample._replace(rows=rule.project(sample.rows), kept=kept)


def factors_of(sample: Sample, g: Tensor) -> list[Factors]:
    """Return ``sum_t w_t g_t^T h_t`` plus the exact part as factors; ``g`` is (n, d_out).

    Weights meet the gradient in float32. In float16 they are scaled into range first: a rare row
    can carry a weight of thousands.
    """
    picked = g.index_select(0, sample.indices).float()  # (k, d_out)
    weights, scale = sample.weights, None
    if sample.rows.dtype == torch.float16:
        scale = weights.abs().amax().clamp(min=1)
        weights = weights / scale
    factors = [Factors((picked * weights[:, None]).to(sample.rows.dtype), sample.rows, scale)]
    if len(sample.kept) == 1:
        factors.append(Factors(g.sum(0)[None], sample.kept[0][None]))
    elif sample.kept:
        projection, basis = sample.kept
        factors.append(Factors((g.t() @ projection).t(), basis.t()))
    return factors


def make_stores(
    groups: list[list[Site]], config: "WTACRS", session: "Session"
) -> list[list[SampledStore]]:
    """Make one store per linear; linears of one group share their sample."""
    names = [site.name for group in groups for site in group]
    source = make_source(config, names, session)
    stores: list[list[SampledStore]] = []
    first = 0
    for sites in groups:
        columns = range(first, first + len(sites))
        group = Group([site.name for site in sites], columns, config)
        session.at_forward_end(group.forget)
        if config.residual_rank not in (0, "mean"):
            session.keep_state(f"wta_crs.basis.{sites[0].name}", group)
        stores.append(
            [
                SampledStore(site, column, group, source, session)
                for site, column in zip(sites, columns, strict=True)
            ]
        )
        first += len(sites)
    return stores
