"""Pairs of answers are read in three forms, counted where they are long, and named where wrong."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from training.chats import chat_tokenizer, said, write_lines

import leantune as lt
from leantune.training.data import load_task, tokenize

ASKED, GOOD, BAD = said("w1 w2"), said("", "good")[1:], said("", "bad")[1:]


def load(path: Path, *rows: dict[str, Any]) -> datasets.DatasetDict:
    return load_task("preference", write_lines(path / "pairs.jsonl", list(rows)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "w1 w2", "chosen": ASKED + GOOD, "rejected": ASKED + BAD, "score": 3},
    ],
)
def test_chats_are_read_in_three_forms(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = load(tmp_path, row)["train"]
    assert found == {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w1 w2", "chosen": " good", "rejected": " bad"},
        {"chosen": "w1 w2 good", "rejected": "w1 w2 bad"},
    ],
)
def test_texts_are_read_in_two_forms(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = load(tmp_path, row)["train"]
    assert found == {"prompt": "w1 w2", "chosen": " good", "rejected": " bad"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": GOOD}, "columns must be prompt, chosen and rejected .* got chosen;"),
        ({"prompt": "w1", "chosen": "w2", "rejected": None}, "row 2: rejected must be text"),
        ({"prompt": "w1", "chosen": "w2", "rejected": " "}, "rejected must be an answer that is"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "rejected must be another answer"),
        ({"prompt": [], "chosen": GOOD, "rejected": BAD}, "row 2: prompt must be a list of mess"),
        (
            {"prompt": ASKED, "chosen": GOOD, "rejected": ASKED},
            "row 2: rejected must be messages that end with the assistant",
        ),
        ({"chosen": ASKED + GOOD, "rejected": BAD}, "rejected must be a chat that begins as chos"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED}, "rejected must be messages that end with"),
        (
            {"chosen": ASKED + GOOD, "rejected": [{"role": "bot", "content": "bad"}]},
            r"row 2: rejected\[1\] role must be one of system, user, assistant",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    texts = isinstance(row["chosen"], str)
    good: dict[str, Any] = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    if not texts:
        good = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
        if "prompt" not in row:
            good = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    good = {name: good[name] for name in row}
    with pytest.raises(lt.ConfigError, match=message):
        load(tmp_path, good, row)


def test_rows_that_are_too_long_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = said("w1 w2 w3 w4 w5")
    # Of 5, 12 and 9 tokens before the answer ends.
    short = {"prompt": said("w1"), "chosen": GOOD, "rejected": BAD}
    cut = {"prompt": said("w1"), "chosen": said("", "good " * 9)[1:], "rejected": BAD}
    lost = {"prompt": asked, "chosen": GOOD, "rejected": BAD}
    data = load(tmp_path, short, cut, lost)
    data["train"] = data["validation"] = datasets.Dataset.from_list([short, cut, lost])
    found: Any = tokenize(data, chat_tokenizer(), 8)["train"]
    assert [row["prompt"] for row in found] == [said("w1"), said("w1")]
    assert chat_tokenizer().decode(found[0]["input_ids"]) == (
        "[user] w1 [EOS] [assistant] good [EOS] [user] w1 [EOS] [assistant] bad [EOS]"
    )
    said_there = capsys.readouterr().err
    assert "train: 2 of 3 rows are longer than max_length = 8 (up to 14 tokens) and are cut" in (
        said_there
    )
    assert "1 lose their whole answer and are left out" in said_there
    with pytest.raises(lt.ConfigError, match="max_length must leave a part of an answer, got 3"):
        tokenize(data, chat_tokenizer(), 3)
