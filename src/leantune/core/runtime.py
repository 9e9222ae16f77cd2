"""What methods ask for while a model runs: random keys, batch facts, exactness, extra losses."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.distributed import rank
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.random import RandomKey

IGNORED_LABEL = -100
"""The label that the field's losses skip."""

ROW_MASKS = ("attention_mask", "decoder_attention_mask")
"""Batch fields that mark real rows."""


@dataclass
class BatchInfo:
    """A batch info says which rows of the current batch may have a gradient.

    Args:
        masks: batch field -> (b, t) bool, True on rows that may have a gradient.
    """

    masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "BatchInfo":
        """Read the facts off the keyword arguments that the model is called with.

        Real tokens may have a gradient, and any token with a label: a loss that counts padding
        gives padding a gradient.
        """
        masks: dict[str, Tensor] = {}
        labels = fields.get("labels")
        for name in ROW_MASKS:
            mask = fields.get(name)
            if not (isinstance(mask, Tensor) and mask.ndim == 2):
                continue
            rows = mask != 0
            if isinstance(labels, Tensor) and labels.shape == rows.shape:
                # Position t may be scored against its own label or, shifted, the next one.
                counted = labels != IGNORED_LABEL
                rows = rows | counted
                rows[:, :-1] |= counted[:, 1:]
            masks[name] = rows
        return cls(masks)

    def real_rows(self, shape: torch.Size) -> Tensor | None:
        """Return which rows of an input of ``shape`` (b, t, d) are real, (n,) bool.

        Of an encoder and a decoder with inputs of one shape, what either mask calls real counts.
        None where no mask of the batch fits; ``shape`` may be flattened, (b * t, d).
        """
        fitting = [m for m in self.masks.values() if shape[:-1] in (m.shape, (m.numel(),))]
        return torch.stack(fitting).any(0).flatten() if fitting else None


class Runtime:
    """A runtime tells the converted modules of one model what they need to know while they run.

    It counts the training forwards of the model, so that a plain loop needs no call and every
    micro-batch draws anew; a block that is recomputed in backward sees the same number again.

    Attributes:
        seed: together with the site and the number of the forward it fixes every random choice.
        step: optimiser steps so far.
        is_exact: nothing is sampled or sparsified now.
        is_in_forward: a training forward of the model is running; a block that checkpointing
            recomputes in backward is not inside it.
        batch: facts of the last training forward's batch.
        recomputed: names of the parts of blocks (``Site.whole``) that run again in backward.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.is_exact = False
        self.batch = BatchInfo()
        self.recomputed: set[str] = set()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self._begins: list[Callable[[], None]] = []
        self._ends: list[Callable[[], None]] = []
        self._auxiliary: list[Tensor] = []
        self.is_in_forward = False
        self._rank = rank()
        self._handles: list[RemovableHandle] = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts and the seed, () int64 each."""
        step, seed = torch.tensor(self.step), torch.tensor(self.seed)
        return {"counter": self.counter.cpu(), "step": step, "seed": seed}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the counts and the seed on; entries of other names are left alone.

        Raises:
            ConfigError: one is missing or no whole number, or something is no tensor.
        """
        is_state = isinstance(state, Mapping) and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        )
        if not is_state:
            raise ConfigError(
                f"session: state must map names to tensors, got {type(state).__name__}; give what "
                "session.state_dict() returned"
            )
        for name in ("counter", "step", "seed"):
            if name not in state:
                raise ConfigError(
                    f"session: state must hold counter, step and seed, got none for {name!r}; "
                    "the file is not a leantune session or is damaged"
                )
            value = state[name]
            if value.shape or value.dtype != torch.int64 or (name != "seed" and value < 0):
                raise ConfigError(
                    f"session: {name} must be one whole number, got {value}; the file is not a "
                    "leantune session or is damaged"
                )
        self.counter = state["counter"].to(self.counter.device)
        self.step, self.seed = int(state["step"]), int(state["seed"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the graph of the last forward: a copy of the model has none of it."""
        return {**vars(self), "_auxiliary": [loss.detach() for loss in self._auxiliary]}

    def install_hooks(self, model: nn.Module) -> None:
        """Watch the model's forward; called once, when every module is in its place."""
        self._handles = [
            model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            model.register_forward_hook(self._end_forward),
        ]

    def remove_hooks(self) -> None:
        """Let the model go."""
        while self._handles:
            self._handles.pop().remove()

    def _begin_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.is_in_forward = False
        if model.training and torch.is_grad_enabled():
            _refuse_empty((*args, *kwargs.values()))
            # Out of place: a graph that is still to run backward keeps its own number.
            self.counter = self.counter + 1
            first = next(model.parameters(), self.counter)
            if self.counter.device != first.device:  # the model has moved since
                self.counter = self.counter.to(first.device)
            self._rank = rank()
            self._auxiliary.clear()
            self.batch = BatchInfo.of(kwargs)
            self.is_in_forward = True
        for begin in self._begins:
            begin()

    def _end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self.is_in_forward = False
        for end in self._ends:
            end()

    def at_forward_begin(self, call: Callable[[], None]) -> None:
        """Call ``call`` before every forward of the model, whatever its mode.

        A method brings weights up to date there with what the optimiser has done.
        """
        self._begins.append(call)

    def at_forward_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` after every forward of the model.

        A method drops there what the modules of one forward shared.
        """
        self._ends.append(call)

    def key(self, device: torch.device) -> RandomKey:
        """Return the random key of the last training forward, its counter on ``device``."""
        counter = self.counter if self.counter.device == device else self.counter.to(device)
        # Ranks see different rows, so they draw different numbers.
        return RandomKey(self.seed + (self._rank << 32), counter)

    @contextmanager
    def exact(self) -> Generator[None]:
        """Run the plain computation inside: nothing sampled, exact gradients."""
        before, self.is_exact = self.is_exact, True
        try:
            yield
        finally:
            self.is_exact = before

    def add_auxiliary_loss(self, loss: Tensor) -> None:
        """Hand over one term of the current training forward's auxiliary loss, a () tensor.

        A block that checkpointing recomputes in backward hands its term over again: outside the
        model's forward the call does nothing, so that each term counts once.

        Raises:
            UnsupportedError: the term can have no gradient, since reentrant checkpointing runs
                the block without a graph at first.
        """
        if not self.is_in_forward:
            return
        if not torch.is_grad_enabled():
            raise UnsupportedError(
                "session: an auxiliary loss must have a gradient, got one from a block that runs "
                "without a graph, as under reentrant checkpointing; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set the method's "
                "weight of that loss to 0"
            )
        self._auxiliary.append(loss)

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the last training forward's auxiliary losses, a () tensor."""
        if not self._auxiliary:
            return torch.zeros((), device=self.counter.device)
        return cast(Tensor, sum(self._auxiliary))


def _refuse_empty(inputs: Iterable[Any]) -> None:
    first = next((v for v in inputs if isinstance(v, Tensor) and v.ndim > 0), None)
    if first is not None and first.numel() == 0:
        raise ConfigError(
            f"session: batch must hold at least one row, got an input of shape "
            f"{tuple(first.shape)}; leave empty batches out (drop_last, or a longer data set)"
        )
