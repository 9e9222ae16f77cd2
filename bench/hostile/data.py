"""What a run reads: tables, texts, labels, splits."""

import gzip
import json
import os
from functools import partial
from pathlib import Path

import pandas

from bench.hostile.case import Cases, command
from bench.hostile.runs import tiny_inputs, write_inputs, write_text_inputs

CASES = Cases("data", prepare=tiny_inputs)

GOOD = "good w1\t1\nbad w2\t0\n" * 4
HEAD = "sentence1\tlabel\n"


def _table(folder: Path, train: str | bytes, name: str, task: str, validation: str | bytes) -> str:
    """Train on one table, and its ``validation``, which is the same unless given."""
    arguments = write_inputs(folder, f"task={task}", "data=odd")
    (folder / "odd").mkdir()
    for split, content in (("train", train), ("validation", validation or train)):
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "odd" / f"{split}{name}").write_bytes(raw)
    command(*arguments)
    return "trained"


def add(
    what: str,
    expected: str,
    train: str | bytes,
    name: str = ".tsv",
    task: str = "text",
    validation: str | bytes = "",
) -> None:
    """Add a case of one odd table."""
    how = {"train": train, "name": name, "task": task, "validation": validation}
    CASES.add(what, expected, what[0].upper() + what[1:], partial(_table, **how))


def deep(depth: int) -> str:
    """Return lines of JSON whose text is brackets within brackets."""
    brackets = "[" * depth + "]" * depth
    return "".join(f'{{"sentence1": {brackets}, "label": {label}}}\n' for label in (1, 0))


def rows(*pairs: tuple[object, object]) -> str:
    """Return JSON lines of texts and labels."""
    return "".join(json.dumps({"sentence1": t, "label": v}) + "\n" for t, v in pairs)


add("an empty table", "refused", "")
add("a table of a header alone", "refused", HEAD)
add("a table of blank lines", "refused", "\n\n\n")
add("a table of one row", "refused", HEAD + "good\t1\n")
add("a table of one row and task regression", "works", HEAD + "good\t1\n", task="regression")
add("one class", "refused", HEAD + "good\t1\n" * 5)
add("a class for each row", "works", HEAD + "".join(f"w{i}\tclass {i}\n" for i in range(20)))
add("no label", "refused", "sentence1\nw1\n")
add("no text", "refused", "label\n1\n0\n")
add("columns of other names", "refused", "text\tclass\ngood\t1\nbad\t0\n")
add("a column twice", "refused", "sentence1\tlabel\tlabel\ngood\t1\t0\nbad\t0\t1\n")
add(
    "a column twice in JSON lines",
    "refused",
    '{"sentence1":"a","label":1,"label":0}\n' * 3,
    ".jsonl",
)
add("a column without a name", "works", "sentence1\tlabel\t\n" + "good\t1\tx\nbad\t0\ty\n" * 4)
add("rows longer than the header", "refused", HEAD + "good\t1\tmore\nbad\t0\n")
add("rows shorter than the header", "refused", HEAD + GOOD + "good\n")
add("an empty label", "refused", HEAD + "good\t\nbad\t0\ngood\t1\n")
add("labels of 400 digits", "works", HEAD + f"good\t{'1' * 400}\nbad\t{'2' * 400}\n" * 3)
add("labels of 400 digits in JSON", "works", rows(("a", 10**400), ("b", 1)), ".jsonl")
add("scores of 400 digits", "refused", HEAD + f"good\t{'1' * 400}\nbad\t2\n", task="regression")
add("scores beyond 10^308", "refused", HEAD + "good\t1e400\nbad\t2\n", task="regression")
add(
    "scores of 400 digits in JSON",
    "refused",
    rows(("a", 10**400), ("b", 1)),
    ".jsonl",
    "regression",
)
add("scores beyond float32", "refused", HEAD + "good\t1e39\nbad\t2\n" * 3, task="regression")
add("scores that are NaN", "refused", HEAD + "good\tnan\nbad\t2\n", task="regression")
add("scores that are words", "refused", HEAD + "good\tmuch\nbad\t2\n", task="regression")
add(
    "scores that are true and false",
    "refused",
    rows(("a", True), ("b", False)),
    ".jsonl",
    "regression",
)
add("scores with underscores", "refused", HEAD + "good\t1_0\nbad\t2\n" * 3, task="regression")
add("labels of true and false", "works", rows(*[("a", True), ("b", False)] * 3), ".jsonl")
add("labels that are numbers and words", "refused", rows(("a", 1), ("b", "one")), ".jsonl")
add("labels that are lists", "refused", rows(("a", [1]), ("b", [0])), ".jsonl")
add("labels that are mappings", "refused", rows(("a", {"x": 1}), ("b", {"x": 2})), ".jsonl")
add("labels that are null", "refused", rows(("a", None), ("b", None)), ".jsonl")
add("labels that are 1 and 1.0", "refused", rows(("a", 1), ("b", 1.0)), ".jsonl")
add("texts that are numbers", "refused", rows((1, 1), (2, 0)), ".jsonl")
add("texts that are null", "refused", rows((None, 1), ("b", 0)), ".jsonl")
add("texts that are lists", "refused", rows((["a"], 1), (["b"], 0)), ".jsonl")
add("texts that are empty", "refused", HEAD + "\t1\n\t0\n" * 4)
add("a text of 100,000 words", "works", HEAD + "good " * 10**5 + "\t1\nbad\t0\n")
add("lone surrogates in texts", "refused", rows(*[("\ud800", 1), ("b", 0)] * 3), ".jsonl")
add(
    "lone surrogates in labels",
    "refused",
    rows(*[("a", "\ud800"), ("b", "x"), ("c", "y")] * 3),
    ".jsonl",
)
add("a label that validation has alone", "refused", HEAD + GOOD, validation=HEAD + "good\tnew\n")
add("a label that train has alone", "works", HEAD + GOOD + "w1\tmore\n", validation=HEAD + GOOD)
add("columns that differ between splits", "refused", HEAD + GOOD, validation="text\tlabel\nw1\t1\n")
add("NUL bytes", "works", HEAD + "go\0od\t1\nbad\t0\n" * 4)
add("a NUL byte in the header", "refused", "sentence1\0\tlabel\ngood\t1\nbad\t0\n")
add("a byte order mark", "works", b"\xef\xbb\xbf" + (HEAD + GOOD).encode())
add(
    "a byte order mark in JSON lines",
    "works",
    b"\xef\xbb\xbf" + rows(*[("a", 1), ("b", 0)] * 3).encode(),
    ".jsonl",
)
add("lines that end with CR LF", "works", (HEAD + GOOD).replace("\n", "\r\n"))
add("lines that end with CR", "works", (HEAD + GOOD).replace("\n", "\r"))
add("UTF-16", "refused", (HEAD + GOOD).encode("utf-16"))
add("UTF-16 in JSON lines", "refused", rows(("a", 1), ("b", 0)).encode("utf-16"), ".jsonl")
add("Latin-1", "refused", HEAD.encode() + b"caf\xe9\t1\nbad\t0\n")
add("bytes that are no text", "refused", bytes(range(256)) * 10)
add("commas in a file of tabs", "refused", (HEAD + GOOD).replace("\t", ","))
add("an unclosed quote", "refused", 'sentence1,label\n"good,1\nbad,0\n', ".csv")
add("half of a line of JSON", "refused", rows(("a", 1)) + '{"sentence1": "b"', ".jsonl")
add("JSON lines that are no mappings", "refused", "1\n2\n3\n", ".jsonl")
add("JSON lines that are lists", "refused", "[1]\n[2]\n", ".jsonl")
add(
    "JSON lines of 100,000 brackets",
    "refused",
    deep(100_000),
    ".jsonl",
)
add(
    "JSON lines of 900 brackets",
    "refused",
    deep(900),
    ".jsonl",
)
add(
    "NaN in JSON lines",
    "refused",
    rows(("a", float("nan")), ("b", 1), ("c", 0)),
    ".jsonl",
)
add(
    "keys that change from line to line",
    "refused",
    '{"sentence1": "a", "label": 1}\n{"text": "b", "class": 0}\n',
    ".jsonl",
)
add("no parquet file", "refused", b"PAR1 no", ".parquet")
add("no gzip file", "refused", b"\x1f\x8b no", ".tsv.gz")
add("half of a gzip file", "refused", gzip.compress((HEAD + GOOD * 100).encode())[:-12], ".tsv.gz")
add("another suffix", "refused", HEAD + GOOD, ".xlsx")
add("a task for pairs and single texts", "refused", HEAD + GOOD, task="mnli")
add("a class that the task lacks", "refused", HEAD + "good\t7\nbad\t0\n", task="sst2")


@CASES.refused
def two_train_files(folder: Path) -> None:
    """Two files of one split."""
    arguments = write_inputs(folder)
    (folder / "data" / "train.csv").write_text("sentence1,label\na,1\n")
    command(*arguments)


@CASES.refused
def no_validation(folder: Path) -> None:
    """No file of one split."""
    arguments = write_inputs(folder)
    (folder / "data" / "validation.tsv").unlink()
    command(*arguments)


@CASES.refused
def empty_folder(folder: Path) -> None:
    """An empty folder of data."""
    arguments = write_inputs(folder, "data=none")
    (folder / "none").mkdir()
    command(*arguments)


@CASES.refused
def split_is_a_pipe(folder: Path) -> None:
    """A split that is a pipe that nobody writes to."""
    arguments = write_inputs(folder)
    (folder / "data" / "train.tsv").unlink()
    os.mkfifo(folder / "data" / "train.tsv")
    command(*arguments)


@CASES.refused
def split_is_a_folder(folder: Path) -> None:
    """A split that is a folder."""
    arguments = write_inputs(folder)
    (folder / "data" / "train.tsv").unlink()
    (folder / "data" / "train.tsv").mkdir()
    command(*arguments)


@CASES.refused
def split_is_a_dead_link(folder: Path) -> None:
    """A split that is a link to nothing."""
    arguments = write_inputs(folder)
    (folder / "data" / "train.tsv").unlink()
    (folder / "data" / "train.tsv").symlink_to("nowhere")
    command(*arguments)


def _path(folder: Path, data: str, task: str) -> str:
    write = write_text_inputs if task == "causal_lm" else write_inputs
    arguments = write(folder, f"data={data}")
    os.mkfifo(folder / "pipe")
    (folder / "empty.txt").write_text("")
    return command(*arguments)


for _task in ("text", "causal_lm"):
    for _path_text, _what in {
        "nowhere": "nothing at all",
        "pipe": "a pipe that nobody writes to",
        "/dev/zero": "a device without an end",
        "/dev/null": "a device that is empty",
        "empty.txt": "an empty file",
        "model/model.safetensors": "a file of weights",
        "hub": "a hub that cannot be reached",
        "nobody/nothing:config": "a data set on a hub that cannot be reached",
        "..": "a folder without splits",
        "d" * 5000: "a name of 5,000 letters",
    }.items():
        CASES.add(
            f"{_task}, {_path_text[:40]}",
            "refused",
            f"Data for task {_task} that are {_what}",
            partial(_path, data=_path_text, task=_task),
        )


def _text(folder: Path, content: str | bytes, name: str) -> str:
    arguments = write_text_inputs(folder, f"data={name}")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    command(*arguments)
    return "trained"


CHAT = json.dumps({"messages": [{"role": "user", "content": "good w1"}]}) + "\n"
PROMPT = json.dumps({"prompt": "good w1", "completion": "bad w2"}) + "\n"
TEXT = json.dumps({"text": "good w1 w2 w3 bad w4"}) + "\n"
for _what, (_expected, _name, _content) in {
    "chat messages": ("refused", "chat.jsonl", CHAT * 40),
    "chat messages in JSON": ("refused", "chat.json", "[" + ",".join([CHAT] * 40) + "]"),
    "prompts and completions": ("refused", "prompts.jsonl", PROMPT * 40),
    "JSON lines of texts": ("works", "text.jsonl", TEXT * 40),
    "JSON lines of numbers": ("refused", "text.jsonl", '{"text": 3}\n' * 40),
    "JSON lines of nulls": ("refused", "text.jsonl", TEXT * 40 + '{"text": null}\n'),
    "chat messages in a file without a suffix": ("refused", "chat", CHAT * 40),
    "a table of texts": ("works", "text.csv", "text\n" + "good w1 w2 w3 bad w4\n" * 40),
    "a text that is too short": ("refused", "short.txt", "good w1\n"),
    "a text of one line": ("works", "line.txt", "good w1 w2 w3 " * 20),
    "a text of blanks": ("refused", "blank.txt", " \n" * 40),
    "a text that is no UTF-8": ("refused", "latin.txt", b"caf\xe9 good\n" * 40),
    "a text in UTF-16": ("refused", "wide.txt", ("good w1 w2 w3\n" * 40).encode("utf-16")),
    "a text with NUL bytes": ("works", "nul.txt", "good \0 w1 w2 w3\n" * 40),
}.items():
    CASES.add(
        _what,
        _expected,
        f"For task causal_lm {_what}",
        partial(_text, content=_content, name=_name),
    )


@CASES.refused
def parquet_without_the_columns(folder: Path) -> None:
    """A parquet file without the columns."""
    arguments = write_inputs(folder)
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.tsv").unlink()
        pandas.DataFrame({"a": [1, 2]}).to_parquet(folder / "data" / f"{split}.parquet")
    command(*arguments)
