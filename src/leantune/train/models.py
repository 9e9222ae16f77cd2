"""From a name to a model with the task's head, and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.errors import ConfigError
from leantune.train.demo import demo_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from leantune.train.data import TaskData

DEMO_MODEL = "demo"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; one without a padding token pads with its end token.

    Args:
        name: a folder, a name on the hub, or ``"demo"``.

    Raises:
        ConfigError: there is none, or it cannot pad.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, name, "a tokenizer")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"load_tokenizer: tokenizer of {name!r} must have a padding or an end token, got "
                "neither; set tokenizer.pad_token and save it with tokenizer.save_pretrained"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, task_data: TaskData, *, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pre-trained model with the task's head, in float32 on the CPU, and its tokenizer.

    Args:
        name: a folder, a name on the hub, or ``"demo"``.
        task_data: what ``load_task`` returned; settles head, labels and problem type.
        seed: of the weights that are not in the file, such as a new head's; the caller's random
            streams do not move.

    Raises:
        ConfigError: no such model, a damaged one, or one that does not fit the task.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(name)
    options: dict[str, Any] = {"dtype": torch.float32}
    if task_data.task.kind == "causal_lm":
        kind = AutoModelForCausalLM
    else:
        kind = AutoModelForSequenceClassification
        options["num_labels"] = task_data.num_labels
        options["problem_type"] = "regression"
    if task_data.label_names is not None:
        options["problem_type"] = "single_label_classification"
        options["id2label"] = dict(enumerate(task_data.label_names))
        options["label2id"] = {label: i for i, label in enumerate(task_data.label_names)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _load(kind, name, f"a model for {task_data.task.kind}", **options)
    if task_data.task.kind == "causal_lm" and getattr(model.config, "is_decoder", None) is False:
        raise ConfigError(
            f"load_model: model must read from left to right for task causal_lm, got {name!r}, a "
            f"{type(model).__name__} that sees both sides; choose a decoder such as GPT-2 or LLaMA"
        )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load(kind: Any, name: str, what: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    folder = demo_model_path() if name == DEMO_MODEL else Path(name).expanduser()
    is_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path and not folder.is_dir():
        raise ConfigError(
            f"load_model: model must be a folder, a name on the hub or 'demo', got {name!r}, and "
            "there is no such folder; correct the path"
        )
    source = str(folder) if folder.is_dir() else name
    try:
        return kind.from_pretrained(source, **options)
    # What the library raises for a missing name, no network, an unknown architecture, weights of
    # other shapes, and damaged files.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ConfigError(
                f"load_model: model must have a head of this task's size, or none, got {name!r} "
                "with weights of other shapes; start from the encoder without a head"
            ) from error
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"load_model: model must hold what transformers can load as {what}, got {name!r} "
            f"({type(error).__name__}: {reason}); check the name, or without a network give a "
            "local folder, or 'demo'"
        ) from error
