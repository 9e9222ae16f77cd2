"""Chats become tokens of which the answers alone are labels; what is wrong is named."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from training.chats import MARKED, PLAIN, chat_tokenizer, chats, said, write_lines

import leantune as lt
from leantune.training.answers import ScoreAnswers
from leantune.training.chat import IGNORED
from leantune.training.data import load_task, tokenize
from leantune.training.recipe import RunRecipe


def words(row: dict[str, Any], name: str = "labels") -> str:
    """Spell what is trained on, or the whole row."""
    return chat_tokenizer().decode([i for i in row[name] if i != IGNORED])


def rows_of(path: Path, *rows: dict[str, Any], template: str = PLAIN) -> datasets.Dataset:
    folder = path / "data"
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        write_lines(folder / f"{split}.jsonl", list(rows))
    return tokenize(load_task("chat", folder), chat_tokenizer(template), 32)["train"]


@pytest.mark.parametrize(
    ("row", "whole", "answers"),
    [
        (
            {"messages": said("w1", "good", "w2 w3", "bad")},
            "[user] w1 [EOS] [assistant] good [EOS] [user] w2 w3 [EOS] [assistant] bad [EOS]",
            "bad [EOS]",
        ),
        (
            {"prompt": said("w1 w2"), "completion": [{"role": "assistant", "content": "good"}]},
            "[user] w1 w2 [EOS] [assistant] good [EOS]",
            "good [EOS]",
        ),
        ({"prompt": "w1 w2 ", "completion": "good"}, "w1 w2 good [EOS]", "good [EOS]"),
        ({"prompt": "w1 w2 ", "completion": "good [EOS]"}, "w1 w2 good [EOS]", "good [EOS]"),
    ],
)
def test_the_answer_alone_is_trained_on(
    tmp_path: Path, row: dict[str, Any], whole: str, answers: str
) -> None:
    (found,) = rows_of(tmp_path, row)
    assert words(found, "input_ids") == whole and words(found) == answers


def test_marks_in_the_template_make_every_answer_a_label(tmp_path: Path) -> None:
    talk = said("w1", "good", "w2 w3", "bad")
    (found,) = rows_of(tmp_path, {"messages": talk}, template=MARKED)
    assert words(found) == "good [EOS] bad [EOS]"
    pair = {"prompt": talk[:3], "completion": talk[3:]}
    (found,) = rows_of(tmp_path, pair, template=MARKED)
    assert words(found) == "bad [EOS]"


def test_parquet_and_one_file_give_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = chats(40)
    lines = load_task("chat", write_lines(tmp_path / "chat.jsonl", rows))
    assert "no validation split; 2 of 40 rows become one, drawn by a fixed seed" in (
        capsys.readouterr().err
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    table = load_task("chat", tmp_path / "chat.parquet")
    for split in ("train", "validation"):
        assert lines[split].to_list() == table[split].to_list()
    both = [*lines["train"], *lines["validation"]]
    key = str
    assert sorted(both, key=key) == sorted(rows, key=key)
    # Other columns do not matter, nor do fields that another row alone has.
    mixed = [{"id": 1, "messages": [m | {"name": None} for m in rows[0]["messages"]]}]
    assert load_task("chat", write_lines(tmp_path / "m.jsonl", mixed))["train"][0] == rows[0]


BOT = {"role": "bot", "content": "good"}
TOOL = {"role": "assistant", "content": "good", "tool_calls": [1]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1"}, "columns must be messages, or prompt and completion, .* got text"),
        ({"messages": []}, r"row 2: messages must be a list of messages that is not empty, got \["),
        ({"messages": "w1"}, "row 2: messages must be a list of messages .* got 'w1'"),
        ({"messages": said("w1")}, r"row 2: messages must be a question and an answer"),
        ({"messages": said("w1", "w2", "w3")}, "end with the assistant's answer, got .*'w3'"),
        ({"messages": [*said("w1"), BOT]}, r"messages\[2\] role must be one of .* got 'bot'"),
        ({"messages": [*said("w1"), TOOL]}, r"messages\[2\] must be a mapping with role and .* al"),
        ({"messages": [*said("w1"), None]}, r"messages\[2\] must be a mapping .* got None"),
        ({"messages": [*said("w1"), "w2"]}, r"messages\[2\] must be a mapping .* got 'w2'"),
        ({"messages": said("w1", 3)}, r"messages\[2\] content must be text, got 3"),  # type: ignore[arg-type]
        ({"messages": said("w1", " ")}, "messages must be an answer that is not blank, got ' '"),
        ({"prompt": "w1", "completion": ""}, "completion must be an answer that is not blank"),
        ({"prompt": "w1", "completion": None}, "row 2: completion must be text, .* got None"),
        ({"prompt": said("w1"), "completion": []}, "completion must be a list .* got \\["),
        ({"prompt": said("w1"), "completion": said("w1")}, "end with the assistant's answer"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"messages": said("w1", "w2")}
    if "prompt" in row:
        is_text = isinstance(row["prompt"], str)
        good = {"prompt": "w1" if is_text else said("w1")}
        good["completion"] = "w2" if is_text else said("w1", "w2")[1:]
    first = row if "text" in row else good
    path = write_lines(tmp_path / "chat.jsonl", [first, row])
    with pytest.raises(lt.ConfigError, match=message):
        load_task("chat", path)


def test_long_rows_are_counted_and_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [said("w1", "good"), said("w1", "w2 w3 w4 w5 w6"), said("w1 w2 w3 w4 w5 w6 w7", "bad")]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": row} for row in rows * 20])
    data = load_task("chat", path)
    data["validation"] = data["train"]
    found = tokenize(data, chat_tokenizer(), 8)["train"]
    assert max(map(len, found["input_ids"])) == 8
    num_lost = sum("w7" in row["messages"][0]["content"] for row in data["train"])
    num_long = sum("w6" in str(row) for row in data["train"])
    assert len(found) == len(data["train"]) - num_lost
    assert (
        f"train: {num_long} of 57 rows are longer than max_length = 8 (up to 12 tokens) and are "
        f"cut there; {num_lost} lose their whole answer and are left out"
    ) in capsys.readouterr().err
    with pytest.raises(lt.ConfigError, match="max_length must leave a part of an answer, got 2"):
        tokenize(data, chat_tokenizer(), 2)
    with pytest.raises(lt.ConfigError, match="max_length must be from 2 to 32"):
        tokenize(data, chat_tokenizer(), 64)


def test_a_template_that_is_missing_or_refuses_is_named(tmp_path: Path) -> None:
    data = load_task("chat", write_lines(tmp_path / "chat.jsonl", chats(3)))
    with pytest.raises(lt.ConfigError, match="must have a chat template for messages, got"):
        tokenize(data, chat_tokenizer(None), 32)
    strict = "{{ raise_exception('no such order') }}"
    with pytest.raises(lt.ConfigError, match=r"must take every row, got .* no such order for"):
        tokenize(data, chat_tokenizer(strict), 32)
    texts = [{"prompt": "w1 ", "completion": "w2"}] * 2
    plain = load_task("chat", write_lines(tmp_path / "pairs.jsonl", texts))
    assert tokenize(plain, chat_tokenizer(None), 32)["train"]["labels"][0][0] == IGNORED


def test_answers_to_score_must_be_few_and_whole(tmp_path: Path) -> None:
    data = load_task("chat", write_lines(tmp_path / "chat.jsonl", chats(40)))
    with pytest.raises(lt.ConfigError, match=r"max_length must be at least .* got 5"):
        ScoreAnswers(data, chat_tokenizer(), 5)
    many = [{"messages": said("w1", f"w{i}")} for i in range(30)]
    data = load_task("chat", write_lines(tmp_path / "many.jsonl", many))
    with pytest.raises(lt.ConfigError, match=r"score_answers must be False .* got 30"):
        ScoreAnswers(data, chat_tokenizer(), 32)
    with pytest.raises(lt.ConfigError, match="score_answers must be False for task text"):
        RunRecipe(model="demo", task="text", data="d", output="o", score_answers=True)
