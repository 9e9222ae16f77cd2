"""The trainer callbacks that end a training: at a signal, and at a number that is none."""

import math
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from leantune.core.linear import has_entries
from leantune.errors import ConfigError
from leantune.training.interrupt import Interrupted, handled_by
from leantune.training.progress import scores


class StopOnInterrupt(TrainerCallback):
    """End training with a checkpoint at the next step where a signal asks; twice is at once.

    A context manager: inside, the first signal only sets a flag, so that no step and no file is
    left half done; on leaving, ``Interrupted`` is raised if it was set.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._handled = handled_by(self._ask)

    def __enter__(self) -> Self:
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: Any) -> None:
        self._handled.__exit__(None, None, None)
        if self._asked is not None and kind is None:
            raise Interrupted(self._asked)

    def _ask(self, number: int, *_: FrameType | None) -> None:
        if self._asked is not None:
            raise Interrupted(number)
        self._asked = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is not None:
            # The log in between keeps the losses since the last one, which no checkpoint holds.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked is not None and not state.epoch.is_integer():
            control.should_evaluate = control.should_save = False
        # An evaluation moves the random stream: this step's checkpoint has to come after it.
        elif control.should_evaluate:
            control.should_save = True


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
        self._first_bad: Tensor

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
    ) -> None:
        self._first_bad = torch.zeros((), dtype=torch.long, device=args.device)
        self._hook = model.register_forward_hook(self._note)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self._check(args, state, model)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        for name, value in scores(metrics).items():
            if not math.isfinite(value):
                raise _diverged(args, f"{name} on the validation split", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self._hook.remove()
        self._check(args, state, model)

    def _note(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if not module.training:
            return
        # TRL 1.0 makes the loss of pairs of logits alone.
        seen = output.logits.sum() if output.loss is None else output.loss
        is_good, first = seen.detach().isfinite(), self._first_bad
        self._first_bad = torch.where(is_good | (first > 0), first, self._step)

    def _check(self, args: Any, state: Any, model: Any) -> None:
        if self._first_bad > 0:
            raise _diverged(args, "the loss", int(self._first_bad))
        # Weights in few bits are whole numbers, and do not change.
        weights = (p.detach() for p in model.parameters() if has_entries(p))
        if not all(weight.isfinite().all() for weight in weights):
            raise _diverged(args, "a weight", state.global_step)


def _diverged(args: Any, what: str, step: int) -> ConfigError:
    return ConfigError(
        f"{args.run_name}: {what} must be finite, got NaN or infinity at step {step}; lower "
        "learning_rate or set max_grad_norm, and start anew: the last checkpoint before that step "
        "is kept, but would end the same way"
    )
