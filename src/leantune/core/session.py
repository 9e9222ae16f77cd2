"""A converted model's session: its conversions, from apply to remove or merge."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.files import write_session
from leantune.core.optim import paired
from leantune.core.recipe import Recipe
from leantune.core.runtime import Runtime
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.backend import on_gpu


class Session:
    """A session is a converted model and the way back; :func:`leantune.apply` makes it.

    Attributes:
        model: the converted model (the same object that was given).
        methods: the recipe's configs, in the order given.
        conversions: what they did, in the order in which it was done.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[MethodConfig, ...],
        runtime: Runtime,
        conversions: Mapping[str, Conversion],
        base: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.methods = methods
        self.conversions = list(conversions.values())
        self._names = list(conversions)
        self._runtime = runtime
        self._base = base

    def __repr__(self) -> str:
        names = ", ".join(config.method for config in self.methods)
        state = f"step {self.step}" if self.conversions else "closed"
        return f"<Session of {type(self.model).__name__}: {names}; {state}>"

    @property
    def seed(self) -> int:
        """What fixes every random choice, together with the site and the number of the forward."""
        return self._runtime.seed

    @property
    def step(self) -> int:
        """The number of optimiser steps so far, where ``on_step`` or a trainer callback counts."""
        return self._runtime.step

    def exact(self) -> AbstractContextManager[None]:
        """Run the plain computation inside: nothing sampled, exact gradients."""
        return self._runtime.exact()

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the auxiliary losses of the last training forward, a () tensor.

        Zero where no method has one. Add it to the task's loss before ``backward``; the trainer
        callback does so by itself.
        """
        return self._runtime.auxiliary_loss()

    def on_step(self) -> None:
        """Count one optimiser step and let methods act on it; the trainer callback calls this."""
        self._runtime.step += 1
        for conversion in self.conversions:
            conversion.on_step(self.step)

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Show some batches to the methods that ask for calibration; the others ignore them.

        Dropout draws from generators seeded by ``seed`` meanwhile; the caller's do not move. Of
        several processes all must call this, with as many batches of their own or the same ones.

        Args:
            batches: of the form that the model is called with (``model(**batch)``).
        """
        wanted = [c for c in self.conversions if c.num_calibration_batches]
        with _seeded_generators(self.model, self.seed):
            kept = list(batches) if len(wanted) > 1 else batches
            for conversion in wanted:
                conversion.calibrate(kept)

    def optimizer(
        self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
    ) -> torch.optim.Optimizer:
        """Return ``kind`` over the parameters that train.

        Where a method gives some of them sparse gradients, a sparse Adam steps those beside it; the
        two act as one optimiser.

        Args:
            kind: any torch optimiser class.
            options: passed on (``lr=1e-4``).

        Raises:
            ConfigError: no parameter trains.
        """
        params = [p for p in self.model.parameters() if p.requires_grad]
        if not params:
            raise ConfigError(
                "session.optimizer: the model must have a trainable parameter, got none; set "
                "requires_grad on what should train"
            )
        sparse = [p for c in self.conversions for p in c.sparse_parameters]
        return paired(kind, params, sparse, options)

    def remove(self) -> None:
        """Put the original module objects back; weights stay as they are now."""
        self._close(lambda conversion: conversion.undo())

    @property
    def can_merge(self) -> bool:
        """Whether plain modules can compute what every method here computes."""
        return all(conversion.can_merge for conversion in self.conversions)

    def merge(self) -> None:
        """Fold what was trained into plain modules, so that ``save_pretrained`` works as ever.

        Raises:
            UnsupportedError: plain modules cannot compute what a method here computes; nothing
                is folded.
        """
        lacking = [
            name
            for name, conversion in zip(self._names, self.conversions, strict=True)
            if not conversion.can_merge
        ]
        if lacking:
            raise UnsupportedError(
                "session.merge: methods must have a dense equivalent, got "
                f"{lacking[0].partition('.')[2]}, which has none; keep the converted model with "
                "session.save(folder), or put the plain modules back without it with "
                "session.remove()"
            )
        self._close(lambda conversion: conversion.merge())

    def _close(self, end: Callable[[Conversion], None]) -> None:
        while self.conversions:
            end(self.conversions[-1])
            self.conversions.pop()
            self._names.pop()
        self._runtime.remove_hooks()
        if getattr(self.model, "_leantune_session", None) is self:
            del self.model._leantune_session

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides weights and optimiser, as flat tensors."""
        out = {
            "counter": self._runtime.counter.cpu(),
            "step": torch.tensor(self.step),
            "seed": torch.tensor(self.seed),
        }
        for name, conversion in zip(self._names, self.conversions, strict=True):
            out.update({f"{name}/{k}": v for k, v in conversion.state_dict().items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back, so that the run goes on as if it had never stopped.

        Raises:
            ConfigError: the state belongs to another recipe, or is damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._names}
        for key, value in state.items():
            name, slash, rest = key.partition("/")
            if slash and name not in parts:
                raise ConfigError(
                    f"session: state must belong to this recipe, got an entry {key!r} that no "
                    "method here keeps; apply the recipe that the state was saved with"
                )
            if slash:
                parts[name][rest] = value
        for key in ("counter", "step", "seed"):
            value = state.get(key)
            if value is None or value.shape != () or value.dtype != torch.int64:
                got = "none" if value is None else f"shape {tuple(value.shape)} of {value.dtype}"
                raise ConfigError(
                    f"session: state must hold counter, step and seed, each one int64, got {got} "
                    f"for {key!r}; the file is not a leantune session or is damaged"
                )
        for conversion, part in zip(self.conversions, parts.values(), strict=True):
            conversion.load_state_dict(part)
        runtime = self._runtime
        runtime.counter = state["counter"].to(runtime.counter.device)
        runtime.step, runtime.seed = int(state["step"]), int(state["seed"])

    def save(self, folder: str | Path) -> None:
        """Write recipe, trained weights and session state to ``folder``, all or nothing.

        Raises:
            ConfigError: a predicate in ``sites``, which no file can hold; or ``folder`` holds what
                no session wrote.
            UnsupportedError: parameters are sharded.
            WriteError: the disk is full; what was there before survives.
        """
        recipe = Recipe(methods=self.methods, seed=self.seed).to_dict()
        place = Path(folder).expanduser()
        write_session(place, recipe, self.model, self.state_dict, self._base)


@contextmanager
def _seeded_generators(model: nn.Module, seed: int) -> Generator[None]:
    """Seed the generators of the CPU and of the model's GPUs inside, and put them back after."""
    # Only these: to touch another GPU would start CUDA on it.
    used = {p.device for p in model.parameters() if on_gpu(p)}
    with torch.random.fork_rng(devices=list(used)):
        torch.default_generator.manual_seed(seed)
        for device in used:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
