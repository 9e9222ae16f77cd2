"""Where the gradient norms of a forward draw come from; every source leaves the draw unbiased.

Legend: b samples, t token positions, n = b * t rows.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from leantune.errors import ConfigError, LeantuneError

if TYPE_CHECKING:
    from leantune.core.batch import Batch
    from leantune.core.session import Session
    from leantune.methods.wta_crs import WTACRS

_FLOAT16_BYTES = 2
_GIB = 2**30


class NormSource(Protocol):
    """Guesses the relative gradient norm of each row before the gradient is known."""

    needs_gradients: bool

    def read(self, shape: torch.Size, columns: Sequence[int], batch: "Batch") -> Tensor | None:
        """Return (n,) float32 relative norms for an input of ``shape``, or None for no opinion.

        ``columns`` are the numbers of the linears that read the input: their squared norms add
        up, each relative to its own mean, so that no linear drowns the others.
        """
        ...

    def observe(
        self,
        column: int,
        grad_norms: Tensor,
        mask: Tensor | None,
        shape: torch.Size,
        batch: "Batch",
    ) -> None:
        """Take note of the exact norms (n,) that backward met."""
        ...


class ActivationNorms:
    """No guess at all: rows are drawn by the norm of the activation alone."""

    needs_gradients = False

    def read(self, shape: torch.Size, columns: Sequence[int], batch: "Batch") -> Tensor | None:
        return None

    def observe(self, column, grad_norms, mask, shape, batch) -> None:
        raise AssertionError("not asked for")


class RunningNorms:
    """A running mean of the squared gradient norm, by linear and token position.

    Norms are relative to their batch's mean, so that a loss scale cancels. It sees, without any
    plumbing, that in the last block of a classifier only the first token has a gradient.
    """

    needs_gradients = True

    def __init__(self, names: Sequence[str], decay: float) -> None:
        self._names = names
        self._decay = decay
        self._means: dict[int, Tensor] = {}

    def read(self, shape: torch.Size, columns: Sequence[int], batch: "Batch") -> Tensor | None:
        if len(shape) < 3:
            return None
        t = shape[-2]
        known = [self._padded(c, t)[:t] for c in columns if c in self._means]
        if not known:
            return None
        total = torch.stack(known).sum(0)  # (t,)
        return total.sqrt().expand(shape[:-1]).reshape(-1)

    def observe(self, column, grad_norms, mask, shape, batch) -> None:
        if len(shape) < 3:
            return
        squares = grad_norms.square().view(-1, shape[-2])  # (b, t)
        real = torch.ones_like(squares) if mask is None else mask.view_as(squares).float()
        count = real.sum(0)  # (t,)
        if column not in self._means:
            self._means[column] = squares.new_ones(shape[-2])
        mean = (squares * real).sum() / real.sum().clamp(min=1)
        by_position = (squares * real).sum(0) / count.clamp(min=1) / mean
        if self._means[column].device != squares.device:
            # A resumed run reads its state on the CPU.
            self._means[column] = self._means[column].to(squares.device)
        old_here = self._padded(column, shape[-2])[: shape[-2]]
        new = torch.lerp(by_position, old_here, self._decay)
        # An overflowed step under mixed precision, or a position without a real row, says nothing.
        is_known = torch.isfinite(new) & torch.isfinite(mean) & (count > 0)
        old_here.copy_(torch.where(is_known, new, old_here))

    def _padded(self, column: int, num_positions: int) -> Tensor:
        """Return the (>= num_positions,) means of a linear; new positions start at the mean."""
        means = self._means[column]
        if len(means) < num_positions:
            means = torch.cat([means, means.new_ones(num_positions - len(means))])
            self._means[column] = means
        return means

    def state_dict(self) -> dict[str, Tensor]:
        return {self._names[c]: means for c, means in self._means.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        _check_state(state, self._names)
        self._means = {self._names.index(name): means.clone() for name, means in state.items()}


class CachedNorms:
    """The paper's cache: per sample, linear and token, the norm at the sample's last visit.

    Lives in host memory as bfloat16, divided by the loss scale; read once per forward and written
    once per backward pass. Samples not seen yet count as average, which leaves the activation.
    """

    needs_gradients = True

    def __init__(self, names: Sequence[str], limit_gib: float, session: "Session") -> None:
        self._names = names
        self._limit_bytes = int(limit_gib * _GIB)
        self._session = session
        self._host = torch.zeros(0, len(names), 0, dtype=torch.bfloat16)
        self._staged: tuple[Batch, Tensor] | None = None
        self._pending: list[tuple[Batch, int, Tensor]] = []
        session.wants_loss_scale = True

    def read(self, shape: torch.Size, columns: Sequence[int], batch: "Batch") -> Tensor | None:
        if not self._fits(shape, batch):
            return None
        staged = self._stage(batch, shape)[:, list(columns)]  # (b, columns, t)
        is_seen = staged.amax((1, 2), keepdim=True) > 0  # (b, 1, 1)
        rows_seen = is_seen.sum() * shape[-2]
        mean = staged.square().sum((0, 2), keepdim=True) / rows_seen.clamp(min=1)
        relative = staged.square() / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        relative = torch.where(is_seen, relative, torch.ones_like(relative))
        return relative.sum(1).sqrt().reshape(-1)

    def observe(self, column, grad_norms, mask, shape, batch) -> None:
        if self._fits(shape, batch):
            norms = grad_norms.view(-1, shape[-2]) / self._session.loss_scale  # (b, t)
            self._pending.append((batch, column, norms))

    def flush(self) -> None:
        """Write what backward met since the last call to host memory."""
        pending, self._pending = self._pending, []
        for batch, column, norms in pending:
            assert batch.sample_ids is not None
            ids = batch.sample_ids.flatten().cpu()
            host = norms.to("cpu", torch.bfloat16)
            finite = host.isfinite().all(-1)
            if not finite.all():
                # A loss scaler looks for its range by overflowing: the old norms stay. Gradient
                # accumulation scales too, but down.
                if float(self._session.loss_scale) <= 1.0:
                    bad = int(ids[~finite][0])
                    raise LeantuneError(
                        f"WTACRS: gradient norms of {self._names[column]} must be finite, got nan "
                        f"or inf for sample_id {bad}; the loss has diverged: lower the learning "
                        "rate, or clip gradients"
                    )
                ids, host = ids[finite], host[finite]
            self._reserve(ids, host.shape[-1])
            self._host[ids, column] = 0
            self._host[ids, column, : host.shape[-1]] = host

    def _fits(self, shape: torch.Size, batch: "Batch") -> bool:
        return (
            len(shape) == 3
            and batch.sample_ids is not None
            and batch.sample_ids.numel() == shape[0]
        )

    def _stage(self, batch: "Batch", shape: torch.Size) -> Tensor:
        """Bring the batch's norms to its device, once per batch and length: (b, columns, t)."""
        if self._staged is not None:
            owner, staged = self._staged
            if owner is batch and staged.shape[-1] == shape[-2]:
                return staged
        self.flush()
        assert batch.sample_ids is not None
        ids = batch.sample_ids.flatten().cpu()
        self._reserve(ids, shape[-2])
        staged = self._host[ids, :, : shape[-2]].float().to(batch.sample_ids.device)
        self._staged = (batch, staged)
        return staged

    def _reserve(self, ids: Tensor, num_positions: int) -> None:
        """Grow the cache to hold these samples and positions, within the limit."""
        samples, columns, positions = self._host.shape
        wanted = int(ids.max()) + 1 if len(ids) else 0
        if wanted > samples:
            wanted = self._session.num_samples or max(wanted, samples * 3 // 2)
        new = (max(samples, wanted), columns, max(positions, num_positions))
        if new == self._host.shape:
            return
        num_bytes = new[0] * new[1] * new[2] * _FLOAT16_BYTES
        if num_bytes > self._limit_bytes:
            raise ConfigError(
                f"WTACRS: cache_gib must be at least {num_bytes / _GIB:.2f} for {new[0]} samples x "
                f"{columns} linears x {new[2]} tokens in bfloat16, got "
                f"{self._limit_bytes / _GIB:g}; raise it, shorten the samples, or take "
                "norms='running', which needs no cache"
            )
        grown = torch.zeros(new, dtype=torch.bfloat16)
        grown[:samples, :, :positions] = self._host
        self._host = grown

    def state_dict(self) -> dict[str, Tensor]:
        self.flush()
        return {"norms": self._host}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        norms = state.get("norms")
        if norms is None or norms.ndim != 3 or norms.shape[1] != len(self._names):
            shape = None if norms is None else tuple(norms.shape)
            raise ConfigError(
                f"WTACRS: cached norms must have shape (samples, {len(self._names)}, tokens), got "
                f"{shape}; load the session with the recipe and model it was saved with"
            )
        _check_finite("cached norms", norms)
        self._host = norms.clone()
        self._staged = None
        self._pending.clear()


def _check_state(state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for name, value in state.items():
        if name not in names:
            raise ConfigError(
                f"WTACRS: running norms must belong to this model's linears, got {name!r}; load "
                "the session with the recipe and model it was saved with"
            )
        _check_finite(f"running norms of {name}", value)


def _check_finite(what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value.float()).all()):
        raise ConfigError(
            f"WTACRS: {what} must be finite, got nan or inf in the saved state; take an earlier "
            "checkpoint"
        )


def make_source(config: "WTACRS", names: Sequence[str], session: "Session") -> NormSource:
    """Return the source that ``config.norms`` names, with its state kept by the session."""
    if config.norms == "activation":
        return ActivationNorms()
    if config.norms == "cache":
        cache = CachedNorms(names, config.cache_gib, session)
        session.keep_state(f"wta_crs.cache.{names[0]}", cache)
        return cache
    running = RunningNorms(names, config.decay)
    session.keep_state(f"wta_crs.running.{names[0]}", running)
    return running
