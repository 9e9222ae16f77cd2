"""What a run says while it works: a bar where there is a screen, else plain lines."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from leantune.core.distributed import is_first_process

# Timings, and what TRL says of the training rather than of the model.
_NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_NO_SCORES += ("num_tokens", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


def say(text: str) -> None:
    """Print a line on stderr at once; of several processes the first one alone does."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def has_screen() -> bool:
    """Return whether stderr can show a bar that moves."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def scores(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among what an evaluation of a trainer logs, without their prefix."""
    found = {name.removeprefix("eval_"): entry[name] for name in entry if name[:5] == "eval_"}
    return {name: float(value) for name, value in found.items() if name not in _NO_SCORES}


class ProgressLines(transformers.TrainerCallback):
    """Say where a training is, in lines that a log file keeps as they are.

    Args:
        name: of the variant that trains; every line begins with it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    # The trainer passes much more by keyword; what is not named here is not needed.
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(state, "training starts" if not state.global_step else "training goes on")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._say(state, f"loss {float(logs['loss']):.4f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        found = [f"{name} {value:.4f}" for name, value in scores(metrics).items()]
        self._say(state, f"evaluation: {', '.join(found)}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._say(state, f"checkpoint {folder}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say(state, "training ends")

    def _say(self, state: Any, what: str) -> None:
        say(f"{self.name}: step {state.global_step}/{state.max_steps}: {what}")
