"""From files or the hub to checked rows, and from rows to tokens, as ``datasets`` all along."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from leantune.errors import ConfigError, shown
from leantune.training.chat import check_chats, cut_chats, encode_chats
from leantune.training.preference import check_pairs, cut_pairs
from leantune.training.progress import say
from leantune.training.tables import (
    Columns,
    as_text,
    checked,
    column_of,
    read_columns,
    read_splits,
    without_columns,
)

VALIDATION_SHARE = 0.05
"""Of the rows, where the data come without a validation split."""
_PAIR = ("sentence1", "sentence2")
_SCORE = datasets.Value("float64")
# Of float32, in which a loss is computed.
_LARGEST_SCORE = 3.4e38


@dataclass(frozen=True)
class Task:
    """A task says what is read, what is predicted and how that is judged.

    Args:
        columns: each way in which files may name the one or two texts; the first that fits counts.
        label_names: of the classes in the order of their ids; None where train decides.
        metrics: the first one compares runs; larger is better, except for ``perplexity``.
    """

    name: str
    kind: Literal["classification", "regression", "causal_lm", "chat", "preference"] = (
        "classification"
    )
    columns: tuple[tuple[str, ...], ...] = (_PAIR, _PAIR[:1])
    label_names: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"

    @property
    def main_metric(self) -> str:
        """The metric that compares runs."""
        return self.metrics[0]

    @property
    def is_language_model(self) -> bool:
        """Whether tokens are predicted, from left to right."""
        return self.kind in ("causal_lm", "chat", "preference")


def _glue(name: str, labels: str, columns: str, *metrics: str, **options: Any) -> Task:
    hub = tuple(columns.split())
    names = tuple(labels.split())
    both = (_PAIR[: len(hub)], hub)
    return Task(name, "classification", both, names, metrics or ("accuracy",), **options)


_SCORES = ("pearson", "spearman")
_NLI = "entailment neutral contradiction"
_ENTAILS = "entailment not_entailment"
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", "unacceptable acceptable", "sentence", "matthews", "accuracy"),
        _glue("sst2", "negative positive", "sentence"),
        _glue("mrpc", "not_equivalent equivalent", "sentence1 sentence2", "f1", "accuracy"),
        _glue("qqp", "not_duplicate duplicate", "question1 question2", "f1", "accuracy"),
        Task("stsb", "regression", (_PAIR,), metrics=_SCORES),
        _glue("mnli", _NLI, "premise hypothesis", validation="validation_matched"),
        _glue("qnli", _ENTAILS, "question sentence"),
        _glue("rte", _ENTAILS, "sentence1 sentence2"),
        _glue("wnli", "not_entailment entailment", "sentence1 sentence2"),
        Task("text"),
        Task("regression", "regression", metrics=_SCORES),
        Task("causal_lm", "causal_lm", (("text",),), metrics=("perplexity",)),
        Task("chat", "chat", (), metrics=("perplexity",)),
        Task("preference", "preference", (), metrics=("rewards/accuracies",)),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ConfigError: no such task; the message lists the names.
    """
    if name not in TASKS:
        raise ConfigError(
            f"get_task: task must be one of {', '.join(TASKS)}, got {name!r}; for files of your "
            "own take 'text'"
        )
    return TASKS[name]


def load_task(
    name: str,
    source: str | Path,
    *,
    max_train: int | None = None,
    max_validation: int | None = None,
) -> datasets.DatasetDict:
    """Read and check both splits of a task.

    A subset is the head of one fixed shuffle, or of a text its first lines, so the smaller of two
    lies in the larger. It does not depend on a run's seed, so that seeds can be compared.

    Args:
        source: a folder of files, or one file, of which a share of rows becomes the validation
            split; ``"hub"`` for GLUE, or the name of a hub data set, with ``:config`` where it has
            several.

    Returns:
        ``train`` and ``validation`` with ``sentence1``, perhaps ``sentence2``, and ``label`` (a
        ``ClassLabel``, or a float64 score); for ``causal_lm`` with ``text``, a line in each row;
        for ``chat`` with ``messages``, or with ``prompt`` and ``completion``; for ``preference``
        with ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        ConfigError: a file is missing or damaged, or a column, a text or a label is not acceptable.
    """
    task = get_task(name)
    names: tuple[str, ...] | None = task.label_names
    found: dict[str, datasets.Dataset] = {}
    splits = {"train": "train", "validation": task.validation}
    # GLUE's validation splits are its own: scores on others cannot be compared.
    may_split = task.label_names is None
    for split, (columns, place) in read_splits(task.name, str(source), splits, may_split).items():
        if task.kind == "classification":
            names = names or _class_names(columns, place)
        found[split] = check_rows(task, columns, place, names)
    if "validation" not in found:
        found = _split(found["train"], str(source), task.kind == "causal_lm")
    limits = {"train": max_train, "validation": max_validation}
    return datasets.DatasetDict(
        {split: _subset(task, split, found[split], limit) for split, limit in limits.items()}
    )


def load_rows(task: Task, source: str, label_names: Sequence[str] | None) -> datasets.Dataset:
    """Read and check rows that a trained model is judged by.

    Args:
        source: a file, all of whose rows count, or a folder, ``"hub"`` or a hub data set with a
            validation split.
        label_names: of the model's classes; None where it has none.

    Raises:
        ConfigError: as ``load_task``, or a label is not among the model's.
    """
    path = Path(source).expanduser()
    if path.is_file():
        columns, place = read_columns(path), source
    else:
        splits = {"validation": task.validation}
        columns, place = read_splits(task.name, source, splits, may_split=False)["validation"]
    return check_rows(task, columns, place, label_names)


def check_rows(
    task: Task, columns: Columns, place: str, label_names: Sequence[str] | None
) -> datasets.Dataset:
    """Return a task's rows under the standard names.

    Args:
        place: that errors name.
        label_names: of the classes; None where there are none.

    Raises:
        ConfigError: a column is missing or a value not acceptable; names the first.
    """
    if task.kind == "causal_lm":
        if "text" not in columns:
            raise without_columns(place, "text for task causal_lm, messages for task chat", columns)
        texts = checked(columns, "text", place, "text", as_text)
        return datasets.Dataset.from_dict({"text": texts})
    if task.kind == "chat":
        return check_chats(columns, place)
    if task.kind == "preference":
        return check_pairs(columns, place)
    fitting = (found for found in task.columns if set(found) <= columns.keys())
    own = next(fitting, task.columns[-1])
    ids = {name: i for i, name in enumerate(label_names or ())}
    if task.label_names is not None:
        ids |= {str(i): i for i in ids.values()}
    rows: dict[str, list[Any]] = {}
    for name, column in zip(_PAIR, own, strict=False):
        rows[name] = checked(columns, column, place, "text", as_text)
    features: dict[str, Any] = {name: datasets.Value("string") for name in rows}
    rule = f"one of {', '.join(list(ids)[:20])}" if ids else "a finite number"
    read = (lambda value: ids.get(_class(value) or "")) if ids else _score
    rows["label"] = checked(columns, "label", place, rule, read)
    kinds = {type(value) for value in columns["label"]}
    if ids and len(kinds) > 1:
        raise ConfigError(
            f"load_task: {place}: column 'label' must hold values of one type, got "
            f"{' and '.join(sorted(kind.__name__ for kind in kinds))}; write all as text"
        )
    features["label"] = datasets.ClassLabel(names=list(label_names)) if label_names else _SCORE
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def _subset(
    task: Task, split: str, rows: datasets.Dataset, max_rows: int | None
) -> datasets.Dataset:
    """Return the head of one fixed shuffle, or of a text its first lines."""
    order = list(range(len(rows)))
    if task.kind != "causal_lm":
        random.Random(f"0/{split}").shuffle(order)
    return rows if max_rows is None or max_rows >= len(order) else rows.select(order[:max_rows])


def tokenize(
    data: datasets.DatasetDict, tokenizer: Any, max_length: int, *, packing: bool = False
) -> datasets.DatasetDict:
    """Turn both splits into token ids and labels, truncated but not padded.

    A text is cut into blocks of ``max_length`` without special tokens; its last, incomplete block
    is dropped. Of a chat the answers alone are labels.

    Args:
        packing: put rows side by side until ``max_length``; a row of a text is then a segment, with
            the end token behind it.

    Returns:
        What the tokenizer gives, and ``labels``: class ids, float32 scores, or the ``input_ids`` of
        a block or an answer (a causal model shifts them itself). Of a pair of answers the row as it
        is, with ``input_ids`` and without labels: TRL tokenises it.

    Raises:
        ConfigError: ``max_length`` does not fit the tokenizer, a text gives no block, or a chat's
            template is missing or refuses a row.
    """
    features = data["train"].features
    is_text, is_pair = "text" in features, "sentence2" in features
    is_chat = not is_text and "sentence1" not in features
    # One token of each text must remain beside the special ones; a block of one predicts nothing.
    shortest = (
        2 if is_text or is_chat else tokenizer.num_special_tokens_to_add(is_pair) + 1 + is_pair
    )
    # Tokenizers without a limit state a number near 1e30.
    if not shortest <= max_length <= tokenizer.model_max_length:
        raise ConfigError(
            f"tokenize: max_length must be from {shortest} to {tokenizer.model_max_length} (the "
            f"tokenizer's model_max_length), got {max_length}; choose a length within it"
        )

    if is_chat or packing:
        return _rows_or_packs(data, tokenizer, max_length, packing)

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        if is_text:
            return _blocks("\n".join(rows["text"]), tokenizer, max_length)
        texts = [rows[name] for name in _PAIR if name in rows]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        for ids, text in zip(encoded["input_ids"], texts[0], strict=True):
            if not ids:
                raise ConfigError(
                    f"tokenize: each text must have at least one token, got {shown(text)}; remove "
                    "the row, or take a tokenizer that adds tokens of its own"
                )
        return {**encoded, "labels": rows["label"]}

    size = None if is_text else 1000
    how: dict[str, Any] = {"batched": True, "batch_size": size, "load_from_cache_file": False}
    tokens = data.map(encode, remove_columns=list(features), **how)
    if features.get("label") == _SCORE:
        tokens = tokens.cast_column("labels", datasets.Value("float32"))
    return tokens


def _rows_or_packs(
    data: datasets.DatasetDict, tokenizer: Any, max_length: int, packing: bool
) -> datasets.DatasetDict:
    """Encode chats, or texts to be packed, row by row."""
    found = datasets.DatasetDict()
    for split, rows in data.items():
        if "chosen" in rows.features:
            found[split] = cut_pairs(str(split), rows, tokenizer, max_length)
            continue
        is_text = "text" in rows.features
        if is_text:
            cut = _segments(rows["text"], tokenizer)
        else:
            cut = cut_chats(str(split), [*encode_chats(rows, tokenizer)], max_length)
        found[split] = datasets.Dataset.from_dict(cut)
        if packing:
            from trl.data_utils import pack_dataset

            # Best fit decreasing; a text's longer rows are cut in parts, all of which are kept.
            how: Any = "bfd_split" if is_text else "bfd"
            found[split] = pack_dataset(found[split], max_length, how)
    return found


def check_ids(rows: datasets.DatasetDict, tokenizer: Any, model: Any) -> None:
    """Check that the model has an embedding for each token id of the rows.

    Raises:
        ConfigError: the tokenizer is another model's.
    """
    num_ids = model.get_input_embeddings().weight.shape[0]
    chunks = [c for split in rows.values() for c in split.data["input_ids"].chunks]
    largest = max(tokenizer.pad_token_id, *(c.flatten().to_numpy().max() for c in chunks))
    if largest >= num_ids:
        raise ConfigError(
            f"check_ids: token ids must be below {num_ids}, the model's embeddings, got {largest}; "
            "take the model's own tokenizer, or call model.resize_token_embeddings and save it"
        )


def _segments(texts: Iterable[str], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Return each text's tokens, which are its labels, too; blank texts are no segments."""
    full = [text for text in texts if text.strip()]
    if not full:
        raise ConfigError("tokenize: text must have a row that is not blank, got none; add one")
    ids = tokenizer(full, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ended = [[*row, *end] for row in ids]
    return {"input_ids": ended, "labels": ended}


def _blocks(text: str, tokenizer: Any, size: int) -> dict[str, list[list[int]]]:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < size:
        raise ConfigError(
            f"tokenize: text must have at least max_length = {size} tokens, got {len(tokens)}; "
            "use a longer text or shorter blocks"
        )
    blocks = [tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)]
    ones = [[1] * size for _ in blocks]
    return {"input_ids": blocks, "attention_mask": ones, "labels": blocks}


def _split(rows: datasets.Dataset, place: str, is_one_text: bool) -> dict[str, datasets.Dataset]:
    """Keep a share of the rows for validation: the end of a text, else rows of a fixed draw."""
    if len(rows) < 2:
        return {"train": rows, "validation": rows}
    share: dict[str, Any] = {"test_size": VALIDATION_SHARE, "shuffle": not is_one_text, "seed": 0}
    parts = rows.train_test_split(**share, keep_in_memory=True)
    how = "the last ones" if is_one_text else "drawn by a fixed seed"
    say(f"{place}: no validation split; {len(parts['test'])} of {len(rows)} rows become one, {how}")
    return {"train": parts["train"], "validation": parts["test"]}


def _class_names(columns: Columns, place: str) -> tuple[str, ...]:
    """Return the classes that occur in train, sorted."""
    found = {_class(v) for v in column_of(columns, "label", place)}
    names = tuple(sorted(name for name in found if name))
    if len(names) < 2:
        raise ConfigError(
            f"load_task: {place}: column 'label' must hold at least two classes, got {names}; use "
            "other data, or task 'regression' for scores"
        )
    return names


def _class(value: Any) -> str | None:
    """Return the name of a class; None for what names none."""
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, int) else as_text(value)


def _score(value: Any) -> float | None:
    """Return a number that float32 can hold; ``1_0`` and True are none."""
    if isinstance(value, bool) or "_" in str(value):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if abs(score) <= _LARGEST_SCORE else None
