"""Trainer callbacks: a session carried through a run, a stop at the next step, a stopwatch."""

import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import SAFE_WEIGHTS_NAME

from leantune.core.session import Session
from leantune.core.state import load_tensors, save_tensors, trained_weights
from leantune.errors import ConfigError, UnsupportedError
from leantune.train.batches import calibration_batches, cuda_devices, num_calibration_batches
from leantune.train.sample_ids import SAMPLE_ID

SESSION_FILE = "leantune_session.safetensors"


class SessionCallback(TrainerCallback):
    """Carry a session through an unmodified ``transformers.Trainer``.

    A run that was stopped at any step and resumed ends with the weights of an uninterrupted one, to
    the bit: the session's state lies in each checkpoint as ``leantune_session.safetensors``. An
    optimiser step counts as one step; each micro-batch is a forward and draws by itself. Auxiliary
    losses are added to the loss that the model returns.

    Methods that ask for calibration see a few batches, evenly spread over the training set, before
    step 1; a resumed run takes what they found from the checkpoint.

    Args:
        session: of the model that is trained, or of one inside it.
        resume_from: the checkpoint folder that ``train(resume_from_checkpoint=...)`` is given,
            where it lies outside ``args.output_dir``.

    Raises:
        ConfigError: the session is closed or of another model; ``sample_id`` would be dropped; a
            checkpoint has no session file, or a damaged one.
        UnsupportedError: several GPUs in one process, sparse gradients, or an auxiliary loss that
            does not reach the loss that is trained on.
    """

    def __init__(self, session: Session, resume_from: str | Path | None = None) -> None:
        self.session = session
        self.resume_from = resume_from
        self._hook: Any = None
        self._num_micro_batches = 1
        self._is_loss_unused = False

    # The trainer passes much more by keyword; what is not named here is not needed.
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, model)
        if optimizer is not None:
            # Accelerate wraps the optimiser.
            self.session.watch_optimizer(getattr(optimizer, "optimizer", optimizer))
        dataset = getattr(train_dataloader, "dataset", None)
        self.session.num_samples = _count_samples(dataset)
        if state.global_step > 0:
            self._restore(args, state)
        elif self.resume_from is not None:
            raise ConfigError(
                "SessionCallback: resume_from must be left out where training starts at step 0, "
                f"got {str(self.resume_from)!r}; give the same folder to "
                "trainer.train(resume_from_checkpoint=...)"
            )
        else:
            self._calibrate(args, train_dataloader)
        self._drop_hook()
        self._hook = self.session.model.register_forward_hook(self._add_loss, with_kwargs=True)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._num_micro_batches = args.gradient_accumulation_steps
        if train_dataloader is not None and has_length(train_dataloader):
            num_batches = len(train_dataloader)
            num_steps = math.ceil(num_batches / args.gradient_accumulation_steps)
            rest = num_batches % args.gradient_accumulation_steps
            if rest and state.global_step % num_steps == num_steps - 1:
                self._num_micro_batches = rest

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._check_loss_was_used()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._check_loss_was_used()
        self.session.on_step()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert args.output_dir is not None
        folder = _checkpoint(args.output_dir, state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / _file_name(args), self.session.state_dict())
        # Of an adapter that transformers injected the trainer saves a file that it cannot resume
        # from; it loads what it finds under this name.
        if getattr(model, "_hf_peft_config_loaded", False):
            assert model is not None
            weights = trained_weights(model)
            if state.is_world_process_zero:
                save_tensors(folder / SAFE_WEIGHTS_NAME, weights)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._drop_hook()

    def _check(self, args: TrainingArguments, model: nn.Module | None) -> None:
        own = self.session.model
        if getattr(own, "_leantune_session", None) is not self.session:
            raise ConfigError(
                "SessionCallback: session must be open, got one after merge() or remove(); apply "
                "the recipe again and take the new session's trainer_callback()"
            )
        if model is not None and all(module is not own for module in model.modules()):
            raise ConfigError(
                "SessionCallback: model must be the session's, got another "
                f"{type(model).__name__}; give the trainer session.model"
            )
        if self.session.needs_sample_ids and args.remove_unused_columns:
            raise ConfigError(
                "SessionCallback: remove_unused_columns must be False where gradient norms are "
                "kept per sample, got True, which drops the field sample_id; give "
                "TrainingArguments remove_unused_columns=False and wrap the data set in "
                "leantune.with_sample_ids(dataset)"
            )
        if self.session.sparse_parameters:
            raise UnsupportedError(
                "SessionCallback: gradients must be dense, since a Trainer takes their norm at "
                f"each step, got {len(self.session.sparse_parameters)} parameters without; choose "
                " a method option whose gradients are dense, or train in a loop of your own "
                "with session.optimizer(torch.optim.AdamW, lr=...)"
            )
        if args.n_gpu > 1:
            raise UnsupportedError(
                f"SessionCallback: n_gpu must be 1 in each process, got {args.n_gpu}, which "
                "replicates the model at each step; start one process for each GPU with torchrun, "
                "or set CUDA_VISIBLE_DEVICES=0"
            )

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        given = self.resume_from or args.resume_from_checkpoint
        if isinstance(given, str | Path) and str(given).lower() not in ("true", "false"):
            folder = Path(given)
        else:
            assert args.output_dir is not None
            folder = _checkpoint(args.output_dir, state.global_step)
        path = folder / _file_name(args)
        if not path.is_file():
            raise ConfigError(
                f"SessionCallback: checkpoint must hold {path.name}, got no such file in {folder}; "
                "resume from an earlier checkpoint, or name the folder with "
                "session.trainer_callback(resume_from=...)"
            )
        self.session.load_state_dict(load_tensors(path))

    def _calibrate(self, args: TrainingArguments, loader: Any) -> None:
        num = num_calibration_batches(self.session)
        if loader is None or not num:
            return
        # Neither the order of the samples nor dropout may depend on calibration.
        with torch.random.fork_rng(devices=cuda_devices(args)):
            self.session.calibrate(calibration_batches(loader, args, num))

    def _add_loss(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        extra = self.session.auxiliary_loss()
        if not extra.requires_grad:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            raise _unused_loss(self.session)
        if kwargs.get("num_items_in_batch") is not None:
            # Such a loss is already this micro-batch's share of the step's.
            extra = extra / self._num_micro_batches
        extra.register_hook(self._see_gradient)
        self._is_loss_unused = True
        total = loss + extra.to(loss)
        if isinstance(output, dict):
            output["loss"] = total
            return output
        return (total, *output[1:])

    def _see_gradient(self, grad: Tensor) -> None:
        self._is_loss_unused = False

    def _check_loss_was_used(self) -> None:
        if self._is_loss_unused:
            raise _unused_loss(self.session)

    def _drop_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _unused_loss(session: Session) -> UnsupportedError:
    names = ", ".join(config.method for config in session.methods)
    return UnsupportedError(
        "SessionCallback: loss must be the one that the model returns, since an auxiliary loss of "
        f"{names} is added to it, got a trainer that computes its own; leave out "
        "label_smoothing_factor and compute_loss_func, or add session.auxiliary_loss() there"
    )


def _checkpoint(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _file_name(args: TrainingArguments) -> str:
    # Each process has met other samples, so each keeps a state of its own.
    if args.world_size <= 1:
        return SESSION_FILE
    stem, _, suffix = SESSION_FILE.rpartition(".")
    return f"{stem}_{args.process_index}.{suffix}"


def _count_samples(dataset: Any) -> int | None:
    """Return a bound on ``sample_id`` (the ids of a selection exceed its length), or None."""
    if isinstance(dataset, Subset):
        return _count_samples(dataset.dataset)
    if SAMPLE_ID in (getattr(dataset, "column_names", None) or ()):
        return max(dataset.with_format(None)[SAMPLE_ID], default=-1) + 1
    return len(dataset) if dataset is not None and has_length(dataset) else None


class StopOnInterrupt(TrainerCallback):
    """End training with a checkpoint at the next step where Ctrl-C is pressed; twice is at once.

    A context manager: inside, the main thread's SIGINT only sets a flag, so that no step and no
    file is left half done; on leaving, KeyboardInterrupt is raised if it was set.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._is_installed = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        # A handler that the application has put there itself keeps its say.
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._ask)
            self._is_installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._is_installed = False
        if self._is_asked and kind is None:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_asked:
            # The log in between keeps the losses since the last one, which no checkpoint holds.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert state.epoch is not None
        if self._is_asked and not state.epoch.is_integer():
            control.should_evaluate = control.should_save = False
        # An evaluation moves the random stream: this step's checkpoint has to come after it.
        elif control.should_evaluate:
            control.should_save = True


def kept_attributes(callback: TrainerCallback, state: TrainerState) -> Mapping[str, Any]:
    """Return what a resumed run's checkpoint keeps of a callback; {} where training starts."""
    kept: Any = state.stateful_callbacks
    entry = kept.get(type(callback).__name__) if isinstance(kept, dict) else None
    return entry["attributes"] if state.global_step > 0 and entry is not None else {}


class Stopwatch(TrainerCallback, ExportableState):
    """Sum up the seconds spent in optimiser steps, over all parts of a resumed run.

    Attributes:
        seconds: from the first micro-batch's forward to the end of the step, summed over steps.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds = float(kept_attributes(self, state).get("seconds", self.seconds))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._started
