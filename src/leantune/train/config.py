"""What decides a run: the options of ``leantune train``, and their JSON form."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from leantune.core.config import MethodConfig, Options, option
from leantune.core.registry import config_from_dict
from leantune.errors import ConfigError

FORMAT = 1
# How to start, not what to run: no part of a recipe.
_NOT_IN_RECIPE = ("resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Everything that decides a run; two runs of equal configs end with equal weights.

    Raises:
        ConfigError: an option is out of range, of the wrong type, or does not fit the others.
    """

    own_rules: ClassVar[Mapping[str, str]] = {"methods": "list of method configs"}

    model: str = option(dataclasses.MISSING, help="a folder, a name on the hub, or 'demo'")
    task: str = option(
        dataclasses.MISSING, help="a GLUE task, 'text', 'regression', 'causal_lm' or 'demo'"
    )
    data: str | None = option(
        None, help="folder of the task's files, or 'hub'; the demo brings its own"
    )
    output: str = option(dataclasses.MISSING, help="run folder to write")
    methods: tuple[MethodConfig, ...] = option((), help="the recipe; none trains exactly")
    compare: Literal["exact"] | None = option(
        None, help="also train the exact model with the same seed, data and steps"
    )
    epochs: float = option(3.0, gt=0, help="passes over the training set")
    max_steps: int | None = option(None, ge=1, help="optimiser steps, instead of epochs")
    batch_size: int = option(32, ge=1, help="samples in a training batch")
    eval_batch_size: int = option(64, ge=1, help="samples in an evaluation batch")
    gradient_accumulation_steps: int = option(1, ge=1, help="batches in an optimiser step")
    learning_rate: float = option(5e-5, gt=0, help="peak learning rate of AdamW")
    weight_decay: float = option(0.0, ge=0, help="decoupled weight decay")
    warmup_ratio: float = option(0.06, ge=0, lt=1, help="share of the steps that warm up")
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", help="learning rate after the warm-up"
    )
    max_grad_norm: float = option(1.0, ge=0, help="clip the gradient's norm here; 0 is off")
    max_length: int = option(128, ge=2, help="most tokens of a sample")
    precision: Literal["float32", "bf16", "fp16"] = option(
        "float32", help="dtype of the products; weights stay in float32"
    )
    gradient_checkpointing: bool = option(
        False, help="recompute every block in backward, the exact model's too"
    )
    max_train: int | None = option(None, ge=1, help="train on a fixed subset of this size")
    max_validation: int | None = option(None, ge=1, help="judge by a fixed subset of this size")
    seed: int = option(0, ge=0, lt=2**32, help="of head, order, dropout and draws")
    eval_steps: int | None = option(None, ge=1, help="steps between evaluations; None: each epoch")
    save_steps: int | None = option(None, ge=1, help="steps between checkpoints; None: each epoch")
    resume: bool = option(False, help="go on from the last checkpoint in the run folder")
    overwrite: bool = option(False, help="replace the run that is in the run folder")

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if isinstance(self.methods, Sequence):
            object.__setattr__(self, "methods", tuple(self.methods))
        if not isinstance(self.methods, tuple) or not all(
            isinstance(m, MethodConfig) for m in self.methods
        ):
            raise ConfigError(
                f"RunConfig: methods must be a list of method configs, got {self.methods!r}; for "
                "example [leantune.WTACRS(keep_ratio=0.3)]"
            )
        super().__post_init__()
        if self.task == "demo" and self.data is not None:
            raise ConfigError(
                f"RunConfig: data must be left out for task demo, got {self.data!r}; for data of "
                "your own take task text"
            )
        if self.task != "demo" and self.data is None:
            raise ConfigError(
                f"RunConfig: data must be a folder or 'hub' for task {self.task}, got None; only "
                "task demo brings its own"
            )
        if self.compare is not None and not self.methods:
            raise ConfigError(
                "RunConfig: compare must be None where methods is empty, got 'exact'; the run is "
                "the exact one already"
            )
        if self.resume and self.overwrite:
            raise ConfigError(
                "RunConfig: overwrite must be False where resume is True, got True; the one keeps "
                "the run that is there, the other replaces it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe's JSON form: every option but ``resume`` and ``overwrite``."""
        names = [spec.name for spec in dataclasses.fields(self) if spec.name not in _NOT_IN_RECIPE]
        out = {name: getattr(self, name) for name in names}
        return {"format": FORMAT, **out, "methods": [m.to_dict() for m in self.methods]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read :meth:`to_dict`'s form.

        Raises:
            ConfigError: from a newer version, an unknown or a missing option, or a bad value.
        """
        data = dict(data)
        version = data.pop("format", FORMAT)
        if not isinstance(version, int) or version > FORMAT:
            raise ConfigError(
                f"RunConfig: format must be at most {FORMAT}, got {version!r}; the recipe was "
                "written by a newer leantune: upgrade with pip install -U leantune"
            )
        cls.refuse_unknown(data)
        for spec in dataclasses.fields(cls):
            if spec.default is dataclasses.MISSING and spec.name not in data:
                raise ConfigError(
                    f"RunConfig: {spec.name} must be given, got none; {spec.metadata['help']}"
                )
        methods = data.pop("methods", ())
        if not isinstance(methods, Sequence) or isinstance(methods, str):
            raise ConfigError(f"RunConfig: methods must be a list of entries, got {methods!r}")
        return cls(**data, methods=tuple(config_from_dict(m) for m in methods))
