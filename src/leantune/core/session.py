"""One converted model's run state: draw number, seed, batch facts, method state, changes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from leantune.core import registry
from leantune.core.batch import Batch
from leantune.core.config import MethodConfig
from leantune.core.generators import seeded_generators
from leantune.core.optim import paired, refuse_dense
from leantune.core.ranks import rank
from leantune.core.registry import Change
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.stores import Draw


class MethodState(Protocol):
    """Tensors that a method carries from step to step and that a resumed run needs."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that later steps depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back; a wrong shape or a non-finite value is an error."""
        ...


class Session:
    """A converted model's state and its undo list; made by :func:`leantune.apply`.

    The draw number counts the training forwards of the model, so a plain loop needs no call and
    every micro-batch draws anew; a block recomputed in backward sees the number again.

    Attributes:
        model: the converted model (the same object that was given).
        methods: the recipe.
        seed: together with the site and the draw number it fixes every random choice.
        step: optimiser steps so far, where a trainer callback or ``on_step`` counts them.
        num_samples: size of the training set, which bounds ``sample_id``; None if unknown.
        watched_optimizer: the one that steps the parameters, where the session has met it.
        sparse_parameters: those with sparse gradients -> whether an optimiser should correct the
            bias of each entry by itself.
        loss_scale: () tensor or number that multiplies the loss, as mixed precision does; read
            from the gradient of the model's own loss where it returns one.
    """

    def __init__(self, model: nn.Module, methods: tuple[MethodConfig, ...], seed: int) -> None:
        self.model = model
        self.methods = methods
        self.seed = seed
        self.step = 0
        self.num_samples: int | None = None
        self.loss_scale: Tensor | float = 1.0
        self.batch = Batch()
        self.changes: list[Change] = []
        self.is_sampling = True
        self.wants_loss_scale = False
        self.watched_optimizer: torch.optim.Optimizer | None = None
        self.sparse_parameters: dict[nn.Parameter, bool] = {}
        self._states: dict[str, MethodState] = {}
        self._forward_begins: list[Callable[[], None]] = []
        self._forward_ends: list[Callable[[], None]] = []
        self._auxiliary: list[Tensor] = []
        self._in_forward = False
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._draw = torch.zeros((), dtype=torch.int64, device=device)
        self._needs_ids = any(registry.get(m.method).needs_sample_ids(m) for m in methods)
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model has no optimiser, and does not carry the state of another's.
        return {**self.__dict__, "watched_optimizer": None}

    # -- the model's forward ---------------------------------------------------------------

    def watch(self) -> None:
        """Hook the model's forward; :func:`leantune.apply` calls this once."""
        self._handles = [
            self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward),
        ]

    def _begin_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        sample_ids = kwargs.get("sample_id")
        if "sample_id" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "sample_id"}
        self._in_forward = False
        if model.training and torch.is_grad_enabled():
            _refuse_empty((*args, *kwargs.values()))
            # Out of place: a graph that is still to run backward keeps its own number.
            self._draw = self._draw + 1
            first = next(model.parameters(), self._draw)
            if self._draw.device != first.device:  # the model has moved since
                self._draw = self._draw.to(first.device)
            self._auxiliary.clear()
            if self._needs_ids and self.is_sampling:
                self._check_ids(sample_ids)
            self.batch = Batch.of(kwargs, sample_ids)
            self._in_forward = True
        for begin in self._forward_begins:
            begin()
        return args, kwargs

    def _end_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False
        for end in self._forward_ends:
            end()
        if self.wants_loss_scale and model.training and torch.is_grad_enabled():
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
                loss.register_hook(self._see_loss_scale)

    def _see_loss_scale(self, grad: Tensor) -> None:
        self.loss_scale = grad.detach()

    def _check_ids(self, ids: Any) -> None:
        who = "session"
        if not isinstance(ids, Tensor):
            raise ConfigError(
                f"{who}: sample_id must be in every training batch for gradient norms kept per "
                f"sample, got {ids!r}; wrap the data set in leantune.with_sample_ids(dataset), and "
                "give TrainingArguments remove_unused_columns=False"
            )
        if ids.numel() == 0:
            raise ConfigError(f"{who}: sample_id must not be empty, got a batch of no samples")
        flat = ids.flatten()
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or (self.num_samples is not None and high >= self.num_samples):
            bad = low if low < 0 else high
            top = "" if self.num_samples is None else f" and below {self.num_samples}"
            raise ConfigError(
                f"{who}: sample_id must be at least 0{top}, got {bad}; number the training set "
                "with leantune.with_sample_ids(dataset)"
            )
        if flat.unique().numel() != flat.numel():
            repeated = next(int(i) for i in flat if int((flat == i).sum()) > 1)
            raise ConfigError(
                f"{who}: sample_id must be distinct within a batch, got {repeated} more than once; "
                "drop the repeats, or choose another source of gradient norms"
            )

    # -- what methods ask for --------------------------------------------------------------

    def draw_for(self, weight: Tensor) -> Draw | None:
        """Return the current draw for a linear, or None where the plain linear should run."""
        if not (self.is_sampling and weight.requires_grad and torch.is_grad_enabled()):
            return None
        return self.current_draw(weight.device)

    def current_draw(self, device: torch.device) -> Draw:
        """Return the draw of the last training forward, its number on ``device``."""
        number = self._draw if self._draw.device == device else self._draw.to(device)
        # Ranks see different rows, so they draw different numbers.
        return Draw(self.seed + (rank() << 32), number)

    def keep_state(self, name: str, state: MethodState) -> None:
        """Let a method's state travel with the session's checkpoints."""
        assert name not in self._states, name
        self._states[name] = state

    def at_forward_begin(self, call: Callable[[], None]) -> None:
        """Call ``call`` before every forward of the model, whatever its mode (to bring weights up
        to date with what the optimiser has done)."""
        self._forward_begins.append(call)

    def at_forward_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` after every forward of the model (to drop what the forward shared)."""
        self._forward_ends.append(call)

    def add_auxiliary_loss(self, loss: Tensor) -> None:
        """Hand over one term of the current training forward's auxiliary loss, a () tensor.

        A block that checkpointing recomputes in backward hands its term over again: outside the
        model's forward the call does nothing, so that each term counts once.

        Raises:
            UnsupportedError: the term can have no gradient, since reentrant checkpointing runs
                the block without a graph at first.
        """
        if not self._in_forward:
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
        """Return the sum of the auxiliary losses of the last training forward, a () tensor.

        Zero where no method has one. Add it to the task's loss before ``backward``; the trainer
        callback does so by itself.
        """
        if not self._auxiliary:
            return torch.zeros((), device=self._draw.device)
        return cast(Tensor, sum(self._auxiliary))

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Run the plain computation inside: nothing sampled, exact gradients."""
        before, self.is_sampling = self.is_sampling, False
        try:
            yield
        finally:
            self.is_sampling = before

    # -- the life of a run -----------------------------------------------------------------

    @property
    def draw(self) -> int:
        """The number of training forwards so far."""
        return int(self._draw)

    def on_step(self) -> None:
        """Count one optimiser step and let methods act on it; the trainer callback calls this."""
        self.step += 1
        for config in self.methods:
            hook = registry.get(config.method).on_step
            if hook is not None:
                hook(self, self.step)

    @property
    def needs_sample_ids(self) -> bool:
        """Whether training batches must carry ``sample_id``."""
        return self._needs_ids

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Show the methods that ask for it some batches; the others ignore them.

        Dropout draws from generators seeded by ``seed`` meanwhile; the caller's do not move. Of
        several processes all must call this, with as many batches of their own or the same ones.

        Args:
            batches: of the form that the model is called with (``model(**batch)``).
        """
        hooks = [registry.get(m.method).calibrate for m in self.methods]
        wanted = [h for h in hooks if h is not None]
        if not wanted:
            return
        with seeded_generators(self.model, self.seed):
            kept = list(batches) if len(wanted) > 1 else batches
            for hook in wanted:
                hook(self, kept)

    def optimizer(
        self, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
    ) -> torch.optim.Optimizer:
        """Return ``kind`` over the parameters that train, and watch it.

        Where a method gives some of them sparse gradients, a sparse Adam steps those beside it; the
        two act as one optimiser.

        Args:
            kind: any torch optimiser class.
            options: passed on (``lr=1e-4``).
        """
        params = [p for p in self.model.parameters() if p.requires_grad]
        if not params:
            raise ConfigError(
                "session.optimizer: the model must have a trainable parameter, got none; set "
                "requires_grad on what should train"
            )
        optimizer = paired(kind, params, self.sparse_parameters, options)
        self.watch_optimizer(optimizer)
        return optimizer

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell methods which optimiser steps the parameters, if it was not made by the session.

        A method that exchanges what it trains reads the moments there and moves them along. The
        trainer callback calls this by itself.

        Raises:
            ConfigError: the optimiser cannot take the sparse gradients that a method gives.
        """
        refuse_dense(optimizer, self.sparse_parameters)
        self.watched_optimizer = optimizer

    def trainer_callback(self, resume_from: str | Path | None = None):
        """Return the ``transformers.TrainerCallback`` that carries this session through a run.

        It saves and restores the session with the trainer's checkpoints, counts steps, tells the
        session the size of the training set and runs calibration where a method asks for it.

        Args:
            resume_from: the folder given to ``train(resume_from_checkpoint=...)``, where it lies
                outside the trainer's ``output_dir``.
        """
        # The one arrow that points upwards, late, so that core runs without transformers.
        from leantune.integrations.trainer import TrainerCallback

        return TrainerCallback(self, resume_from)

    def remove(self) -> None:
        """Put the original module objects back; weights stay as they are now."""
        self._close(lambda change: change.undo())

    @property
    def can_merge(self) -> bool:
        """Whether plain modules can compute what every method here computes."""
        return all(registry.get(m.method).merges(m) for m in self.methods)

    def merge(self) -> None:
        """Fold what was trained into plain modules, so that ``save_pretrained`` works as ever.

        Raises:
            UnsupportedError: plain modules cannot compute what a method here computes; nothing
                is folded.
        """
        lacking = [m for m in self.methods if not registry.get(m.method).merges(m)]
        if lacking:
            raise UnsupportedError(
                f"session.merge: methods must have a dense equivalent, got {lacking[0]}, which has "
                "none; keep the converted model with session.save(folder), or put the plain "
                "modules back without it with session.remove()"
            )
        self._close(lambda change: change.merge())

    def _close(self, end: Callable[[Change], None]) -> None:
        while self.changes:
            end(self.changes[-1])
            self.changes.pop()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self.model, "_leantune_session", None) is self:
            del self.model._leantune_session

    # -- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs besides weights and optimiser, as flat tensors."""
        out = {
            "draw": self._draw.cpu(),
            "step": torch.tensor(self.step),
            "seed": torch.tensor(self.seed),
        }
        for name, state in self._states.items():
            out.update({f"{name}/{k}": v for k, v in state.state_dict().items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back, so that the run goes on as if it had never stopped.

        Raises:
            ConfigError: the state belongs to another recipe, or is damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._states}
        for key, value in state.items():
            name, slash, rest = key.rpartition("/")
            if slash:
                if name not in parts:
                    raise ConfigError(
                        f"session: state must belong to this recipe, got an entry {key!r} that no "
                        "method here keeps; apply the recipe that the state was saved with"
                    )
                parts[name][rest] = value
        missing = [k for k in ("draw", "step", "seed") if k not in state]
        if missing:
            raise ConfigError(
                f"session: state must hold draw, step and seed, got none for {missing[0]!r}; the "
                "file is not a leantune session or is damaged"
            )
        for name, part in parts.items():
            self._states[name].load_state_dict(part)
        self._draw = state["draw"].to(self._draw.device)
        self.step = int(state["step"])
        self.seed = int(state["seed"])

    def save(self, folder: str | Path) -> None:
        """Write recipe, trained weights and session state to ``folder``, all or nothing.

        Raises:
            ConfigError: a predicate in ``sites``, which no file can hold.
            UnsupportedError: parameters are sharded.
            OSError: the disk is full; what was there before survives.
        """
        from leantune.core.state import save_session

        save_session(self, Path(folder))


def _refuse_empty(inputs: Iterable[Any]) -> None:
    first = next((v for v in inputs if isinstance(v, Tensor) and v.ndim > 0), None)
    if first is not None and first.numel() == 0:
        raise ConfigError(
            f"session: batch must hold at least one row, got an input of shape "
            f"{tuple(first.shape)}; leave empty batches out (drop_last, or a longer data set)"
        )
