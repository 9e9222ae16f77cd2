"""The Trainer callback that carries a session through a run, and the batches it calibrates on."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from leantune.core.conversion import SAMPLE_ID
from leantune.core.disk import load_tensors, read_json, save_tensors, write_atomic
from leantune.core.files import trained_weights
from leantune.core.ownership import refuse_idle
from leantune.core.saving import allow_checkpoints, writes_plain
from leantune.core.session import Session, check_open
from leantune.errors import ConfigError, UnsupportedError
from leantune.measure.running import RunningFidelity
from leantune.ops.backend import on_gpu

SESSION_FILE = "leantune_session.safetensors"
_FIDELITY = "fidelity"
ADAPTER_CONFIG = "adapter_config.json"


class TrainerCallback(transformers.TrainerCallback):
    """Carry a session through an unmodified ``transformers.Trainer``.

    A run that was stopped at any step and resumed ends with the weights of an uninterrupted one, to
    the bit: the session's state lies in each checkpoint as ``leantune_session.safetensors``. An
    optimiser step counts as one step; each micro-batch is a forward and draws by itself. Auxiliary
    losses are added to the loss that the model returns, or that TRL's ``SFTTrainer`` makes of what
    it returns; under its ``DPOTrainer`` their gradient is, and the logged loss is without them.

    Methods that ask for calibration see a few batches, evenly spread over the training set, before
    step 1; a resumed run takes what they found from the checkpoint.

    Args:
        session: of the model that is trained, or of one inside it.
        resume_from: the checkpoint folder that ``train(resume_from_checkpoint=...)`` is given,
            where it lies outside ``args.output_dir``.
        fidelity_steps: steps in which every sampled site's gradient is once compared with the
            exact one, some sites in each; the figures so far go to the trainer's ``log_history`` as
            often. None compares nothing.
        on_bad_site: what happens to a site whose gradient is biased beyond chance (once in a
            million trainings), or has a relative variance above 100: "warn" says so once, "exact"
            also lets it keep every row from then on, in a resumed run too.

    Raises:
        ConfigError: the session is closed or of another model; a checkpoint has no session file,
            or a damaged one; the trainer drops a column that a method needs.
        UnsupportedError: several GPUs in one process, sparse gradients, or an auxiliary loss that
            does not reach the loss that is trained on.
    """

    def __init__(
        self,
        session: Session,
        resume_from: str | Path | None = None,
        *,
        fidelity_steps: int | None = None,
        on_bad_site: Literal["warn", "exact"] = "warn",
    ) -> None:
        if not isinstance(session, Session):
            raise ConfigError(
                f"TrainerCallback: session must be what leantune.apply returned, got {session!r}; "
                "call session = leantune.apply(model, ...)"
            )
        check_open(session, "TrainerCallback")
        is_count = fidelity_steps is None or fidelity_steps >= 1
        if not is_count or on_bad_site not in ("warn", "exact"):
            raise ConfigError(
                "TrainerCallback: fidelity_steps must be at least 1 and on_bad_site 'warn' or "
                f"'exact', got {fidelity_steps!r} and {on_bad_site!r}; correct them"
            )
        self._fidelity_steps, self._on_bad_site = fidelity_steps, on_bad_site
        self._fidelity: RunningFidelity | None = None
        self.session = session
        self.resume_from = resume_from
        self._hook: Any = None
        self._num_micro_batches = 1
        self._is_loss_unused = False
        self._is_summed = self._is_dpo = False

    # The trainer passes much more by keyword; what is not named here is not needed.
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, model)
        if self._fidelity is not None:
            self._fidelity.end_step()  # which an exception may have kept from coming
        if every := self._fidelity_steps:
            self._fidelity = RunningFidelity(self.session.model, every, state.max_steps)
        if state.global_step > 0:
            self._restore(args, state)
        elif self.resume_from is not None:
            raise ConfigError(
                "TrainerCallback: resume_from must be left out where training starts at step 0, "
                f"got {str(self.resume_from)!r}; give the same folder to "
                "trainer.train(resume_from_checkpoint=...)"
            )
        else:
            self._calibrate(args, train_dataloader)
        assert args.output_dir is not None
        allow_checkpoints(self.session.model, str(_checkpoint(args.output_dir, "").resolve()))
        self._drop_hook()
        kinds = {kind.__name__ for kind in type(args).__mro__}
        # How float16 scales a loss, the term cannot know.
        self._is_dpo = "DPOConfig" in kinds and not args.fp16
        self._is_summed = "SFTConfig" in kinds and getattr(args, "loss_type", "nll") == "nll"
        self._hook = self.session.model.register_forward_hook(self._add_loss, with_kwargs=True)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._fidelity is not None:
            self._fidelity.begin_step(state.global_step)
        self._num_micro_batches = args.gradient_accumulation_steps
        if train_dataloader is not None and has_length(train_dataloader):
            num_batches = len(train_dataloader)
            num_steps = math.ceil(num_batches / args.gradient_accumulation_steps)
            rest = num_batches % args.gradient_accumulation_steps
            if rest and state.global_step % num_steps == num_steps - 1:
                self._num_micro_batches = rest

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._check_loss_was_used()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_loss_was_used()
        self.session.on_step()
        if self._fidelity is not None:
            self._fidelity.end_step()
            if state.global_step % (self._fidelity_steps or 1) == 0:
                self._judge(self._fidelity, state)

    def _judge(self, fidelity: RunningFidelity, state: TrainerState) -> None:
        for name, why in fidelity.judge().items():
            then = "; it is exact from now on" if self._on_bad_site == "exact" else ""
            warnings.warn(f"{name}: gradient looks bad, {why}{then}", RuntimeWarning, stacklevel=2)
        if self._on_bad_site == "exact":
            fidelity.make_exact()
        if figures := fidelity.figures():
            entry: Any = {"step": state.global_step, "fidelity": figures}
            state.log_history.append(entry)

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
        own = {} if self._fidelity is None else {_FIDELITY: self._fidelity.sums.cpu()}
        save_tensors(folder / _file_name(args), self.session.state_dict() | own)
        # Of an adapter that transformers injected the trainer saves a file that it cannot resume
        # from; it loads what it finds under this name.
        if getattr(model, "_hf_peft_config_loaded", False):
            assert model is not None
            weights = trained_weights(model)
            if state.is_world_process_zero:
                save_tensors(folder / SAFE_WEIGHTS_NAME, weights)
        if args.should_save and not writes_plain(self.session.conversions):
            _let_no_plain_model_load(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._drop_hook()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The trainer has put back its weights, to which another state of the session belongs.
            self._load(args, Path(state.best_model_checkpoint))

    def _check(self, args: TrainingArguments, model: nn.Module | None) -> None:
        check_open(self.session, "TrainerCallback")
        refuse_idle(self.session.conversions)
        own = self.session.model
        if model is not None and all(module is not own for module in model.modules()):
            raise ConfigError(
                "TrainerCallback: model must be the session's, got another "
                f"{type(model).__name__}; give the trainer session.model"
            )
        num_sparse = sum(len(c.sparse_parameters) for c in self.session.conversions)
        if num_sparse:
            raise UnsupportedError(
                "TrainerCallback: gradients must be dense, since a Trainer takes their norm at "
                f"each step, got {num_sparse} parameters without; choose a method option whose "
                "gradients are dense, or train in a loop of your own with "
                "session.optimizer(torch.optim.AdamW, lr=...)"
            )
        if args.remove_unused_columns and any(c.needs_sample_ids for c in self.session.conversions):
            raise ConfigError(
                "TrainerCallback: remove_unused_columns must be False where a method needs "
                f"{SAMPLE_ID}, got True, which drops that column; give "
                "TrainingArguments(remove_unused_columns=False) and a data set with the column, "
                f"dataset.add_column({SAMPLE_ID!r}, range(len(dataset)))"
            )
        if args.n_gpu > 1:
            raise UnsupportedError(
                f"TrainerCallback: n_gpu must be 1 in each process, got {args.n_gpu}, which "
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
        self._load(args, folder)

    def _load(self, args: TrainingArguments, folder: Path) -> None:
        path = folder / _file_name(args)
        if not path.is_file():
            raise ConfigError(
                f"TrainerCallback: checkpoint must hold {path.name}, got no such file in {folder}; "
                "resume from an earlier checkpoint, or name the folder with "
                "TrainerCallback(session, resume_from=...)"
            )
        tensors = load_tensors(path)
        self.session.load_state_dict(tensors)
        if self._fidelity is not None and _FIDELITY in tensors:
            self._fidelity.sums.copy_(tensors[_FIDELITY])
            if self._on_bad_site == "exact":
                self._fidelity.make_exact()

    def _calibrate(self, args: TrainingArguments, loader: Any) -> None:
        num = max((c.num_calibration_batches for c in self.session.conversions), default=0)
        if loader is None or not num:
            return
        # Neither the order of the samples nor dropout may depend on calibration.
        devices = [args.device] if on_gpu(args.device) else []
        with torch.random.fork_rng(devices=devices):
            self.session.calibrate(calibration_batches(loader, args, num))

    def _add_loss(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        extra = self.session.auxiliary_loss()
        if not extra.requires_grad:
            return None
        if self._is_dpo:
            name = "log_probs" if kwargs.get("fused_lm_head") else "logits"
            # The trainer divides its loss by the micro-batches, whatever it makes of these.
            self._expect_gradient(extra)
            output[name] = _WithLoss.apply(output[name], extra / self._num_micro_batches)
            return output
        if kwargs.get("fused_lm_head"):
            return self._add_to_log_probs(extra, output)
        loss = output.get("loss") if isinstance(output, Mapping) else output[0]
        if not (isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad):
            raise _unused_loss(self.session)
        if kwargs.get("num_items_in_batch") is not None:
            # Such a loss is already this micro-batch's share of the step's.
            extra = extra / self._num_micro_batches
        self._expect_gradient(extra)
        total = loss + extra.to(loss)
        if isinstance(output, dict):
            output["loss"] = total
            return output
        return (total, *output[1:])

    def _add_to_log_probs(self, extra: Tensor, output: Any) -> Any:
        """Hand the term to TRL's SFTTrainer, which sums log-probabilities to a loss of its own.

        It divides them by the tokens of the step, or of the micro-batch: spread over the
        micro-batch's, the term counts by the share that these have in the step.
        """
        if not self._is_summed:
            raise _unused_loss(self.session)
        self._expect_gradient(extra)
        scores = output["log_probs"]
        output["log_probs"] = (
            scores - extra.to(scores) * output["label_mask"].sum() / scores.numel()
        )
        return output

    def _expect_gradient(self, extra: Tensor) -> None:
        extra.register_hook(self._see_gradient)
        self._is_loss_unused = True

    def _see_gradient(self, grad: Tensor) -> None:
        self._is_loss_unused = False

    def _check_loss_was_used(self) -> None:
        if self._is_loss_unused:
            raise _unused_loss(self.session)

    def _drop_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class _WithLoss(torch.autograd.Function):
    """Tensors that a loss is made of bring a further term's gradient along."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, term: Tensor) -> Tensor:
        ctx.like = term.detach()
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor):  # type: ignore[override]
        return grad_output, torch.ones_like(ctx.like)


def _unused_loss(session: Session) -> UnsupportedError:
    names = ", ".join(config.method for config in session.methods)
    return UnsupportedError(
        "TrainerCallback: loss must be the one that the model returns, since an auxiliary loss of "
        f"{names} is added to it, got a trainer that computes its own; leave out "
        "label_smoothing_factor, compute_loss_func, loss_type and under DPOTrainer fp16, or add "
        "session.auxiliary_loss() there"
    )


def _checkpoint(output_dir: str | Path, step: int | str) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _let_no_plain_model_load(folder: Path) -> None:
    """Make of a checkpoint one that a resumed run reads, and nobody else: it needs the session."""
    (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    config = folder / CONFIG_NAME
    if config.is_file():
        # A resumed run does not read this; a model that is built from it says what it lacks.
        needs = {"attn_implementation": "leantune_session"}
        write_atomic(config, json.dumps(read_json(config) | needs, indent=2) + "\n")


def _file_name(args: TrainingArguments) -> str:
    # Each process has met other samples, so each keeps a state of its own.
    if args.world_size <= 1:
        return SESSION_FILE
    stem, _, suffix = SESSION_FILE.rpartition(".")
    return f"{stem}_{args.process_index}.{suffix}"


def calibration_batches(loader: Any, args: TrainingArguments, num_batches: int) -> Iterator[Any]:
    """Yield the batches that a run calibrates on: the same ones whenever it is asked.

    Their rows are evenly spread over the data set, as far as its length is known.
    """
    dataset: Any = loader.dataset
    size = args.per_device_train_batch_size
    rows: Any = None
    if has_length(dataset):
        wanted = min(len(dataset), size * num_batches)
        rows = [i * len(dataset) // wanted for i in range(wanted)]
    batches = DataLoader(loader.dataset, size, sampler=rows, collate_fn=loader.collate_fn)
    return (send_to_device(batch, args.device) for batch in islice(batches, num_batches))
