"""What is loaded is whole, fits, and runs no code of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import bert, tokenizer
from safetensors.torch import load_file, save_file

import leantune as lt
from leantune.training.data import get_task
from leantune.training.models import build_model, load_model, load_tokenizer

KEY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bert().bert.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> Any:
    return load_model(str(folder), get_task("text"), ("0", "1"), tokenizer())


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": -2}, "num_attention_heads of .* must be from 1 to 10,000, got -2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of .* got 1000000000"),
        ({"vocab_size": 2**70}, "vocab_size of .* must be from 1"),
        ({"num_hidden_layers": 3}, "without bert.encoder.layer.2"),
        ({"hidden_size": None}, "that transformers can load"),
    ],
)
def test_an_impossible_config_is_named(folder: Path, changes: Any, message: str) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(lt.ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads of .* must be from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of .* got 1000000000"),
        ({"pad_token_id": 1000}, "AssertionError: Padding_idx"),
        ({"hidden_act": "none"}, "KeyError: 'none'"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(folder: Path, changes: Any, message: str) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(lt.ConfigError, match=message):
        build_model(str(folder))


@pytest.mark.parametrize("named", [None, [], [3], {"a": 1}, "BertModel", ["NoSuchModel"]])
def test_a_class_that_no_one_has_is_the_plain_model(folder: Path, named: Any) -> None:
    change(folder / "config.json", architectures=named)
    assert type(build_model(str(folder))).__name__ == "BertModel"


def test_a_config_that_asks_for_tuples_still_gives_a_loss_by_name(folder: Path) -> None:
    change(folder / "config.json", return_dict=False)
    ids = torch.ones(1, 4, dtype=torch.long)
    assert load(folder)(input_ids=ids, labels=torch.tensor([1])).loss.isfinite()


def test_a_tokenizer_must_know_words(folder: Path) -> None:
    assert len(load_tokenizer(str(folder))) == len(tokenizer())
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(lt.ConfigError, match="must have a vocabulary, got special tokens alone"):
        load_tokenizer(str(folder))


def test_weights_must_be_whole_and_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, KEY: tensors[KEY] * torch.nan}, path, {"format": "pt"})
    with pytest.raises(lt.ConfigError, match=f"must be finite, got bert.{KEY} with NaN"):
        load(folder)
    save_file({k: v for k, v in tensors.items() if k != KEY}, path, {"format": "pt"})
    with pytest.raises(lt.ConfigError, match=f"without bert.{KEY} "):
        load(folder)
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, path, {"format": "pt"})
    assert load(folder).classifier.weight.shape == (2, 16)


def test_code_beside_a_model_runs_only_where_it_is_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *_: answers.append("y") or "y")
    ran = folder / "ran"
    code = "from transformers import BertConfig\nclass Own(BertConfig):\n    pass\n"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n{code}")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    with pytest.raises(lt.ConfigError, match=r"set trust_remote_code: true"):
        load(folder)
    assert not ran.exists() and not answers
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "code"))
    # It brings a configuration and no model.
    with pytest.raises(lt.ConfigError, match="AutoModel"):
        load_model(str(folder), get_task("text"), None, tokenizer(), trust_remote_code=True)
    assert ran.exists()
