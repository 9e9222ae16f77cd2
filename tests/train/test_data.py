"""Rows are checked before use, subsets repeat, tokens and sample ids are exact."""

import gzip
import json
import pickle
from pathlib import Path

import datasets
import datasets.config
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast

from leantune.errors import ConfigError
from leantune.train.data import (
    Table,
    TaskData,
    load_task,
    tokenize,
    tokenize_text,
)
from leantune.train.sample_ids import SAMPLE_ID, with_sample_ids
from leantune.train.tasks import HubSource, Task

WORDS = [f"w{n}" for n in range(50)]


def _message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def _tsv(path: Path, header: str, rows: list[str]) -> Path:
    text = "\n".join([header, *rows]) + "\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def cola(tmp_path) -> Path:
    rows = [f'{n}\tw{n % 50} says "{n}\t{n % 2}' for n in range(40)]
    _tsv(tmp_path / "cola.train.tsv.gz", "idx\tsentence1\tlabel", rows)
    _tsv(tmp_path / "cola.validation.tsv", "idx\tsentence1\tlabel", rows[:10])
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_named_task_from_a_folder(cola):
    data = load_task("cola", cola)
    assert (len(data.train), len(data.validation), data.num_labels) == (40, 10, 2)
    assert data.label_names == ("unacceptable", "acceptable")
    assert data.train["sentence1"][3] == 'w3 says "3'
    assert data.train["label"] == [n % 2 for n in range(40)]
    assert set(data.train.columns) == {"sentence1", "label"}


def test_pairs_and_scores(tmp_path):
    header = "idx\tsentence1\tsentence2\tlabel"
    _tsv(tmp_path / "train.tsv", header, ["0\ta\tb\t2.5", "1\tc\td\t5"])
    _tsv(tmp_path / "dev.tsv", header, ["0\te\tf\t0"])
    data = load_task("stsb", tmp_path)
    assert data.train.columns == {
        "sentence1": ["a", "c"],
        "sentence2": ["b", "d"],
        "label": [2.5, 5.0],
    }
    assert (data.num_labels, data.label_names) == (1, None)


def test_any_folder_finds_its_labels_and_a_second_text(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("yes", "no")]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_task("text", tmp_path)
    assert data.label_names == ("no", "yes")
    assert data.train["label"] == [1, 0]
    assert data.task.columns == ("sentence1", "sentence2")
    assert data.task.label_names == data.label_names


def test_any_folder_with_fractions_is_a_regression(tmp_path):
    _tsv(tmp_path / "train.tsv", "sentence1\tlabel", ["a\t0.5", "b\t1"])
    _tsv(tmp_path / "validation.tsv", "sentence1\tlabel", ["c\t1"])
    data = load_task("text", tmp_path)
    assert (data.task.kind, data.num_labels, data.task.columns[1]) == ("regression", 1, None)
    assert data.validation["label"] == [1.0]


def test_validation_label_that_train_lacks(tmp_path):
    _tsv(tmp_path / "train.tsv", "sentence1\tlabel", ["a\tx", "b\ty"])
    path = _tsv(tmp_path / "validation.tsv", "sentence1\tlabel", ["c\tx", "d\tz"])
    message = _message(load_task, "text", tmp_path)
    assert f"{path} line 3: 'label' must be one of the 2 labels 'x', 'y', got 'z'" in message


def test_bad_label_outside_the_subset_is_still_found(cola):
    rows = [f"w{n}\t{n % 2}" for n in range(40)]
    (cola / "cola.train.tsv.gz").unlink()
    for bad in range(0, 40, 13):
        broken = [*rows[:bad], "w0\t7", *rows[bad + 1 :]]
        path = _tsv(cola / "cola.train.tsv", "sentence1\tlabel", broken)
        message = _message(load_task, "cola", cola, max_train=2)
        assert f"{path} line {bad + 2}: 'label' must be one of the 2 labels" in message
        assert "got '7'" in message


@pytest.mark.parametrize("score", ["nan", "high"])
def test_bad_score_names_file_line_and_value(tmp_path, score):
    header = "sentence1\tsentence2\tlabel"
    path = _tsv(tmp_path / "stsb.train.tsv.gz", header, ["a\tb\t1", f"a\tb\t{score}"])
    _tsv(tmp_path / "stsb.dev.tsv", header, ["a\tb\t1"])
    message = _message(load_task, "stsb", tmp_path)
    assert f"{path} line 3: 'label' must be a finite number, got '{score}'" in message


def test_missing_column_and_text_that_is_none(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence1": null, "label": 1}')
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a", "label": 1}')
    message = _message(load_task, "cola", tmp_path)
    assert "train.jsonl line 1: 'sentence1' must be text, got None" in message
    message = _message(load_task, "rte", tmp_path)
    assert "column 'sentence2' must be in the table, got columns 'sentence1', 'label'" in message


def test_subset_repeats_is_nested_and_differs_by_seed(cola):
    def rows(limit: int, seed: int) -> list[str]:
        return load_task("cola", cola, max_train=limit, subset_seed=seed).train["sentence1"]

    everything = load_task("cola", cola).train
    assert rows(20, 0) == rows(20, 0)
    assert rows(8, 0) == rows(20, 0)[:8]
    assert set(rows(20, 0)) != set(rows(20, 1))
    assert rows(40, 0) == rows(99, 0) == everything["sentence1"]
    subset = load_task("cola", cola, max_train=20).train
    labels = dict(zip(everything["sentence1"], everything["label"], strict=True))
    assert subset["label"] == [labels[text] for text in subset["sentence1"]]
    assert len(set(subset["sentence1"])) == 20
    assert len(load_task("cola", cola, max_validation=3).validation) == 3


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "5"])
@pytest.mark.parametrize("field", ["max_train", "max_validation"])
def test_bad_limit(cola, field, limit):
    message = _message(load_task, "cola", cola, **{field: limit})
    assert f"{field} must be an integer >= 1, got {limit!r}" in message


def test_bad_source(cola, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("nowhere", "/no/such", "../a/b", "data/glue"):
        message = _message(load_task, "cola", source)
        assert f"source must be a folder of data files, got {source!r} (no such folder)" in message
    assert "(a file)" in _message(load_task, "cola", cola / "cola.validation.tsv")
    assert "task must be one of" in _message(load_task, "kola", cola)


def test_hub_code_path_on_a_data_set_of_this_machine(tmp_path, monkeypatch):
    # load_dataset reads a local folder as it reads the hub; only the fetching differs.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = {"question": ["a", "b"], "label": [0, 1], "idx": [0, 1]}
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    task = Task(
        name="own",
        columns=("sentence1", None),
        label_names=("no", "yes"),
        kind="classification",
        metrics=("accuracy",),
        main_metric="accuracy",
        hub=HubSource(str(folder), None, ("question", None)),
    )
    data = load_task(task, "hub")
    assert data.train.columns == {"sentence1": ["a", "b"], "label": [0, 1]}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("hub", ("nyu-mll/glue", "cola")),
        ("nyu-mll/glue", ("nyu-mll/glue", "cola")),
        ("some/copy:cola_2", ("some/copy", "cola_2")),
        ("some/copy", ("some/copy", None)),
    ],
)
def test_hub_out_of_reach_points_to_a_folder(monkeypatch, source, wanted):
    asked = []

    def unreachable(path, config, split):
        asked.append((path, config))
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = _message(load_task, "cola", source)
    assert asked == [wanted]
    assert f"got {wanted[0]!r} (config {wanted[1]!r}): ConnectionError: no route" in message
    assert "without a network give a local folder" in message


def test_task_that_the_hub_lacks():
    for name in ("text", "causal_lm"):
        message = _message(load_task, name, "hub")
        assert f"hub name for task '{name}', got 'hub'" in message


def _lines(count: int) -> list[str]:
    return [f"w{n % 50} line-{n}" for n in range(count)]


def test_one_text_is_split_at_95_percent_of_its_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join(_lines(200)) + "\n")
    for source in (path, tmp_path):
        data = load_task("causal_lm", source)
        assert data.train["text"] == _lines(200)[:190]
        assert data.validation["text"] == _lines(200)[190:]
        assert (data.num_labels, data.label_names) == (0, None)


def test_two_texts_are_the_splits(tmp_path):
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "validation.txt.gz").write_bytes(gzip.compress(b"c"))
    (tmp_path / "other.txt").write_text("x")
    data = load_task("causal_lm", tmp_path)
    assert (data.train["text"], data.validation["text"]) == (["a", "b"], ["c"])


def test_subset_of_a_text_is_a_run_of_lines(tmp_path):
    (tmp_path / "book.txt").write_text("\n".join(_lines(200)))
    found = [
        load_task("causal_lm", tmp_path, max_train=30, subset_seed=s).train["text"]
        for s in (0, 0, 1)
    ]
    start = _lines(200).index(found[0][0])
    assert found[0] == found[1] == _lines(200)[start : start + 30]
    assert found[0] != found[2]


def test_bad_texts(tmp_path):
    assert "or one text file" in _message(load_task, "causal_lm", tmp_path)
    (tmp_path / "a.txt").write_text("one line only\n")
    assert "a.txt must have at least 2 lines" in _message(load_task, "causal_lm", tmp_path)
    (tmp_path / "b.txt").write_text("x\ny")
    message = _message(load_task, "causal_lm", tmp_path)
    assert "got a.txt, b.txt; rename the files" in message
    (tmp_path / "train.txt").write_bytes(b"x\n\xff")
    (tmp_path / "dev.txt").write_text("x")
    assert "train.txt line 2 must be UTF-8" in _message(load_task, "causal_lm", tmp_path)


def _pairs(label: list) -> TaskData:
    kind = "regression" if isinstance(label[0], float) else "classification"
    task = Task("t", ("sentence1", "sentence2"), None, kind, (), "accuracy")
    table = Table({"sentence1": ["w0 w1", "w2"], "sentence2": ["w3", "w4 w5"], "label": label})
    return TaskData(task, table, table, 2, None)


@pytest.mark.parametrize(("labels", "dtype"), [([1, 0], "int64"), ([0.5, 2.0], "float32")])
def test_tokenized_pairs(tokenizer, labels, dtype):
    train, validation = tokenize(_pairs(labels), tokenizer, 16)
    assert train[:] == validation[:]
    assert train[0] == {
        "input_ids": [2, 4, 5, 3, 7, 3],
        "attention_mask": [1] * 6,
        "token_type_ids": [0, 0, 0, 0, 1, 1],
        "labels": labels[0],
    }
    assert train.features["labels"].dtype == dtype


def test_tokenized_rows_are_cut_and_not_padded(tokenizer):
    task = Task("t", ("sentence1", None), None, "classification", (), "accuracy")
    table = Table({"sentence1": [" ".join(WORDS), "w0"], "label": [0, 1]})
    train, _ = tokenize(TaskData(task, table, table, 2, None), tokenizer, 8)
    assert [len(ids) for ids in train["input_ids"]] == [8, 3]
    assert train["input_ids"][0][-1] == 3


def test_rows_keep_their_order_across_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr("leantune.train.data._ROWS_PER_CHUNK", 7)
    task = Task("t", ("sentence1", None), None, "classification", (), "accuracy")
    table = Table({"sentence1": WORDS, "label": list(range(50))})
    train, _ = tokenize(TaskData(task, table, table, 50, None), tokenizer, 8)
    assert [ids[1] for ids in train["input_ids"]] == list(range(4, 54))
    assert list(train["labels"]) == list(range(50))


@pytest.mark.parametrize("length", [0, 4, 65, True, 8.0])
def test_bad_max_length(tokenizer, length):
    message = _message(tokenize, _pairs([0, 1]), tokenizer, length)
    assert "max_length must be an integer from 5 to 64" in message
    assert f"got {length!r}" in message


def test_blocks_are_packed_and_the_rest_dropped(tokenizer):
    blocks = tokenize_text("\n".join(WORDS[:11]), tokenizer, 4)
    assert blocks["input_ids"][:] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert blocks["attention_mask"][:] == [[1] * 4] * 2


def test_text_longer_than_the_model_is_fine(tokenizer):
    assert len(tokenize_text(" ".join(WORDS * 4), tokenizer, 50)) == 4


def test_text_shorter_than_a_block(tokenizer):
    message = _message(tokenize_text, "w0 w1 w2", tokenizer, 4)
    assert "text must have at least block_size = 4 tokens, got 3" in message
    for size in (1, 65):
        message = _message(tokenize_text, "w0 w1", tokenizer, size)
        assert "block_size must be an integer from 2 to 64 (the tokenizer's" in message
        assert f"got {size};" in message


def test_language_task_is_tokenized_without_leakage(tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text(" ".join(WORDS[:9]))
    (tmp_path / "dev.txt").write_text(" ".join(WORDS[20:25]))
    train, validation = tokenize(load_task("causal_lm", tmp_path), tokenizer, 4)
    assert train["input_ids"][:] == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert validation["input_ids"][:] == [[24, 25, 26, 27]]


def _numbered(count: int = 6) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"x": [10 * n for n in range(count)]})


class Squares:
    def __init__(self, count: int, field: str = "x"):
        self.count, self.field = count, field

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {self.field: index * index}


def test_arrow_data_set_gets_a_column_that_travels():
    numbered = with_sample_ids(_numbered())
    assert isinstance(numbered, datasets.Dataset)
    assert numbered.features[SAMPLE_ID].dtype == "int64"
    for row in numbered.shuffle(seed=0).select(range(4)):
        assert isinstance(row, dict)
        assert row["x"] == 10 * row[SAMPLE_ID]


def test_ids_count_the_rows_as_given():
    chosen = with_sample_ids(_numbered().select([4, 2]))
    assert [(row["x"], row[SAMPLE_ID]) for row in chosen] == [(40, 0), (20, 1)]
    assert len(with_sample_ids(_numbered(0))) == 0


def test_format_is_kept_and_shows_the_id():
    shown = _numbered().add_column("y", list("abcdef")).with_format("torch", columns=["x"])
    row = with_sample_ids(shown)[3]
    assert set(row) == {"x", SAMPLE_ID}
    assert torch.equal(row["x"], torch.tensor(30))
    assert torch.equal(row[SAMPLE_ID], torch.tensor(3))


def test_transformed_data_set_is_wrapped():
    doubled = _numbered().with_transform(lambda batch: {"z": [2 * x for x in batch["x"]]})
    assert with_sample_ids(doubled)[2] == {"z": 40, SAMPLE_ID: 2}


def test_any_map_style_data_set_is_wrapped():
    wrapped = with_sample_ids(Squares(5))
    assert [wrapped[i] for i in range(5)] == [{"x": i * i, SAMPLE_ID: i} for i in range(5)]
    assert wrapped[-1] == {"x": 16, SAMPLE_ID: 4}
    assert list(wrapped) == [wrapped[i] for i in range(len(wrapped))]
    for index in (5, -6):
        with pytest.raises(IndexError, match="out of range for 5"):
            wrapped[index]
    assert pickle.loads(pickle.dumps(wrapped))[3] == wrapped[3]
    assert with_sample_ids([{"x": 1}])[0] == {"x": 1, SAMPLE_ID: 0}


def test_wrapped_data_set_loads_in_batches():
    generator = torch.Generator().manual_seed(0)
    seen = []
    for batch in DataLoader(with_sample_ids(Squares(10)), 4, shuffle=True, generator=generator):
        assert torch.equal(batch["x"], batch[SAMPLE_ID] ** 2)
        seen += batch[SAMPLE_ID].tolist()
    assert sorted(seen) == list(range(10)) != seen


def test_taken_field_is_refused():
    for dataset in (
        with_sample_ids(_numbered()),
        with_sample_ids(Squares(3)),
        Squares(3, SAMPLE_ID),
    ):
        message = _message(with_sample_ids, dataset)
        assert "field 'sample_id' must be free" in message
        assert "if it was made already" in message


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (iter([]), "list_iterator"),
        (_numbered().to_iterable_dataset(), "IterableDataset"),
        (datasets.DatasetDict({"train": _numbered()}), "DatasetDict"),
        (3, "int"),
    ],
)
def test_what_is_not_map_style_is_refused(dataset, name):
    message = _message(with_sample_ids, dataset)
    assert "dataset must be map-style (__len__ and __getitem__)" in message
    assert f"got {name};" in message


def test_examples_must_be_mappings():
    message = _message(with_sample_ids, TensorDataset(torch.zeros(2, 3)))
    assert "examples must be mappings of field to value, got tuple at index 0" in message
