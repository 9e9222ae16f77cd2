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
from leantune.ops.backend import LateCopy, on_gpu

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
    it again. The device is not waited for: sums are added up there, and read when the next training
    forward begins, on a GPU one forward later.

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
        # For each linear (f, 2, 2): by field, for draws without and with it, sums as in RowMask.
        # A tensor each, since a compiler lets graphs share none that one of them writes to.
        self._met = [torch.zeros(len(ROW_MASKS), 2, 2, device=device) for device in devices]
        self._batch: list[RowMask] = []
        self._has_met_any = False
        self._restart(torch.zeros(len(names), len(ROW_MASKS), 2, 2, dtype=torch.bool))

    def _restart(self, shown: Tensor) -> None:
        # Which of the sums were ever above 0, (c, f, 2, 2) bool: on the device, and as far as read.
        self._shown = shown
        self._late = {"begin": LateCopy(), "step": LateCopy()}
        self._take_on(shown)

    def _take_on(self, known: Tensor) -> None:
        self._known = known
        is_broken, holds = known.any(2).unbind(-1)
        self._trusted: list[list[bool]] = (holds & ~is_broken).tolist()

    def begin(self) -> None:
        """Learn from past backwards, and take the batch's masks.

        Raises:
            UnsupportedError: rows were left out of a draw, and had a gradient.
        """
        self._batch = []
        if not self._runtime.is_in_forward:
            return
        self.learn("begin")
        for field, name in enumerate(ROW_MASKS):
            real = self._runtime.batch.masks.get(name)
            if real is not None:
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
        return mask is None or all([self._trusted[column][mask.field] for column in columns])

    def expect(self, column: int, device: torch.device) -> None:
        """Make room in forward for what backward writes, which a compiler follows."""
        if self._met[column].device != device:
            if is_compiling():
                torch._dynamo.graph_break()
            self._met[column] = self._met[column].to(device)

    def check(self, column: int, mask: RowMask, is_used: bool, grad_norms: Tensor) -> None:
        """Take note of the exact gradient norms (n,) that the backward of one linear met."""
        self._met[column][mask.field, int(is_used)].addmv_(mask.sums, grad_norms)

    def learn(self, when: str) -> None:
        """Learn what backward met; of a GPU, up to the last call at this point of a step.

        Args:
            when: "begin" of a forward, or after a "step"; the first does nothing while a graph is
                compiled or captured.

        Raises:
            UnsupportedError: rows were left out of a draw, and had a gradient.
        """
        is_fixed = is_compiling() or (
            on_gpu(self._met[0]) and torch.cuda.is_current_stream_capturing()
        )
        if self._has_met_any and not is_fixed:
            known = self._late[when].swap(self._read())
            if known is not None:
                self._judge(known)

    def _read(self) -> Tensor:
        device = self._met[0].device
        sums = torch.stack([met.to(device) for met in self._met])
        torch.ops.aten._foreach_zero_(self._met)
        # An overflowed step leaves nan, which is not above 0 and says nothing.
        self._shown = self._shown.to(device) | (sums > 0)
        return self._shown

    def _judge(self, known: Tensor) -> None:
        new = known & ~self._known
        if not bool(new.any()):
            return
        self._take_on(self._known | known)
        wrong = new[:, :, 1, 0].t().nonzero().tolist()  # left out, and had a gradient
        if wrong:
            field = wrong[0][0]
            names = [self._names[column] for f, column in wrong if f == field]
            more = len(names) - _NUM_NAMED
            others = f" and {more} more" if more > 0 else ""
            raise UnsupportedError(
                f"WTACRS: {ROW_MASKS[field]} must be 0 only on rows without a gradient, got a loss "
                f"that counts padding at {', '.join(names[:_NUM_NAMED])}{others}, which biased the "
                "last weight gradient; give the labels to the model with -100 on padding, or "
                "draw_at='backward', which needs no mask"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what gradients showed, (c, f, 2, 2) bool: by linear, field, use, and row's kind.

        Raises:
            UnsupportedError: rows were left out of a draw, and had a gradient.
        """
        self._judge(self._read().cpu())
        return {"masks": self._known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take on what gradients showed; without an entry it is learned anew.

        Raises:
            ConfigError: it is of another model.
        """
        known = state.get("masks", torch.zeros_like(self._known))
        if known.dtype != torch.bool or known.shape != self._known.shape:
            raise ConfigError(
                f"WTACRS: masks must be bool of shape {tuple(self._known.shape)}, got "
                f"{known.dtype} of shape {tuple(known.shape)}; load the session with the recipe "
                "and model it was saved with"
            )
        torch.ops.aten._foreach_zero_(self._met)
        self._restart(known.cpu())
