"""Files become checked rows and tokens; what is wrong names file, row and value."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from integration.tiny import bert, tokenizer

import leantune as lt
from leantune.training.data import check_ids, load_task, tokenize
from leantune.training.tables import find_split

ROWS = [("good w1", "1"), ('"bad w2', "0"), ("null", "1")]


def write(folder: Path, suffix: str, rows: list[tuple[str, str]] = ROWS) -> Path:
    """Write the rows as both splits, in the format of the suffix."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev"):
        path = folder / f"{split}{suffix}"
        if suffix.startswith(".json"):
            lines = [json.dumps({"sentence1": text, "label": int(label)}) for text, label in rows]
            path.write_text("\n".join(lines) + "\n")
        elif suffix == ".parquet":
            names = ("sentence1", "label")
            columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
            datasets.Dataset.from_dict(columns).to_parquet(path)
        elif suffix == ".csv":
            quoted = ['"' + text.replace('"', '""') + f'",{label}' for text, label in rows]
            path.write_text("\n".join(["sentence1,label", *quoted]) + "\n")
        else:
            content = ("\n".join(["sentence1\tlabel", *map("\t".join, rows)]) + "\n").encode()
            path.write_bytes(gzip.compress(content) if "gz" in suffix else content)
    return folder


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".csv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    data = load_task("text", write(tmp_path / "d", suffix))
    for split in ("train", "validation"):
        assert data[split]["sentence1"][:] == [text for text, _ in ROWS]
        assert data[split]["label"][:] == [1, 0, 1]
        assert data[split].features["label"].names == ["0", "1"]


def test_reading_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_task("text", write(tmp_path / "d", ".tsv"))
    tokenize(data, tokenizer(), 8)
    assert not (tmp_path / "cache").exists()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["dev.tsv", "train.tsv"]


@pytest.mark.parametrize("name", ["rte.train.tsv", "train.csv", "rte/train.tsv.gz"])
def test_a_split_is_found_by_its_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert find_split(tmp_path, "rte", "train") == path
    (tmp_path / "rte.train.jsonl").write_text("")
    with pytest.raises(lt.ConfigError, match=r"one train file .*got \['"):
        find_split(tmp_path, "rte", "train")
    with pytest.raises(lt.ConfigError, match="one validation file of task rte"):
        find_split(tmp_path, "rte", "validation")


def test_glue_columns_and_classes_are_known(tmp_path: Path) -> None:
    (tmp_path / "mnli.train.tsv").write_text("premise\thypothesis\tlabel\na\tb\tneutral\nc\td\t2\n")
    (tmp_path / "mnli.dev_matched.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t0\n")
    data = load_task("mnli", tmp_path)
    assert data["train"].column_names == ["sentence1", "sentence2", "label"]
    assert data["train"]["label"][:] == [1, 2] and data["validation"]["label"][:] == [0]
    rows = tokenize(data, tokenizer(), 9)["train"]
    assert rows.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"] or set(
        rows.column_names
    ) >= {"input_ids", "attention_mask", "labels"}


def test_scores_are_floats(tmp_path: Path) -> None:
    data = load_task("regression", write(tmp_path / "d", ".tsv", [("w1", "4.5"), ("w2", "1")]))
    assert data["train"]["label"][:] == [4.5, 1.0]
    assert tokenize(data, tokenizer(), 8)["train"].features["labels"] == datasets.Value("float32")


def test_a_subset_is_fixed_and_the_smaller_lies_in_the_larger(tmp_path: Path) -> None:
    rows = [(f"w{i}", str(i % 2)) for i in range(40)]
    folder = write(tmp_path / "d", ".tsv", rows)
    some, more = (load_task("text", folder, max_train=n)["train"]["sentence1"][:] for n in (5, 9))
    assert more[:5] == some and len(set(more)) == 9
    assert load_task("text", folder, max_train=5)["train"]["sentence1"][:] == some


def test_a_text_becomes_blocks(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3\n" * 40)
    data = load_task("causal_lm", tmp_path / "text.txt")
    assert (len(data["train"]), len(data["validation"])) == (38, 2)
    blocks = tokenize(data, tokenizer(), 5)["train"]
    assert len(blocks) == 38 * 3 // 5 and blocks[0]["labels"] == blocks[0]["input_ids"]
    with pytest.raises(lt.ConfigError, match=r"at least max_length = 9 tokens, got 6"):
        tokenize(data, tokenizer(), 9)


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        ("sentence1\tlabel\nw1\t1\nw2\t2\n", "sst2", r"train.tsv row 2: 'label' .* got '2'"),
        ("sentence1\tlabel\nw1\t1\nw2\t\n", "sst2", r"row 2: 'label' must be one of .* got ''"),
        ("sentence1\tlabel\nw1\tnan\n", "regression", "row 1: 'label' must be a finite number"),
        ("sentence1\tlabel\nw1\t1\n", "text", r"at least two classes, got \('1',\)"),
        ("sentence1\tclass\nw1\t1\n", "text", "columns must be 'label', got sentence1, class"),
        ("text\tlabel\nw1\t1\nw2\t0\n", "text", "columns must be 'sentence1', got text, label"),
        ("sentence1\tlabel\nw1\t1\tmore\n", "text", r"train\.tsv must be a table"),
        ("sentence1\tlabel\n", "text", "got ValueError: no rows"),
        ("", "text", "train.tsv must be a table"),
        ("sentence1\tlabel\tlabel\nw1\t1\t0\n", "text", "columns twice: label"),
        ("sentence1\tlabel\nw1\t1e39\n", "regression", "must be a finite number, got '1e39'"),
        ("sentence1\tlabel\nw1\t1_0\n", "regression", "must be a finite number, got '1_0'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, task: str, message: str) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(content)
    with pytest.raises(lt.ConfigError, match=message):
        load_task(task, tmp_path)


def test_broken_bytes_and_missing_text_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", ".tsv.gz")
    whole = (folder / "train.tsv.gz").read_bytes()
    (folder / "train.tsv.gz").write_bytes(whole[:-12])
    with pytest.raises(lt.ConfigError, match=r"train\.tsv\.gz must be a table"):
        load_task("text", folder)
    lines = [{"sentence1": "w1", "label": 1}, {"sentence1": None, "label": 0}]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(lt.ConfigError, match=r"row 2: 'sentence1' must be text, got None"):
        load_task("text", tmp_path)


def test_an_unknown_task_or_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(lt.ConfigError, match=r"task must be one of cola, .* got 'sst3'"):
        load_task("sst3", tmp_path)
    with pytest.raises(lt.ConfigError, match="which is no folder here"):
        load_task("text", tmp_path / "nowhere")
    with pytest.raises(lt.ConfigError, match="max_length must be from 1 to 32"):
        tokenize(load_task("text", write(tmp_path / "d", ".tsv")), tokenizer(), 64)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("a", 1), ("b", "one")], "must hold values of one type, got int and str"),
        ([("a", [1]), ("b", [0])], "at least two classes"),
        ([("a", 1), ("b", 0), ("c", float("nan"))], "row 3: 'label' must be one of 0, 1, got nan"),
        ([("\ud800", 1), ("b", 0)], r"row 1: 'sentence1' must be text"),
        ([("a", True), ("b", False)], "row 1: 'label' must be a finite number, got True"),
        ([("a", 10**400), ("b", 1)], "row 1: 'label' must be a finite number, got one|1000"),
    ],
)
def test_odd_values_in_json_lines_are_named(
    tmp_path: Path, lines: list[tuple[object, object]], message: str
) -> None:
    text = "".join(json.dumps({"sentence1": t, "label": v}) + "\n" for t, v in lines)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    task = "regression" if "finite" in message else "text"
    with pytest.raises(lt.ConfigError, match=message):
        load_task(task, tmp_path)


def test_brackets_without_end_do_not_crash_the_process(tmp_path: Path) -> None:
    """The readers in C end in a segmentation fault here."""
    for name in ("train", "dev"):
        text = '{"sentence1": ' + "[" * 100_000 + "]" * 100_000 + ', "label": 1}\n'
        (tmp_path / f"{name}.jsonl").write_text(text)
    with pytest.raises(lt.ConfigError, match="line 1: brackets that nest too deep"):
        load_task("text", tmp_path)


def test_a_language_model_reads_the_column_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "good"}]}\n' * 40)
    with pytest.raises(lt.ConfigError, match=r"must be text .* task chat, got messages;"):
        load_task("causal_lm", path)
    path.write_text('{"text": "w1 w2"}\n' * 40)
    assert load_task("causal_lm", path)["train"]["text"][0] == "w1 w2"
    path.write_text('{"text": "w1 w2"}\n{"text": 3}\n')
    with pytest.raises(lt.ConfigError, match="'text' must be text, got 3"):
        load_task("causal_lm", path)


def test_each_text_has_a_token_that_the_model_knows(tmp_path: Path) -> None:
    data = load_task("text", write(tmp_path / "d", ".tsv", [("", "1"), ("w2", "0")]))
    with pytest.raises(lt.ConfigError, match="at least one token, got ''"):
        tokenize(data, tokenizer(), 8)
    rows = tokenize(load_task("text", write(tmp_path / "e", ".tsv")), tokenizer(), 8)
    check_ids(rows, tokenizer(), bert())
    small = bert()
    small.resize_token_embeddings(4)
    with pytest.raises(lt.ConfigError, match="token ids must be below 4"):
        check_ids(rows, tokenizer(), small)
