"""The paper's cache of gradient norms: each sample's last visit guesses the norms of its next one.

Legend: b samples, t token positions, n = b * t rows, c linears.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.conversion import SAMPLE_ID
from leantune.errors import ConfigError, LeantuneError

_GIB = 2**30
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class CachedNorms:
    """Cached norms are, per sample, linear and token, the gradient norm at the sample's last visit.

    They lie in host memory as bfloat16, are written and read once a forward, and count tokens from
    the left: padding belongs on the right. Samples not seen yet count as average, which leaves the
    norm of the activation. A change of the loss scale, as float16 training makes, skews the guess
    until a sample is visited again; the estimate stays unbiased.

    Args:
        names: of the linears; a linear's column is its place in this list.
        limit_gib: host memory that the cache may take.

    Attributes:
        ids: (b,) int64 on the host, the samples of the last training forward.
        by_reader: whether each reader of a sample has norms of its own.

    Source: arXiv 2305.15265, the cached gradient norms.
    """

    by_reader = True

    def __init__(self, names: Sequence[str], limit_gib: float) -> None:
        self.ids: Tensor | None = None
        self._names = list(names)
        self._limit_bytes = int(limit_gib * _GIB)
        self._num_samples = 0
        self._host = torch.zeros(0, len(names), 0, dtype=torch.bfloat16)
        self._device = torch.device("cpu")
        # Of the batch at hand, by the number of positions: an encoder and a decoder have two.
        self._staged: dict[int, Tensor] = {}
        self._pending: list[tuple[Tensor, int, Tensor]] = []

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Read the ids off every training batch, and keep them from the model."""
        # Every reader comes before every drop: two configs may want the ids of one batch.
        read = model.register_forward_pre_hook(self._read_ids, with_kwargs=True, prepend=True)
        return [read, model.register_forward_pre_hook(_drop_ids, with_kwargs=True)]

    def _read_ids(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training and torch.is_grad_enabled()):
            return
        others = (value for name, value in kwargs.items() if name != SAMPLE_ID)
        self.ids = _checked(kwargs.get(SAMPLE_ID), (*args, *others))
        self._device = kwargs[SAMPLE_ID].device
        self._flush()
        self._staged.clear()

    def observes(self, step: int) -> bool:
        """Return True: what was not met at a visit is not there for the next."""
        return True

    def predict(self, shape: torch.Size, columns: Sequence[int]) -> Tensor | None:
        """Return (n,) float32 relative norms for an input of ``shape`` (b, t, d), or None."""
        if self.ids is None or not _fits(shape, self.ids):
            return None
        staged = self._stage(self.ids, shape[-2])[:, list(columns)]  # (b, columns, t)
        # By powers of two, which round nothing, so that squares neither vanish nor overflow.
        _, exponent = torch.frexp(staged.amax((0, 2), keepdim=True))
        staged = torch.ldexp(staged, -exponent.clamp(-126, 126))
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
        real: Tensor | None,
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
            host = norms.to("cpu", torch.bfloat16)
            if not bool(host.isfinite().all()):
                bad = int(ids[~host.isfinite().all(-1)][0])
                raise LeantuneError(
                    f"WTACRS: gradient norms of {self._names[column]} must be finite, got nan or "
                    f"inf for sample_id {bad}; the loss has diverged: lower the learning rate, or "
                    "clip gradients (under float16 loss scaling take norms='running')"
                )
            self._reserve(int(ids.max()) + 1, host.shape[-1])
            self._host[ids, column] = 0
            self._host[ids, column, : host.shape[-1]] = host

    def _stage(self, ids: Tensor, num_positions: int) -> Tensor:
        """Bring the batch's norms to its device, once per batch and length: (b, c, t)."""
        staged = self._staged.get(num_positions)
        if staged is None:
            self._reserve(int(ids.max()) + 1, num_positions)
            staged = self._host[ids, :, :num_positions].float().to(self._device)
            self._staged[num_positions] = staged
        return staged

    def _reserve(self, num_samples: int, num_positions: int) -> None:
        """Grow the cache to hold so many samples and positions, within the limit."""
        samples, columns, positions = self._host.shape
        num_samples = max(self._num_samples, num_samples)
        if num_samples <= samples and num_positions <= positions:
            self._num_samples = num_samples
            return
        old, positions = self._host, max(positions, num_positions)
        num_bytes = columns * positions * old.itemsize  # of one sample
        if num_samples * num_bytes > self._limit_bytes:
            needed = num_samples * num_bytes / _GIB
            raise ConfigError(
                f"WTACRS: cache_gib must be at least {needed:.2g} for {num_samples} samples x "
                f"{columns} linears x {positions} tokens in bfloat16, got "
                f"{self._limit_bytes / _GIB:.2g}; raise it, number the samples from 0, shorten "
                "them, or take norms='running', which needs no cache"
            )
        # Room for more, so that a first epoch in order does not grow the cache at every step.
        with_room = max(samples, num_samples * 3 // 2)
        new = min(with_room, self._limit_bytes // num_bytes)
        self._host = torch.zeros(new, columns, positions, dtype=old.dtype)
        self._host[:samples, :, : old.shape[-1]] = old[:new]
        self._num_samples = num_samples

    def state_dict(self) -> dict[str, Tensor]:
        """Return the norms of all samples, (samples, c, tokens)."""
        self._flush()
        return {"cache": self._host[: self._num_samples]}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved norms on.

        Raises:
            ConfigError: norms of another recipe or model, or not finite ones.
        """
        norms = state.get("cache")
        is_right = norms is not None and norms.ndim == 3 and norms.shape[1] == len(self._names)
        if norms is None or not (is_right and norms.is_floating_point()):
            got = sorted(state) if norms is None else f"{tuple(norms.shape)} of {norms.dtype}"
            raise ConfigError(
                f"WTACRS: cached norms must have shape (samples, {len(self._names)}, tokens), got "
                f"{got}; load the session with the recipe and model it was saved with"
            )
        if not bool(torch.isfinite(norms.float()).all()):
            raise ConfigError(
                "WTACRS: cached norms must be finite, got nan or inf in the saved state; take an "
                "earlier checkpoint"
            )
        self._host = norms.to("cpu", torch.bfloat16, copy=True)
        self._num_samples = len(norms)
        self._staged.clear()
        self._pending.clear()


def _fits(shape: torch.Size, ids: Tensor) -> bool:
    return len(shape) == 3 and ids.numel() == shape[0]


def _drop_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {name: value for name, value in kwargs.items() if name != SAMPLE_ID}


def _checked(ids: Any, inputs: Iterable[Any]) -> Tensor:
    """Return a copy of a batch's ids on the host, (b,) int64, or say what is wrong with them."""
    rule = "WTACRS: sample_id must be"
    is_whole = isinstance(ids, Tensor) and ids.dtype in _WHOLE
    if not is_whole or ids.numel() == 0:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise ConfigError(
            f"{rule} an integer for each sample where norms='cache', got {got}; give the data "
            "set such a column, dataset.add_column('sample_id', range(len(dataset))), and "
            "TrainingArguments remove_unused_columns=False"
        )
    # A copy: the caller may fill the same tensor with the next batch's.
    flat = ids.detach().flatten().to("cpu", torch.int64, copy=True)
    first = next((v for v in inputs if isinstance(v, Tensor) and v.ndim > 0), flat)
    if len(flat) != len(first):
        raise ConfigError(
            f"{rule} one integer for each sample, got {len(flat)} for a batch of {len(first)}; "
            "give each sample its own, and do not pack several samples into one row"
        )
    if int(flat.min()) < 0:
        raise ConfigError(f"{rule} at least 0, got {int(flat.min())}; number the samples from 0")
    if flat.unique().numel() != flat.numel():
        raise ConfigError(
            f"{rule} distinct within a batch, got {flat.numel() - flat.unique().numel()} repeats; "
            "drop the repeats, or take norms='running'"
        )
    return flat
