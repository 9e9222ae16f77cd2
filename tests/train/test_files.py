"""Local tables are read exactly, or the fault is named with file and line."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.errors import ConfigError
from leantune.train.files import (
    find_split,
    find_text_split,
    list_folder,
    load_table,
    read_table,
    read_text,
    require_folder,
)


def _write(path: Path, data: str | bytes) -> Path:
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _message(call, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


_FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), max_size=20)


@settings(deadline=None)  # the disk may be slow
@given(
    rows=st.lists(st.tuples(_FIELD, _FIELD, _FIELD), min_size=1, max_size=8),
    zipped=st.booleans(),
)
def test_tsv_round_trip_has_no_quoting(tmp_path_factory, rows, zipped):
    text = "a\tb\tc\n" + "".join("\t".join(row) + "\n" for row in rows)
    path = tmp_path_factory.getbasetemp() / ("t.tsv.gz" if zipped else "t.tsv")
    assert read_table(_write(path, text)) == {
        name: [row[i] for row in rows] for i, name in enumerate("abc")
    }


def test_tsv_keeps_a_bare_quote_that_csv_rules_would_swallow(tmp_path):
    path = _write(tmp_path / "t.tsv", 'sentence1\tlabel\n"open quote\t1\nplain "x" end\t0\n')
    assert read_table(path)["sentence1"] == ['"open quote', 'plain "x" end']
    with path.open(newline="") as file:
        assert len(list(csv.reader(file, delimiter="\t"))) == 2, "a quoting reader merges the rows"


@pytest.mark.parametrize("separator", ["\x0b", "\x85", "\u2028", "\x1c", "\r"])
def test_tsv_lines_end_at_newlines_only(tmp_path, separator):
    path = _write(tmp_path / "t.tsv", f"a\tb\nx{separator}y\t1\n")
    assert read_table(path) == {"a": [f"x{separator}y"], "b": ["1"]}


def test_windows_line_ends_and_byte_order_mark_are_no_data(tmp_path):
    path = _write(tmp_path / "t.tsv", "\ufeffa\tb\r\nx\t1\r\ny\t2\r\n")
    assert read_table(path) == {"a": ["x", "y"], "b": ["1", "2"]}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv_follows_its_quoting_and_keeps_the_lines(tmp_path, suffix):
    path = _write(tmp_path / f"t{suffix}", 'a,b\n"x, ""y""\nz",1\nplain,2\n')
    table = load_table(path)
    assert table.columns == {"a": ['x, "y"\nz', "plain"], "b": ["1", "2"]}
    assert [table.place(row) for row in range(2)] == [f"{path} line 2", f"{path} line 4"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_json_lines_keep_their_types(tmp_path, suffix):
    rows = [{"a": "x\ty", "b": 1}, {"b": 0.5, "a": None}]
    path = _write(tmp_path / f"t{suffix}", "\n".join(map(json.dumps, rows)))
    assert read_table(path) == {"a": ["x\ty", None], "b": [1, 0.5]}
    assert load_table(path).place(1) == f"{path} line 2"


def test_parquet_keeps_its_types_and_names_rows(tmp_path):
    columns = {"a": ["x", "y"], "b": [1.5, None]}
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read_table(path) == columns
    assert load_table(path).place(1) == f"{path} row 1 (counted from 0)"


def test_missing_file_names_it_and_the_neighbours(tmp_path):
    _write(tmp_path / "train.tsv", "a\n1\n")
    message = _message(read_table, tmp_path / "trian.tsv")
    assert "file must exist" in message
    assert "trian.tsv" in message
    assert "holds train.tsv" in message
    assert "no " + str(tmp_path / "x") in _message(read_table, tmp_path / "x" / "t.tsv")


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "t.csv").mkdir()
    message = _message(read_table, tmp_path / "t.csv")
    assert "must be readable" in message
    assert "directory" in message


@pytest.mark.parametrize("suffix", [".tsv", ".csv.gz", ".jsonl", ".parquet", ".json"])
@pytest.mark.parametrize("data", [b"", b"\n"])
def test_empty_file(tmp_path, suffix, data):
    if suffix == ".parquet":
        data = b""
    path = _write(tmp_path / f"t{suffix}", data)
    assert f"{path} must not be empty" in _message(read_table, path)


def test_zero_byte_gzip(tmp_path):
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(b"")
    assert "must not be empty, got 0 bytes" in _message(read_table, path)


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "t.csv"])
def test_header_only(tmp_path, name):
    path = _write(tmp_path / name, "a\n")
    message = _message(read_table, path)
    assert f"{path} must hold at least one row, got a header only" in message


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    assert "must hold at least one row" in _message(read_table, path)


@pytest.mark.parametrize(
    ("name", "text", "line", "got"),
    [
        ("t.tsv", "a\tb\nx\t1\ny\n", 3, 1),
        ("t.tsv.gz", "a\tb\nx\t1\ty\n", 2, 3),
        ("t.tsv", "a\tb\nx\t1\n\ny\t2\n", 3, 1),
        ("t.csv", 'a,b\n"x\n\n",1\ny,2,3\n', 5, 3),
        ("t.csv", "a,b\nx,1\n\ny,2\n", 3, 0),
    ],
)
def test_row_with_another_number_of_fields(tmp_path, name, text, line, got):
    path = _write(tmp_path / name, text)
    message = _message(read_table, path)
    assert f"{path} line {line} must have 2 fields as the header, got {got};" in message
    assert ("no quoting" if "tsv" in name else "quote fields") in message


@pytest.mark.parametrize(("text", "line"), [('a,b\nx,1\n"y"z,2\n', 3), ('a,b\n"x,1\n', 2)])
def test_broken_csv_quoting(tmp_path, text, line):
    path = _write(tmp_path / "t.csv", text)
    assert f"{path} line {line} must be a CSV record" in _message(read_table, path)


@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
def test_column_named_twice(tmp_path, name):
    text = "a\tb\ta\n1\t2\t3\n".replace("\t", "\t" if name == "t.tsv" else ",")
    message = _message(read_table, _write(tmp_path / name, text))
    assert "line 1 must name each column once, got 'a' 2 times" in message


@pytest.mark.parametrize(
    ("text", "line", "got"),
    [
        ('{"a": 1}\n{"a": 2\n', 2, "'{\"a\": 2'"),
        ('{"a": 1}\n\n{"a": 2}\n', 2, "''"),
        ("[1, 2]\n", 1, "a list"),
        ('{"a": 1}\n{"b": 1}\n', 2, "1 (b)"),
        ('{"a": 1}\n{"a": 1, "b": 1}\n', 2, "2 (a, b)"),
    ],
)
def test_bad_json_line(tmp_path, text, line, got):
    path = _write(tmp_path / "t.jsonl", text)
    message = _message(read_table, path)
    assert f"{path} line {line} must" in message
    assert f"got {got}" in message
    assert "one JSON object per line" in message


def test_no_such_column_lists_those_found(tmp_path):
    path = _write(tmp_path / "t.tsv", "idx\ttext\n0\tx\n")
    assert read_table(path, required=("text",))["text"] == ["x"]
    message = _message(read_table, path, required=("idx", "label"))
    assert f"{path}: column 'label' must be in the table, got columns 'idx', 'text'" in message


@pytest.mark.parametrize("name", ["t.txt", "t.xlsx", "t", "t.parquet.gz", "t.gz"])
def test_unknown_suffix(tmp_path, name):
    message = _message(read_table, _write(tmp_path / name, "a\n1\n"))
    assert "suffix must be one of .tsv .tsv.gz .csv" in message
    assert f"got {name!r}" in message


def _gzipped() -> bytes:
    rows = "".join(f"sentence number {n * n}\t{n % 2}\n" for n in range(2000))
    return gzip.compress(("a\tb\n" + rows).encode())


@pytest.mark.parametrize("reader", [read_table, read_text])
@pytest.mark.parametrize("kept", [5, 100, -9, -8, -1])
def test_truncated_gzip(tmp_path, reader, kept):
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(_gzipped()[:kept])
    message = _message(reader, path)
    assert f"{path} must be a whole gzip file, got a truncated one" in message
    assert "fetch the file again" in message


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"a\tb\nx\t1\n", id="not-gzip"),
        pytest.param(lambda data: data[:200] + b"\xff" * 40 + data[240:], id="body"),
        pytest.param(lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], id="checksum"),
        pytest.param(lambda data: data + b"trailing", id="trailing"),
    ],
)
def test_broken_gzip(tmp_path, damage):
    path = tmp_path / "t.tsv.gz"
    path.write_bytes(damage(_gzipped()))
    assert f"{path} must be a gzip file, got broken data" in _message(read_table, path)


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "t.csv", "t.jsonl.gz", "t.json"])
def test_invalid_utf8_names_the_line(tmp_path, name):
    path = _write(tmp_path / name, "a\nfine \u00e9\n".encode() + b"caf\xe9 latin\nmore\n")
    message = _message(read_table, path)
    assert f"{path} line 3 must be UTF-8, got byte 0xe9" in message
    assert "iconv" in message


def test_broken_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} must be a Parquet file, got broken data" in _message(read_table, path)


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "book"])
def test_plain_text(tmp_path, name):
    assert read_text(_write(tmp_path / name, "\ufeffone\ntwo \u00e9\n")) == "one\ntwo \u00e9\n"


def test_bad_plain_text(tmp_path):
    assert "must not be empty" in _message(read_text, _write(tmp_path / "t.txt", "\n\n"))
    path = _write(tmp_path / "u.txt", b"one\n\xff\n")
    assert f"read_text: {path} line 2 must be UTF-8, got byte 0xff" in _message(read_text, path)
    assert "file must exist" in _message(read_text, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train", "cola.train.tsv.gz"),
        ("train", "train.parquet"),
        ("train", "cola/train.tsv"),
        ("validation", "cola.validation.jsonl"),
        ("validation", "dev.csv"),
        ("validation", "cola/dev.tsv"),
        ("validation", "valid.json.gz"),
        ("validation_matched", "dev_matched.tsv"),
        ("validation_matched", "cola.validation_matched.tsv"),
        ("test", "test.tsv"),
    ],
)
def test_split_is_found(tmp_path, split, name):
    (tmp_path / "cola").mkdir()
    for other in ("rte.train.tsv", "train.txt", "cola.train.bak", "training.tsv"):
        _write(tmp_path / other, "x")
    _write(tmp_path / name, "x")
    assert find_split(tmp_path, "cola", split) == tmp_path / name


def test_no_split_says_what_was_looked_for_and_what_is_there(tmp_path):
    _write(tmp_path / "cola.train.txt", "x")
    (tmp_path / "sub").mkdir()
    message = _message(find_split, tmp_path, "cola", "validation")
    assert "'validation' file of task 'cola'" in message
    for stem in ("cola.validation", "dev", "cola/dev", ".tsv.gz", ".parquet"):
        assert stem in message
    assert "got cola.train.txt, sub/;" in message


@pytest.mark.parametrize("other", ["cola.train.tsv.gz", "train.tsv", "cola/train.csv"])
def test_two_candidates_are_refused(tmp_path, other):
    (tmp_path / "cola").mkdir()
    names = {"cola.train.tsv", other}
    for name in names:
        _write(tmp_path / name, "x")
    message = _message(find_split, tmp_path, "cola", "train")
    assert "split 'train' must have one file, got 2" in message
    assert all(str(tmp_path / name) in message for name in names)
    assert "remove or rename" in message


def test_unknown_split_and_missing_folder(tmp_path):
    assert "split must be one of train, validation" in _message(find_split, tmp_path, "t", "eval")
    assert "no such folder" in _message(find_split, tmp_path / "none", "t", "train")
    file = _write(tmp_path / "f", "x")
    assert "(a file)" in _message(require_folder, file, "who")


def test_text_split(tmp_path):
    assert find_text_split(tmp_path, "causal_lm", "train") is None
    path = _write(tmp_path / "train.txt.gz", "x")
    assert find_text_split(tmp_path, "causal_lm", "train") == path
    _write(tmp_path / "train.txt", "x")
    assert "must have one file, got 2" in _message(find_text_split, tmp_path, "t", "train")


def test_long_listing_is_cut(tmp_path):
    for n in range(23):
        (tmp_path / f"f{n:02d}").touch()
    assert list_folder(tmp_path).endswith("f19 and 3 more")
    (tmp_path / "empty").mkdir()
    assert list_folder(tmp_path / "empty") == "nothing"
