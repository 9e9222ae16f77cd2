"""What decides a training run: its options, and how a file and a caller's options become them."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from leantune.core import registry
from leantune.core.config import MethodConfig, option
from leantune.core.recipe import RECIPE_FILE, Recipe, method_configs
from leantune.errors import ConfigError, shown
from leantune.planner.request import parse_budget
from leantune.training.parse import parse_json, parse_yaml

_MODELS = "a folder, a name on the hub, 'demo' or 'demo-llm'"
_TASKS = "a GLUE task, 'text', 'regression', 'causal_lm', 'chat' or 'preference'"
BASELINE = "baseline"
"""Names the plain model: in ``compare``, and among the variants of a run."""
ONLY_FOR = {"score_answers": ("chat",), "packing": ("causal_lm", "chat")}
"""The options that other tasks do not have."""
_MOST_CHARACTERS = 10**6
# Control characters, halves of characters, and what is longer than a file system allows.
_NO_NAME = re.compile(r"[\0-\x1f\ud800-\udfff]|[^/]{256}|.{4096}|\A\s*\Z", re.DOTALL)


def _count(default: int | None, *, help: str) -> Any:
    return option(default, ge=1, le=10**9, help=help)


@dataclass(frozen=True, kw_only=True)
class MeasureRecipe(Recipe):
    """A recipe says what one training step computes: model, batch and methods."""

    model: str = option("demo", help=_MODELS)
    task: str = option("text", help=_TASKS)
    data: str | None = option(None, help="a folder of files, a file, 'hub' or a hub name")
    batch_size: int = _count(32, help="samples in a training batch")
    max_length: int = option(128, ge=2, le=10**9, help="most tokens of a sample")
    precision: Literal["float32", "bf16", "fp16"] = option(
        "float32", help="dtype of the products, by autocast"
    )
    dtype: Literal["float32", "bf16"] = option(
        "float32", help="dtype of the weights, trained or not; LoRA's factors are in float32"
    )
    quantize: Literal["int8", "int4", "nf4"] | None = option(
        None,
        help="bits of the frozen weights beside LoRA: torchao's int8 or int4 (which also takes a "
        "byte each), or bitsandbytes' nf4",
    )
    freeze: tuple[str, ...] = option(
        (), help="not trained: glob patterns or 're:' regular expressions on modules or parameters"
    )
    trust_remote_code: bool = option(
        False, help="run the code that comes with a model or a tokenizer"
    )
    gradient_checkpointing: bool = option(
        False, help="recompute every block in backward, the baseline's too"
    )
    seed: int = option(0, ge=0, lt=2**32, help="of head, order, dropout and draws")

    own_rules: ClassVar[Mapping[str, str]] = {**Recipe.own_rules, "freeze": "list of patterns"}

    def __post_init__(self) -> None:
        given: Any = (self.freeze,) if isinstance(self.freeze, str) else self.freeze
        if not isinstance(given, list | tuple) or not all(isinstance(n, str) and n for n in given):
            raise ConfigError(
                f"{type(self).__name__}: freeze must be a list of patterns, got {shown(given)}; "
                "for example [embeddings, encoder.layer.0]"
            )
        object.__setattr__(self, "freeze", tuple(given))
        for name in ("model", "data", "output"):
            value = getattr(self, name, None)
            if isinstance(value, str | os.PathLike):
                object.__setattr__(self, name, os.path.expanduser(os.fspath(value)))
        super().__post_init__()
        for name in ("model", "data", "output"):
            value = getattr(self, name, None)
            if value is not None and (bad := _NO_NAME.search(value)):
                raise ConfigError(
                    f"{type(self).__name__}: {name} must be a path or a name, got {shown(value)} "
                    f"with {shown(bad[0])}; correct it"
                )


@dataclass(frozen=True, kw_only=True)
class RunRecipe(MeasureRecipe):
    """A run's recipe holds all that decides it: equal recipes end with equal weights.

    ``compare`` lists rival recipes that train with the same seed, data and steps. A rival is
    ``"baseline"`` (the plain model), a method, or a list of methods.

    Raises:
        ConfigError: an option is out of range, of the wrong type, or does not fit the others.
    """

    own_rules: ClassVar[Mapping[str, str]] = {
        **MeasureRecipe.own_rules,
        "compare": "list of rivals: 'baseline', a method, or a list of methods",
        "trainer": "mapping of transformers' names to values",
    }
    # They say how to start, not what to run.
    not_saved: ClassVar[tuple[str, ...]] = ("resume", "resume_from", "overwrite")

    model: str = option(dataclasses.MISSING, help=_MODELS)
    task: str = option(dataclasses.MISSING, help=_TASKS)
    data: str = option(dataclasses.MISSING, help="a folder of files, a file, 'hub' or a hub name")
    output: str = option(dataclasses.MISSING, help="the run folder to write")
    compare: tuple[tuple[MethodConfig, ...], ...] = option((), help="train these recipes as well")
    epochs: float = option(3.0, gt=0, le=10**9, help="passes over the training set")
    max_steps: int | None = _count(None, help="optimiser steps, instead of epochs")
    eval_batch_size: int = _count(64, help="samples in an evaluation batch")
    gradient_accumulation_steps: int = _count(1, help="batches in an optimiser step")
    learning_rate: float = option(5e-5, gt=0, help="peak learning rate of AdamW")
    weight_decay: float = option(0.0, ge=0, help="decoupled weight decay")
    warmup_ratio: float = option(0.06, ge=0, lt=1, help="share of the steps that warm up")
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", help="learning rate after the warm-up"
    )
    max_grad_norm: float = option(1.0, ge=0, help="clip the gradient's norm here; 0 is off")
    max_train: int | None = _count(None, help="train on a fixed subset of this size")
    max_validation: int | None = _count(None, help="judge by a fixed subset of this size")
    score_answers: bool = option(
        False, help="also judge by how often the right one of the answers is the likeliest"
    )
    eval_steps: int | None = _count(None, help="steps between evaluations; None: each epoch")
    save_steps: int | None = _count(None, help="steps between checkpoints; None: each epoch")
    early_stopping_patience: int | None = _count(
        None, help="end after as many evaluations without a better one, and keep the best weights"
    )
    packing: bool = option(False, help="short rows side by side, none of which sees another")
    trainer: Mapping[str, Any] = option(
        None,
        help="other arguments of transformers' trainer, or of TRL's, by their own names: optim, "
        "lr_scheduler_type, report_to, ...",
    )
    budget: str | None = option(
        None, help="memory that a step may take, such as 22GiB: the planner adds methods"
    )
    fidelity_steps: int | None = _count(
        None, help="steps in which each sampled gradient is once compared with the exact one"
    )
    on_bad_site: Literal["warn", "exact"] = option(
        "warn", help="what happens to a site that this shows to be biased or too noisy"
    )
    resume: bool = option(False, help="go on from the last whole checkpoint in the run folder")
    resume_from: str | None = option(None, help="go on from this one, such as 'checkpoint-60'")
    overwrite: bool = option(False, help="replace the run that is in the run folder")

    def __post_init__(self) -> None:
        rivals = self.compare if isinstance(self.compare, list | tuple) else [self.compare]
        object.__setattr__(self, "compare", tuple(_rival(rival) for rival in rivals))
        if self.resume_from is not None:
            object.__setattr__(self, "resume", True)
        object.__setattr__(self, "trainer", _plain_mapping(self.trainer))
        super().__post_init__()
        if self.budget is not None:
            parse_budget(self.budget, "RunRecipe")
        # What a plan makes of the methods is not known yet.
        recipes = [*self.compare, *([self.methods] if self.budget is None else [])]
        if any(recipe in recipes[:i] for i, recipe in enumerate(recipes)):
            raise ConfigError(
                "RunRecipe: compare must name recipes other than methods, each once, got "
                f"{[_name(r) for r in self.compare]} beside {_name(self.methods)}; leave it out"
            )
        for name, tasks in ONLY_FOR.items():
            if getattr(self, name) and self.task not in tasks:
                raise ConfigError(
                    f"RunRecipe: {name} must be False for task {self.task}, got True; it is for "
                    f"{' and '.join(tasks)}"
                )
        if self.early_stopping_patience and self.save_steps not in (None, self.eval_steps):
            raise ConfigError(
                "RunRecipe: save_steps must be as eval_steps where early_stopping_patience is set, "
                f"got {self.save_steps}; leave it out: each evaluation has its checkpoint"
            )
        if self.dtype == "bf16" and self.precision == "fp16":
            raise ConfigError(
                "RunRecipe: precision must be 'float32' or 'bf16' where dtype is 'bf16', got "
                "'fp16', whose loss scale takes no gradients in bfloat16; change one of them"
            )
        plain = [
            name
            for name, methods in self.variants().items()
            if not any(registry.get(method.method).suits_quantised for method in methods)
        ]
        if self.quantize and plain:
            raise ConfigError(
                f"RunRecipe: quantize must be None where the weights themselves train, got "
                f"{self.quantize!r} for {', '.join(plain)}; add lora to the methods, and to each "
                "of compare"
            )
        if self.budget and self.quantize:
            raise ConfigError(
                f"RunRecipe: budget must be None where quantize is given, got {self.budget!r}; the "
                "planner knows plain weights alone: see what --dry-run measures, and choose"
            )
        if self.resume and self.overwrite:
            raise ConfigError(
                "RunRecipe: overwrite must be False where resume is True, got True; the one keeps "
                "the run that is there, the other replaces it"
            )

    @classmethod
    def read(cls, recipe: Any, overrides: Mapping[str, Any]) -> Self:
        """Make a recipe of a file's path, a mapping or another recipe, and of options that win.

        Raises:
            ConfigError: the file cannot be read, or an option is not acceptable.
        """
        if isinstance(recipe, Recipe):
            how = {name: getattr(recipe, name) for name in cls.not_saved if hasattr(recipe, name)}
            recipe = recipe.to_dict() | how
        elif not isinstance(recipe, Mapping):
            recipe = read_recipe_file(Path(recipe))
        return cls.from_dict({**recipe, **overrides})

    def variants(self) -> dict[str, tuple[MethodConfig, ...]]:
        """Return name -> methods of everything that trains: rivals, the plain one first, then us.

        A name that is taken gets a number, so that each names a folder of its own.
        """
        names: dict[str, tuple[MethodConfig, ...]] = {}
        for methods in (self.methods, *sorted(self.compare, key=bool)):
            same = [name for name in names if name.partition("#")[0] == _name(methods)]
            names[_name(methods) + (f"#{len(same) + 1}" if same else "")] = methods
        own = _name(self.methods)
        return {name: names[name] for name in [*(n for n in names if n != own), own]}


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read a recipe file, YAML or JSON, without judging its options.

    Raises:
        ConfigError: the file is missing, not valid, or no mapping.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"recipe: file must exist, got {str(path)!r}, which is none; give a YAML file, or a "
            f"run's {RECIPE_FILE}"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"more than {_MOST_CHARACTERS:,} characters")
        data = parse_json(text) if path.suffix == ".json" else parse_yaml(text) or {}
    except OSError as error:
        raise ConfigError(
            f"recipe: file must exist, got {str(path)!r} ({error.strerror}); give a YAML file, or "
            f"a run's {RECIPE_FILE}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"recipe: {path} must be valid YAML or JSON, got {error}; correct the file"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"recipe: {path} must be a mapping of options, got {type(data).__name__}; write one "
            "'option: value' on each line"
        )
    return data


def _rival(rival: Any) -> tuple[MethodConfig, ...]:
    if rival == BASELINE:
        return ()
    return method_configs(rival if isinstance(rival, list | tuple) else [rival], "compare")


def _plain_mapping(given: Any) -> dict[str, Any]:
    """Return a mapping as its JSON form reads, so that a run equals the one in its file."""
    given = {} if given is None else given
    try:
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"got {shown(given)}")
        return json.loads(json.dumps(dict(given)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"RunRecipe: trainer must be a mapping of names to plain values, {error}; for example "
            "{optim: adafactor}"
        ) from error


def _name(methods: tuple[MethodConfig, ...]) -> str:
    return "+".join(method.method for method in methods) or BASELINE
