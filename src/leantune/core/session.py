"""A converted model's session: its conversions, from apply to remove or merge."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from leantune.core.calibration import checked_batches, seeded_generators
from leantune.core.config import MethodConfig
from leantune.core.conversion import Conversion
from leantune.core.files import as_folder, write_session
from leantune.core.optim import paired
from leantune.core.ownership import check_in_use, refuse_not_ours
from leantune.core.recipe import Recipe
from leantune.core.runtime import Runtime
from leantune.core.saving import RefusedSaving
from leantune.errors import ConfigError, UnsupportedError


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
        conversions: Mapping[str, Conversion],
    ) -> None:
        self.model = model
        self.methods = methods
        self.conversions = list(conversions.values())
        self._names = list(conversions)
        self._runtime = runtime
        made = {int(name.partition(".")[0]): c for name, c in conversions.items()}
        self._num_sites = [len(made[number].sites) for number in sorted(made)]
        self._saving: RefusedSaving | None = None
        if not self.can_merge and hasattr(model, "save_pretrained"):
            self._saving = RefusedSaving(model)
        self._first = model.register_forward_pre_hook(self._check_first_forward)
        runtime.install_hooks(model)
        model._leantune_session = self  # type: ignore[assignment]
        _sessions.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _sessions.add(self)

    def __repr__(self) -> str:
        state = "open" if self.is_open else "closed"
        title = f"Session of {type(self.model).__name__}: {state}, step {self.step}"
        made = zip(self.methods, self._num_sites, strict=True)
        lines = [f"{config!r} at {num} site{'s' if num != 1 else ''}" for config, num in made]
        return "<" + "\n  ".join([title, *lines]) + ">"

    @property
    def seed(self) -> int:
        """What fixes every random choice, together with the site and the number of the forward."""
        return self._runtime.seed

    @property
    def step(self) -> int:
        """The number of optimiser steps so far, where ``on_step`` or a trainer callback counts."""
        return self._runtime.step

    @property
    def is_open(self) -> bool:
        """Whether the model is converted: neither ``merge`` nor ``remove`` has been called."""
        return bool(self.conversions)

    @property
    def can_merge(self) -> bool:
        """Whether plain modules can compute what every method here computes."""
        return all(conversion.can_merge for conversion in self.conversions)

    def exact(self) -> AbstractContextManager[None]:
        """Run the plain computation inside: nothing sampled, exact gradients."""
        self.check_open("session.exact")
        return self._runtime.exact()

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the auxiliary losses of the last training forward, a () tensor.

        Zero where no method has one. Add it to the task's loss before ``backward``; the trainer
        callback does so by itself.
        """
        self.check_open("session.auxiliary_loss")
        return self._runtime.auxiliary_loss()

    def on_step(self) -> None:
        """Count one optimiser step and let methods act on it; the trainer callback calls this."""
        self.check_open("session.on_step")
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
        self.check_open("session.calibrate")
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
        self.check_open("session.optimizer")
        params = [p for p in self.model.parameters() if p.requires_grad]
        if not params:
            raise ConfigError(
                "session.optimizer: the model must have a trainable parameter, got none; set "
                "requires_grad on what should train"
            )
        sparse = [p for c in self.conversions for p in c.sparse_parameters]
        return paired(kind, params, sparse, options)

    def remove(self) -> None:
        """Put the original module objects back; weights stay as they are now.

        What others have put around a module since stays, around the original. A session that has
        ended already is left alone.

        Raises:
            UnsupportedError: others have replaced or copied a converted module; nothing is changed.
        """
        if self.is_open:
            self._close("session.remove", lambda conversion: conversion.undo())

    def merge(self) -> None:
        """Fold what was trained into plain modules, so that ``save_pretrained`` works as ever.

        Raises:
            UnsupportedError: plain modules cannot compute what a method here computes, or others
                have replaced or copied a converted module; nothing is folded.
        """
        self.check_open("session.merge")
        lacking = [conversion for conversion in self.conversions if not conversion.can_merge]
        if lacking:
            raise UnsupportedError(
                "session.merge: methods must have a dense equivalent, got "
                f"{lacking[0].config.method}, which has none; keep the converted model with "
                "session.save(folder), or put the plain modules back without it with "
                "session.remove()"
            )
        self._close("session.merge", lambda conversion: conversion.merge())

    def _close(self, who: str, end: Callable[[Conversion], None]) -> None:
        refuse_not_ours(who, self.model, self.conversions, self._runtime)
        while self.conversions:
            end(self.conversions[-1])
            self.conversions.pop()
            self._names.pop()
        self._first.remove()
        self._runtime.remove_hooks()
        if self._saving is not None:
            self._saving.lift()
        if getattr(self.model, "_leantune_session", None) is self:
            del self.model._leantune_session
        _sessions.discard(self)

    def check_open(self, who: str) -> None:
        """Raise where the session has ended.

        Args:
            who: what was called; the first words of the error.

        Raises:
            ConfigError: ``merge`` or ``remove`` has been called.
        """
        if not self.is_open:
            raise ConfigError(
                f"{who}: session must be open, got one after merge() or remove(); apply the recipe "
                "again, and use the new session"
            )

    def check_in_use(self) -> None:
        """Raise where a method has nothing to do, since its modules were frozen or copied.

        The first training forward calls this, unless it is compiled.

        Raises:
            SiteError: the weights of all its sites are frozen, or copies of them would train.
        """
        check_in_use(self.model, self.conversions, self._runtime)

    def _check_first_forward(self, model: nn.Module, args: Any) -> None:
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.check_in_use()
            # Calibration, which is exact, may come before others are done with the model.
            if not self._runtime.is_exact:
                self._first.remove()

    def allow_checkpoints(self, prefix: str) -> None:
        """Let the model's ``save_pretrained`` write a run's checkpoints, whatever the methods.

        Args:
            prefix: how their absolute paths begin. Whoever calls this sees to it that only a
                resumed run can read them.
        """
        if self._saving is not None:
            self._saving.checkpoints = prefix

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides weights and optimiser, as flat tensors."""
        self.check_open("session.state_dict")
        out = self._runtime.state_dict()
        for name, conversion in zip(self._names, self.conversions, strict=True):
            out.update({f"{name}/{k}": v for k, v in conversion.state_dict().items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back, so that the run goes on as if it had never stopped; all or nothing.

        Raises:
            ConfigError: the state belongs to another recipe, or is damaged.
        """
        self.check_open("session.load_state_dict")
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            self._load(state)
        except BaseException:
            self._load(before)
            raise

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self._runtime.load_state_dict(state)
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
        for conversion, part in zip(self.conversions, parts.values(), strict=True):
            conversion.load_state_dict(part)

    def save(self, folder: str | Path) -> None:
        """Write recipe, trained weights and session state to ``folder``, all or nothing.

        Raises:
            ConfigError: no path, or a predicate in ``sites``, which no file can hold.
            UnsupportedError: parameters are sharded.
            OSError: the disk is full; what was there before survives.
        """
        self.check_open("session.save")
        recipe = Recipe(methods=self.methods, seed=self.seed)
        path = as_folder("session.save", folder)
        write_session(path, recipe.to_dict(), self.model, self.state_dict)


_sessions: WeakSet[Session] = WeakSet()


def sessions_around(model: nn.Module) -> list[Session]:
    """Return the open sessions of a model, of one inside it, and of one that it is inside."""
    inside = {id(module) for module in model.modules()}
    return [
        session
        for session in _sessions
        if session.is_open
        and (id(session.model) in inside or any(m is model for m in session.model.modules()))
    ]
