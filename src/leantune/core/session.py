"""A converted model's session: its conversions, from apply to remove or merge."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.calibration import checked_batches, seeded_generators
from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion, split_state
from leantune.core.disk import as_folder
from leantune.core.files import write_session
from leantune.core.optim import paired
from leantune.core.ownership import refuse_copies, refuse_idle, refuse_not_ours
from leantune.core.recipe import Recipe
from leantune.core.runtime import Runtime
from leantune.core.saving import give_back_saving, take_over_saving
from leantune.errors import ConfigError, UnsupportedError

MARK = "_leantune_converted"
"""What each module of a converted model holds: nothing in it is converted again, nor around it."""


class Session:
    """A session is a converted model and the way back; :func:`leantune.apply` makes it.

    Attributes:
        model: the converted model (the same object that was given).
        methods: the recipe's configs, in the order given.
        conversions: what they did, in the order in which it was done; empty once it has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: tuple[MethodConfig, ...],
        runtime: Runtime,
        conversions: list[Conversion],
        base: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.methods = methods
        self.conversions = conversions
        self._runtime = runtime
        self._base = base
        self._done = [f"{c.config!r} at {len(c.sites)} sites" for c in conversions]
        take_over_saving(model, conversions)
        self._first = model.register_forward_pre_hook(self._check_first_forward)
        runtime.install_hooks(model)
        model._leantune_session = self  # type: ignore[assignment]
        names = ", ".join(config.method for config in methods)
        for module in model.modules():
            vars(module)[MARK] = f"{type(model).__name__} with {names}"

    def __repr__(self) -> str:
        state = "open" if self.conversions else "closed"
        title = f"Session of {type(self.model).__name__}: {state}, step {self.step}"
        return "\n  ".join([f"<{title}", *self._done]) + ">"

    @property
    def seed(self) -> int:
        """What fixes every random choice, together with the site and the number of the forward."""
        return self._runtime.seed

    @property
    def step(self) -> int:
        """The number of optimiser steps so far, where ``on_step`` or a trainer callback counts."""
        return self._runtime.step

    @property
    def can_merge(self) -> bool:
        """Whether plain modules can compute what every method here computes."""
        return all(conversion.can_merge for conversion in self.conversions)

    def exact(self) -> AbstractContextManager[None]:
        """Run the plain computation inside: nothing sampled, exact gradients."""
        check_open(self, "session.exact")
        return self._runtime.exact()

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the auxiliary losses of the last training forward, a () tensor.

        Zero where no method has one. Add it to the task's loss before ``backward``; the trainer
        callback does so by itself.
        """
        check_open(self, "session.auxiliary_loss")
        return self._runtime.auxiliary_loss()

    def on_step(self) -> None:
        """Count one optimiser step and let methods act on it; the trainer callback calls this."""
        check_open(self, "session.on_step")
        self._runtime.step += 1
        for conversion in self.conversions:
            conversion.on_step(self.step)

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Show some batches to the methods that ask for calibration; the others ignore them.

        Dropout draws from generators seeded by ``seed`` meanwhile; the caller's do not move. Of
        several processes all must call this, with as many batches of their own or the same ones.

        Args:
            batches: of the form that the model is called with (``model(**batch)``).

        Raises:
            ConfigError: no list of batches.
        """
        check_open(self, "session.calibrate")
        batches = checked_batches(batches)
        wanted = [c for c in self.conversions if c.num_calibration_batches]
        with seeded_generators(self.model, self.seed):
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
            ConfigError: no parameter trains, or ``kind`` is no optimiser or refuses its options.
        """
        check_open(self, "session.optimizer")
        sparse = [p for c in self.conversions for p in c.sparse_parameters]
        return paired(kind, self.model.parameters(), sparse, options)

    def remove(self) -> None:
        """Put the original module objects back; weights stay as they are now.

        What others have put around a module since stays, around the original. A session that has
        ended already is left alone.

        Raises:
            UnsupportedError: others have replaced or copied a converted module; nothing is changed.
        """
        if self.conversions:
            self._close("session.remove", lambda conversion: conversion.undo())

    def merge(self) -> None:
        """Fold what was trained into plain modules, so that ``save_pretrained`` works as ever.

        Raises:
            UnsupportedError: plain modules cannot compute what a method here computes, or others
                have replaced or copied a converted module; nothing is folded.
        """
        check_open(self, "session.merge")
        lacking = [conversion for conversion in self.conversions if not conversion.can_merge]
        if lacking:
            raise UnsupportedError(
                "session.merge: methods must have a dense equivalent, got "
                f"{lacking[0].config.method}, which has none on this model; keep the converted "
                "model with session.save(folder), or put the plain modules back without it with "
                "session.remove()"
            )
        self._close("session.merge", lambda conversion: conversion.merge())

    def _close(self, who: str, end: Callable[[Conversion], None]) -> None:
        refuse_not_ours(who, self.model, self.conversions, self._runtime)
        while self.conversions:
            end(self.conversions[-1])
            self.conversions.pop()
        self._first.remove()
        self._runtime.remove_hooks()
        give_back_saving(self.model)
        del self.model._leantune_session
        for module in self.model.modules():
            vars(module).pop(MARK, None)

    def _check_first_forward(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            refuse_idle(self.conversions)
            refuse_copies(self.model, self._runtime)
            if not self._runtime.is_exact:  # as in calibration, before others are done
                self._first.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides weights and optimiser, as flat tensors."""
        check_open(self, "session.state_dict")
        out = self._runtime.state_dict()
        for conversion in self.conversions:
            out.update({f"{conversion.name}/{k}": v for k, v in conversion.state_dict().items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back, so that the run goes on as if it had never stopped; all or nothing.

        Raises:
            ConfigError: the state belongs to another recipe, or is damaged.
        """
        check_open(self, "session.load_state_dict")
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            self._load(state)
        except BaseException:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self._runtime.load_state_dict(state)
        parts = split_state(state, [conversion.name for conversion in self.conversions])
        for conversion, part in zip(self.conversions, parts, strict=True):
            conversion.load_state_dict(part)

    def save(self, folder: str | Path) -> None:
        """Write recipe, trained weights and session state to ``folder``, all or nothing.

        Raises:
            ConfigError: no path, or a predicate in ``sites``, which no file can hold; or ``folder``
                holds what no session wrote.
            UnsupportedError: parameters are sharded, or were frozen after they had trained.
            WriteError: the disk is full; what was there before survives.
        """
        check_open(self, "session.save")
        recipe = Recipe(methods=self.methods, seed=self.seed).to_dict()
        place = as_folder("session.save", folder)
        write_session(place, recipe, self.model, self.state_dict, self._base)


def check_open(session: Session, who: str) -> None:
    """Raise where the session has ended; the error begins with ``who``, what was called.

    Raises:
        ConfigError: ``merge`` or ``remove`` has been called.
    """
    if not session.conversions:
        raise ConfigError(
            f"{who}: session must be open, got one after merge() or remove(); apply the recipe "
            "again, and use the new session"
        )
