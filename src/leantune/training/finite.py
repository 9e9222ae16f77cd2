"""The trainer callback that ends a run at its first number that is none."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from leantune.errors import ConfigError
from leantune.training.progress import scores


class StopOnNonFinite(TrainerCallback):
    """End training before a weight or a result that is NaN or infinite is logged or written.

    Each step notes on the device whether its loss was finite; that note and the weights are read
    only where the trainer logs, evaluates or saves, so no other step waits for the device. Add it
    last: it must see what the other callbacks ask the trainer for.

    Raises:
        ConfigError: the loss or a weight is not finite; names the step.
    """

    def __init__(self) -> None:
        self._hook: Any = None
        self._step = 0
        self._first_bad: Tensor | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not _is_finite(model):
            raise ConfigError(
                f"{args.run_name}: weights must be finite at step {state.global_step}, got NaN or "
                "infinity in the checkpoint; remove it to resume from an earlier one"
            )
        self._hook = model.register_forward_hook(self._note)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self._check(args, state, model)

    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        for name, value in scores(metrics).items():
            if not math.isfinite(value):
                raise _diverged(args, f"{name} on the validation split", state.global_step)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._hook.remove()
        self._check(args, state, model)

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not module.training:
            return
        is_good = output.loss.detach().isfinite()
        before = (
            torch.zeros_like(is_good, dtype=torch.long)
            if self._first_bad is None
            else self._first_bad
        )
        self._first_bad = torch.where(is_good | (before > 0), before, self._step)

    def _check(self, args: Any, state: Any, model: Any) -> None:
        first = 0 if self._first_bad is None else int(self._first_bad)
        if first:
            raise _diverged(args, "the loss", first)
        if not _is_finite(model):
            raise _diverged(args, "a weight", state.global_step)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(p.detach().isfinite().all()) for p in model.parameters())


def _diverged(args: Any, what: str, step: int) -> ConfigError:
    return ConfigError(
        f"{args.run_name}: {what} must be finite, got NaN or infinity at step {step}; lower "
        "learning_rate or set max_grad_norm, and start anew: the last checkpoint before that step "
        "is kept, but would end the same way"
    )
