"""The paper's cache of gradient norms: each sample's last visit guesses the norms of its next one.

Legend: b samples, t token positions, n = b * t rows, c linears.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leantune.errors import ConfigError, LeantuneError

SAMPLE_ID = "sample_id"
_GIB = 2**30


class CachedNorms:
    """Cached norms are, per sample, linear and token, the gradient norm at the sample's last visit.

    They lie in host memory as bfloat16, are read once a forward and written once a backward pass.
    Samples not seen yet count as average, which leaves the norm of the activation. A change of the
    loss scale, as float16 training makes, skews the guess until a sample is visited again; the
    estimate stays unbiased.

    Args:
        names: of the linears; a linear's column is its place in this list.
        limit_gib: host memory that the cache may take.

    Source: arXiv 2305.15265, the cached gradient norms.
    """

    def __init__(self, names: Sequence[str], limit_gib: float) -> None:
        self.ids: Tensor | None = None
        self._names = list(names)
        self._limit_bytes = int(limit_gib * _GIB)
        self._host = torch.zeros(0, len(names), 0, dtype=torch.bfloat16)
        self._staged: tuple[Tensor, Tensor] | None = None
        self._pending: list[tuple[Tensor, int, Tensor]] = []

    def take_ids(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the sample ids out of a batch, before the model sees it; a forward pre-hook.

        Raises:
            ConfigError: a training batch without ids, or with bad ones.
        """
        ids = kwargs.get(SAMPLE_ID)
        if model.training and torch.is_grad_enabled():
            _check_ids(ids)
            self.ids = ids
        return args, {k: v for k, v in kwargs.items() if k != SAMPLE_ID}

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (n,) float32 relative norms for an input of ``shape`` (b, t, d), or None."""
        if self.ids is None or not _fits(shape, self.ids):
            return None
        staged = self._stage(self.ids, shape[-2])[:, list(columns)]  # (b, columns, t)
        is_seen = staged.amax((1, 2), keepdim=True) > 0  # (b, 1, 1)
        rows_seen = is_seen.sum() * shape[-2]
        mean = staged.square().sum((0, 2), keepdim=True) / rows_seen.clamp(min=1)
        relative = staged.square() / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        relative = torch.where(is_seen, relative, torch.ones_like(relative))
        return relative.sum(1).sqrt().reshape(-1)

    def expect(self, column: int, shape: torch.Size, device: torch.device) -> None:
        """Do nothing: norms are written to the host between forwards."""

    def update(
        self,
        column: int,
        grad_norms: Tensor,
        mask: Tensor | None,
        shape: torch.Size,
        ids: Tensor | None,
    ) -> None:
        """Take note of the exact norms (n,) that the backward of one linear met."""
        if ids is not None and _fits(shape, ids):
            self._pending.append((ids, column, grad_norms.view(-1, shape[-2])))

    def _flush(self) -> None:
        """Write what backward met since the last call to host memory."""
        pending, self._pending = self._pending, []
        for ids, column, norms in pending:
            rows, host = ids.flatten().cpu(), norms.to("cpu", torch.bfloat16)
            if not bool(host.isfinite().all()):
                bad = int(rows[~host.isfinite().all(-1)][0])
                raise LeantuneError(
                    f"WTACRS: gradient norms of {self._names[column]} must be finite, got nan or "
                    f"inf for sample_id {bad}; the loss has diverged: lower the learning rate, or "
                    "clip gradients (under float16 loss scaling take norms='running')"
                )
            self._reserve(rows, host.shape[-1])
            self._host[rows, column] = 0
            self._host[rows, column, : host.shape[-1]] = host

    def _stage(self, ids: Tensor, num_positions: int) -> Tensor:
        """Bring the batch's norms to its device, once per batch and length: (b, c, t)."""
        if self._staged is not None:
            owner, staged = self._staged
            if owner is ids and staged.shape[-1] == num_positions:
                return staged
        self._flush()
        rows = ids.flatten().cpu()
        self._reserve(rows, num_positions)
        staged = self._host[rows, :, :num_positions].float().to(ids.device)
        self._staged = (ids, staged)
        return staged

    def _reserve(self, rows: Tensor, num_positions: int) -> None:
        """Grow the cache to hold these samples and positions, within the limit."""
        samples, columns, positions = self._host.shape
        wanted = int(rows.max()) + 1
        if wanted > samples:
            wanted = max(wanted, samples * 3 // 2)
        new = (max(samples, wanted), columns, max(positions, num_positions))
        if new == self._host.shape:
            return
        num_bytes = torch.Size(new).numel() * torch.bfloat16.itemsize
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
        """Return the norms of all samples, (samples, c, tokens)."""
        self._flush()
        return {"cache": self._host}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved norms on.

        Raises:
            ConfigError: norms of another recipe or model, or not finite ones.
        """
        norms = state.get("cache")
        if norms is None or norms.ndim != 3 or norms.shape[1] != len(self._names):
            shape = None if norms is None else tuple(norms.shape)
            raise ConfigError(
                f"WTACRS: cached norms must have shape (samples, {len(self._names)}, tokens), got "
                f"{shape}; load the session with the recipe and model it was saved with"
            )
        if not bool(torch.isfinite(norms.float()).all()):
            raise ConfigError(
                "WTACRS: cached norms must be finite, got nan or inf in the saved state; take an "
                "earlier checkpoint"
            )
        self._host = norms.clone()
        self._staged = None
        self._pending.clear()


def _fits(shape: torch.Size, ids: Tensor) -> bool:
    return len(shape) == 3 and ids.numel() == shape[0]


def _check_ids(ids: Any) -> None:
    rule = "WTACRS: sample_id must be"
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.numel() == 0:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise ConfigError(
            f"{rule} an integer for each sample where norms='cache', got {got}; give the data "
            "set such a column, dataset.add_column('sample_id', range(len(dataset))), and "
            "TrainingArguments remove_unused_columns=False"
        )
    flat = ids.flatten()
    if int(flat.min()) < 0:
        raise ConfigError(f"{rule} at least 0, got {int(flat.min())}; number the samples from 0")
    if flat.unique().numel() != flat.numel():
        raise ConfigError(
            f"{rule} distinct within a batch, got {flat.numel() - flat.unique().numel()} repeats; "
            "drop the repeats, or take norms='running'"
        )
