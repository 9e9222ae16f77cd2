"""Pairs of answers, one chosen and one rejected: from rows to TRL's trainer of preferences."""

from typing import Any

import datasets

from leantune.errors import UnsupportedError
from leantune.training.chat import answered, check_answer, checked_rows, encode_chats
from leantune.training.tables import Columns, refuse, without_columns

_ANSWERS = ("chosen", "rejected")


def check_pairs(columns: Columns, place: str) -> datasets.Dataset:
    """Return the rows with ``prompt``, ``chosen`` and ``rejected``, texts or lists of messages.

    Without a prompt of the answers' kind both are whole chats, whose common beginning is it.

    Raises:
        ConfigError: there are no such columns, or a row is no pair: something is no text or no
            chat, an answer is blank, or both are the same; names the first.
    """
    from trl.data_utils import extract_prompt

    if not {*_ANSWERS} <= columns.keys():
        raise without_columns(place, "prompt, chosen and rejected for task preference", columns)
    first = columns["chosen"][0]
    is_whole = type(columns.get("prompt", [None])[0]) is not type(first)
    names = _ANSWERS if is_whole else ("prompt", *_ANSWERS)
    rows: list[dict[str, Any]] = []
    for where, row in checked_rows(columns, names, place):
        if row["chosen"] == row["rejected"]:
            refuse(where, "rejected", "another answer than chosen", row["rejected"])
        if is_whole:
            if row["chosen"][:1] != row["rejected"][:1]:
                refuse(where, "rejected", "a chat that begins as chosen does", row["rejected"])
            row = extract_prompt(row)
        for name in _ANSWERS:
            check_answer(where, ("prompt", name), (row["prompt"], row[name]))
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def cut_pairs(split: str, rows: Any, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Leave out rows that lose all of an answer where TRL cuts them, at ``max_length`` tokens.

    Returns:
        The rows as they are, since TRL tokenises by itself, and ``input_ids``, both answers' tokens
        one after the other.

    Raises:
        ConfigError: no row is left, or the tokenizer's chat template is missing or refuses a row.
    """
    chosen, rejected = (
        list(encode_chats([{**row, "completion": row[name]} for row in rows], tokenizer))
        for name in _ANSWERS
    )
    pairs = [*zip(chosen, rejected, strict=True)]
    kept = answered(split, pairs, max_length)
    ids = [pairs[at][0][0] + pairs[at][1][0] for at in kept]
    return rows.select(kept).add_column("input_ids", ids)


def make_pairs_trainer(model: Any, reference: Any, **options: Any) -> Any:
    """Make a ``DPOTrainer``, which computes at once what the reference says of every row.

    Args:
        reference: the plain model as it was loaded, which may share the weights of ``model``.
        options: the trainer's own.

    Raises:
        UnsupportedError: there are several processes.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    if (num_processes := options["args"].world_size) > 1:
        raise UnsupportedError(
            f"RunRecipe: task preference must train in one process, got {num_processes}, of which "
            "TRL lets one alone find the reference's log-probabilities; start one"
        )
    # TRL switches checkpointing off for the reference, and then on again in every module.
    checkpointed = [vars(m) for m in model.modules() if vars(m).get("gradient_checkpointing")]
    for settings in checkpointed:
        settings["gradient_checkpointing"] = False
    trainer = DPOTrainer(model, reference, **options)
    for settings in checkpointed:
        settings["gradient_checkpointing"] = True
    # It is not asked again, and would keep weights that a method has put others in the place of.
    trainer.ref_model = None
    return trainer
