"""Chats, and prompts with completions: from rows to tokens of which only the answers are labels."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets

from leantune.errors import ConfigError, shown
from leantune.training.progress import say
from leantune.training.tables import Columns, as_text, refuse, without_columns

IGNORED = -100
"""The label of a token that is not trained on."""
ROLES = ("system", "user", "assistant")
_FORMS = (("messages",), ("prompt", "completion"))
# What transformers looks for in a template that can tell an assistant's tokens.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chats(columns: Columns, place: str) -> datasets.Dataset:
    """Return the rows with ``messages``, or with ``prompt`` and ``completion``, and nothing else.

    Raises:
        ConfigError: there are no such columns, or a row is none that an answer is learned from: it
            is empty, does not end with an answer, or has an unknown role or content that is no
            text; names the first.
    """
    names = next((form for form in _FORMS if set(form) <= columns.keys()), None)
    if names is None:
        raise without_columns(place, "messages, or prompt and completion, for task chat", columns)
    rows: list[dict[str, Any]] = []
    for where, row in checked_rows(columns, names, place):
        check_answer(where, names, [*row.values()])
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def check_prompts(columns: Columns, place: str) -> list[Any]:
    """Return what each row asks: its prompt, or its messages without an answer at their end.

    Raises:
        ConfigError: there is no such column, or a row asks nothing; names the first.
    """
    name = next((name for name in ("prompt", "messages") if name in columns), None)
    if name is None:
        raise without_columns(place, "messages or prompt for task chat", columns)
    prompts: list[Any] = []
    for where, row in checked_rows(columns, (name,), place):
        asked = row[name]
        if not isinstance(asked, str) and asked[-1]["role"] == "assistant":
            asked = asked[:-1]
        if not asked:
            refuse(where, name, "a question", row[name])
        prompts.append(asked)
    return prompts


def checked_rows(
    columns: Columns, names: Sequence[str], place: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row is from and its values: texts if the first row's are, else messages.

    Raises:
        ConfigError: a value is neither, or not as the first row's; names it.
    """
    is_text = names[0] != "messages" and isinstance(columns[names[0]][0], str)
    read = _check_text if is_text else _check_messages
    for number, values in enumerate(zip(*(columns[name] for name in names), strict=True), 1):
        where = f"{place} row {number}"
        yield where, {n: read(where, n, value) for n, value in zip(names, values, strict=True)}


def _check_text(where: str, name: str, value: Any) -> str:
    if as_text(value) is None:
        refuse(where, name, "text, as the first prompt is", value)
    return value


def _check_messages(where: str, name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        refuse(where, name, "a list of messages that is not empty", value)
    for number, message in enumerate(value, 1):
        is_mapping = isinstance(message, Mapping)
        given = {k: v for k, v in message.items() if v is not None} if is_mapping else {}
        if given.keys() != {"role", "content"}:
            refuse(where, f"{name}[{number}]", "a mapping with role and content alone", message)
        if given["role"] not in ROLES:
            refuse(where, f"{name}[{number}] role", f"one of {', '.join(ROLES)}", given["role"])
        if as_text(given["content"]) is None:
            refuse(where, f"{name}[{number}] content", "text", given["content"])
    return [{key: message[key] for key in ("role", "content")} for message in value]


def check_answer(where: str, names: Sequence[str], values: Sequence[Any]) -> None:
    """Check that a row ends with an answer to something."""
    last = values[-1]
    if isinstance(last, list):
        if len(last) + len(values) < 3:
            refuse(where, names[-1], "a question and an answer", last)
        if last[-1]["role"] != "assistant":
            refuse(where, names[-1], "messages that end with the assistant's answer", last[-1])
        last = last[-1]["content"]
    if not last.strip():
        refuse(where, names[-1], "an answer that is not blank", last)


def encode_chats(rows: Iterable[Any], tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the token ids of each row, and its labels: those of the answers, else ``IGNORED``.

    Messages go through the tokenizer's chat template. The labels are those of every answer of
    ``messages`` where the template marks what the assistant says (``{% generation %}``), else of
    the last one alone; with ``prompt`` and ``completion`` those of the completion. Two texts go
    together as they are, with the end token behind them.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses a row.
    """
    for row in rows:
        if isinstance(row.get("prompt"), str):
            end = tokenizer.eos_token or ""
            text = row["completion"].removesuffix(end) + end
            start = encode_prompt(row["prompt"], tokenizer)
            ids = tokenizer(row["prompt"] + text, verbose=False)["input_ids"]
            yield ids, _labels(ids, start)
            continue
        template = _template(tokenizer)
        messages = [*row["messages"]] if "messages" in row else [*row["prompt"], *row["completion"]]
        num_asked = len(row["prompt"]) if "prompt" in row else len(messages) - 1
        marks = "messages" in row and _MARKS.search(template) is not None
        asked = encode_prompt(messages[:num_asked], tokenizer)
        whole = _apply_template(messages, tokenizer, return_assistant_tokens_mask=marks)
        ids = whole["input_ids"]
        if marks and any(whole["assistant_masks"]):
            masks = whole["assistant_masks"]
            yield ids, [i if mask else IGNORED for i, mask in zip(ids, masks, strict=True)]
        else:
            yield ids, _labels(ids, asked)


def encode_prompt(prompt: str | Sequence[Mapping[str, str]], tokenizer: Any) -> list[int]:
    """Return the token ids that an answer follows, of a text or of messages.

    Raises:
        ConfigError: the tokenizer has no chat template for messages, or it refuses them.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    _template(tokenizer)
    return _apply_template(prompt, tokenizer, add_generation_prompt=True)["input_ids"]


def _apply_template(messages: Sequence[Any], tokenizer: Any, **options: bool) -> Any:
    how = {"tokenize": True, "return_dict": True, "verbose": False, **options}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    # A template is a program, which may refuse an order of roles, or fail.
    except Exception as error:
        raise ConfigError(
            f"tokenize: chat template must take every row, got {type(error).__name__}: {error} "
            f"for {shown(messages)}; correct or remove the row, or correct the template"
        ) from error


def _labels(ids: list[int], start: list[int]) -> list[int]:
    """Return ids with IGNORED where they are what the row starts with, the question."""
    # Tokens may merge where both meet: the answer begins where the two differ.
    both = enumerate(zip(ids, start, strict=False))
    num = next((at for at, (a, b) in both if a != b), min(len(ids), len(start)))
    return [IGNORED] * num + ids[num:]


def _template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"tokenize: tokenizer must have a chat template for messages, got "
            f"{type(tokenizer).__name__} without one; take the instruct model's tokenizer, set "
            "tokenizer.chat_template and save it, or give prompt and completion as texts"
        ) from error


def cut_chats(
    split: str, encoded: Sequence[tuple[list[int], list[int]]], max_length: int
) -> dict[str, list[list[int]]]:
    """Cut rows at ``max_length`` tokens, and leave out those that lose all of their answer.

    Returns:
        ``input_ids`` and ``labels``.

    Raises:
        ConfigError: no row is left.
    """
    kept = [encoded[at] for at in answered(split, [[row] for row in encoded], max_length)]
    ids, labels = zip(*kept, strict=True)
    return {
        "input_ids": [row[:max_length] for row in ids],
        "labels": [row[:max_length] for row in labels],
    }


def answered(
    split: str, rows: Sequence[Sequence[tuple[list[int], list[int]]]], max_length: int
) -> list[int]:
    """Return the numbers of the rows whose every answer begins within ``max_length`` tokens.

    How many rows are longer, and how many are left out, is said on stderr.

    Args:
        rows: for each its sequences, with the token ids and labels of each.

    Raises:
        ConfigError: no row is left.
    """
    # The first token is predicted from nothing.
    kept = [
        at
        for at, row in enumerate(rows)
        if all(any(i != IGNORED for i in labels[1:max_length]) for _, labels in row)
    ]
    lengths = [max(len(ids) for ids, _ in row) for row in rows]
    if not kept:
        raise ConfigError(
            f"tokenize: max_length must leave a part of an answer, got {max_length} for {split} "
            f"rows of up to {max(lengths)} tokens; raise it or shorten the questions"
        )
    num_long = sum(length > max_length for length in lengths)
    if num_long or len(kept) < len(rows):
        say(
            f"{split}: {num_long} of {len(rows)} rows are longer than max_length = {max_length} "
            f"(up to {max(lengths)} tokens) and are cut there; {len(rows) - len(kept)} lose their "
            "whole answer and are left out"
        )
    return kept
