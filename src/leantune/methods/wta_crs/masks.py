"""Which row masks may be trusted: those whose masked rows were seen to have no gradient.

Legend: b samples, t token positions, n = b * t rows, c linears, f batch fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.compiler import is_compiling

from leantune.core.runtime import ROW_MASKS, Runtime
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.backend import on_gpu

_BROKEN, _UNKNOWN, _HOLDS = -1, 0, 1
_NUM_NAMED = 3


@dataclass(frozen=True, eq=False)
class RowMask:
    """A row mask of the batch at hand; the batch has it once, whatever the number of linears.

    Args:
        field: number of the batch field.
        shape: (b, t).
        real: (n,) bool, False on rows that are said to have no gradient.
        sums: (2, n) float32; times the gradient norms of n rows it gives the sum over the masked
            rows, and the sum over the real ones, which is 0 where nothing is masked.
    """

    field: int
    shape: torch.Size
    real: Tensor
    sums: Tensor


class LearnedMasks:
    """Learned masks leave padding out of a draw once a backward has shown that it has no gradient.

    What a mask means is never assumed. A linear trusts a field after a backward in which some rows
    were masked, none of those had a gradient, and a real row had one. Every later backward checks
    it again. The device is not waited for there: sums are added up on it, and read at the beginning
    of the next training forward.

    Args:
        names: of the linears; a linear's column is its place in this list.
        devices: of the linears.
        runtime: of the session.
    """

    def __init__(
        self, names: Sequence[str], devices: Sequence[torch.device], runtime: Runtime
    ) -> None:
        self._names = list(names)
        self._runtime = runtime
        self._verdicts = [[_UNKNOWN] * len(ROW_MASKS) for _ in names]
        # For each linear (f, 2, 2): by field, for draws without and with it, sums as in RowMask.
        # A tensor each, since a compiler lets graphs share none that one of them writes to.
        self._met = [torch.zeros(len(ROW_MASKS), 2, 2, device=device) for device in devices]
        self._batch: list[RowMask] = []
        self._has_met_any = False

    def begin(self) -> None:
        """Judge what backward met since the last training forward, and take the batch's masks.

        Raises:
            UnsupportedError: see :meth:`judge`.
            ConfigError: a mask calls no row real.
        """
        self._batch = []
        if not self._runtime.is_in_forward:
            return
        self.judge()
        for field, name in enumerate(ROW_MASKS):
            real = self._runtime.batch.masks.get(name)
            if real is None:
                continue
            if not self._must_not_wait(real) and not bool(real.any()):
                raise ConfigError(
                    f"WTACRS: {name} must mark at least one row as real, got zeros alone; give 1 "
                    "on tokens and 0 on padding, or leave the field out"
                )
            masked = ~real
            sums = torch.stack((masked, real & masked.any())).float().flatten(1)
            self._batch.append(RowMask(field, real.shape, real.flatten(), sums))
            self._has_met_any = True

    def fitting(self, shape: torch.Size, device: torch.device) -> list[RowMask]:
        """Return the masks that fit an input of ``shape`` (b, t, d) or flattened, (b * t, d).

        None outside the model's forward: a block that is recomputed in backward may be of an
        earlier batch.
        """
        if not self._runtime.is_in_forward:
            return []
        masks = [m for m in self._batch if shape[:-1] in (m.shape, (m.real.numel(),))]
        if masks and masks[0].real.device != device:  # the model lies on several devices
            masks = [replace(m, real=m.real.to(device), sums=m.sums.to(device)) for m in masks]
        return masks

    def allow(self, mask: RowMask | None, columns: Sequence[int]) -> bool:
        """Return whether these linears may read a sample that left the masked rows out."""
        if mask is None:
            return True
        return all([self._verdicts[column][mask.field] == _HOLDS for column in columns])

    def expect(self, column: int, device: torch.device) -> None:
        """Make room in forward for what backward writes, which a compiler follows."""
        if self._met[column].device != device:
            if is_compiling():
                torch._dynamo.graph_break()
            self._met[column] = self._met[column].to(device)

    def check(self, column: int, mask: RowMask, is_used: bool, grad_norms: Tensor) -> None:
        """Take note of the exact gradient norms (n,) that the backward of one linear met."""
        self._met[column][mask.field, int(is_used)].addmv_(mask.sums, grad_norms)

    def judge(self) -> None:
        """Read what backward met; nothing is read while a graph is compiled or captured.

        Raises:
            UnsupportedError: rows were left out of a draw, and had a gradient.
        """
        if not self._has_met_any or self._must_not_wait(self._met[0]):
            return
        wrong: dict[int, list[str]] = {}
        for device in {met.device for met in self._met}:
            columns = [c for c, met in enumerate(self._met) if met.device == device]
            written = [self._met[c] for c in columns]
            # An overflowed step leaves nan, which is not above 0 and says nothing.
            above = torch.stack(written).cpu() > 0
            torch.ops.aten._foreach_zero_(written)
            is_broken, holds = above.any(2).unbind(-1)
            for i, field in (is_broken | holds).nonzero().tolist():
                verdicts, is_wrong = self._verdicts[columns[i]], bool(is_broken[i, field])
                if is_wrong:
                    verdicts[field] = _BROKEN
                elif verdicts[field] == _UNKNOWN:
                    verdicts[field] = _HOLDS
                if is_wrong and bool(above[i, field, 1, 0]):
                    wrong.setdefault(field, []).append(self._names[columns[i]])
        if wrong:
            field, names = min(wrong.items())
            more = len(names) - _NUM_NAMED
            others = f" and {more} more" if more > 0 else ""
            raise UnsupportedError(
                f"WTACRS: {ROW_MASKS[field]} must be 0 only on rows without a gradient, got a loss "
                f"that counts padding at {', '.join(names[:_NUM_NAMED])}{others}, which biased the "
                "last weight gradient; give the labels to the model with -100 on padding, or "
                "draw_at='backward', which needs no mask"
            )

    @staticmethod
    def _must_not_wait(tensor: Tensor) -> bool:
        return is_compiling() or (on_gpu(tensor) and torch.cuda.is_current_stream_capturing())

    def state_dict(self) -> dict[str, Tensor]:
        """Return each linear's verdict on each field, (c, f) int8: -1 broken, 0 unknown, 1 holds.

        Raises:
            UnsupportedError: see :meth:`judge`.
        """
        self.judge()
        return {"masks": torch.tensor(self._verdicts, dtype=torch.int8)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take verdicts on; without an entry they are learned anew.

        Raises:
            ConfigError: they are of another model.
        """
        shape = (len(self._names), len(ROW_MASKS))
        verdicts = state.get("masks", torch.zeros(shape, dtype=torch.int8))
        is_whole = verdicts.dtype == torch.int8 and verdicts.shape == shape
        if not is_whole or bool((verdicts.abs() > 1).any()):
            raise ConfigError(
                f"WTACRS: masks must be verdicts (-1, 0 or 1) of shape {shape}, got "
                f"{verdicts.dtype} of shape {tuple(verdicts.shape)}; load the session with the "
                "recipe and model it was saved with"
            )
        self._verdicts = verdicts.tolist()
        for met in self._met:
            met.zero_()
