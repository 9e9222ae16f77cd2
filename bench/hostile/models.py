"""What a run loads: models, tokenizers, configurations, and the code that may lie beside them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.hostile.case import Cases, command
from bench.hostile.runs import tiny_inputs, write_inputs, write_text_inputs

CASES = Cases("models", prepare=tiny_inputs)


def _config(folder: Path, changes: dict[str, Any], name: str = "config.json") -> None:
    arguments = write_inputs(folder)
    path = folder / "model" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    command(*arguments)


CONFIGS: dict[str, dict[str, Any]] = {
    "heads that do not divide the width": {"num_attention_heads": 3},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -2},
    "a width of 0": {"hidden_size": 0},
    "a negative width": {"hidden_size": -16},
    "a width that is text": {"hidden_size": "wide"},
    "a width that is null": {"hidden_size": None},
    "a width of 10^9": {"hidden_size": 10**9},
    "a width beyond 2^63": {"hidden_size": 2**64},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
    "a vocabulary of 3": {"vocab_size": 3},
    "a negative vocabulary": {"vocab_size": -1},
    "10^9 layers": {"num_hidden_layers": 10**9},
    "negative layers": {"num_hidden_layers": -1},
    "more layers than the weights": {"num_hidden_layers": 3},
    "an FFN of 10^12": {"intermediate_size": 10**12},
    "an unknown activation": {"hidden_act": "magic"},
    "a dropout of 2": {"hidden_dropout_prob": 2.0},
    "a dropout that is text": {"hidden_dropout_prob": "much"},
    "an unknown type": {"model_type": "magic"},
    "a type that is a number": {"model_type": 3},
    "another type": {"model_type": "llama"},
    "a padding id beyond the vocabulary": {"pad_token_id": 10**6},
    "10^12 positions": {"max_position_embeddings": 10**12},
    "2 positions": {"max_position_embeddings": 2},
    "an attention that is unknown": {"attn_implementation": "magic"},
    "a dtype that is unknown": {"dtype": "float3"},
}
for _what, _changes in CONFIGS.items():
    _run = partial(_config, changes=_changes)
    CASES.add(_what, "refused", f"A config.json with {_what}", _run)

FILES: dict[str, tuple[str, bytes | None]] = {
    "no config.json": ("config.json", None),
    "an empty config.json": ("config.json", b""),
    "a config.json that is a list": ("config.json", b"[1]"),
    "a config.json of 100,000 brackets": ("config.json", b"[" * 100_000),
    "a config.json that is no text": ("config.json", b"\xff\xfe\x00"),
    "no weights": ("model.safetensors", None),
    "empty weights": ("model.safetensors", b""),
    "weights that are no file of weights": ("model.safetensors", b"words " * 100),
    "weights with a header of 2^62 bytes": ("model.safetensors", b"\xff" * 7 + b"\x3f" + b"{}"),
    "no tokenizer": ("tokenizer.json", None),
    "an empty tokenizer": ("tokenizer.json", b""),
    "a tokenizer that is a list": ("tokenizer.json", b"[]"),
    "a tokenizer of 100,000 brackets": ("tokenizer.json", b"[" * 100_000),
    "a tokenizer's configuration that is a list": ("tokenizer_config.json", b"[]"),
}


def _file(folder: Path, name: str, content: bytes | None) -> None:
    arguments = write_inputs(folder)
    path = folder / "model" / name
    if content is None:
        path.unlink()
        if name == "tokenizer.json":
            # It says what the other would.
            (folder / "model" / "tokenizer_config.json").unlink()
    else:
        path.write_bytes(content)
    command(*arguments)


for _what, (_name, _content) in FILES.items():
    _run = partial(_file, name=_name, content=_content)
    CASES.add(_what, "refused", f"A model's folder with {_what}", _run)


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    arguments = write_inputs(folder)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path, {"format": "pt"})
    command(*arguments)


KEY = "encoder.layer.0.attention.self.query.weight"
WEIGHTS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "one tensor missing": lambda t: {name: v for name, v in t.items() if name != KEY},
    "one tensor of another shape": lambda t: t | {KEY: torch.zeros(3, 3)},
    "one tensor of NaN": lambda t: t | {KEY: t[KEY] * float("nan")},
    "one infinite value": lambda t: t | {KEY: t[KEY] / 0},
    "all under other names": lambda t: {f"other.{name}": v for name, v in t.items()},
    "no tensors": lambda t: {"other": torch.zeros(1)},
}
for _what, _change in WEIGHTS.items():
    CASES.add(_what, "refused", f"Weights with {_what}", partial(_weights, change=_change))


def _pickle(folder: Path, content: bytes | None) -> None:
    arguments = write_inputs(folder)
    path = folder / "model" / "pytorch_model.bin"
    if content is None:
        torch.save(load_file(folder / "model" / "model.safetensors"), path)
    else:
        path.write_bytes(content)
    (folder / "model" / "model.safetensors").unlink()
    try:
        command(*arguments)
    finally:
        assert not (folder / "harmed").exists()


CASES.add(
    "a pickle", "works", "A model with a pickle of tensors alone", partial(_pickle, content=None)
)
HARM = b"cos\nsystem\n(S'touch harmed'\ntR."
CASES.add(
    "a pickle that runs code",
    "refused",
    "A model whose pickle runs a command",
    partial(_pickle, content=HARM),
)

CODE = """
from pathlib import Path
Path("harmed").touch()
from transformers import {base} as Own
"""


def _own_code(folder: Path, *options: str, of: str, typed: str) -> None:
    """Put code beside a model, which leaves a file where it runs."""
    arguments = write_inputs(folder, *options)
    model = folder / "model"
    if of == "tokenizer":
        path, kind = model / "tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}
        base, changes = "PreTrainedTokenizerFast", {"tokenizer_class": "Own"}
    else:
        path, kind = model / "config.json", {"AutoConfig": "own.Own"}
        base, changes = "BertConfig", {"model_type": "own"}
    (model / "own.py").write_text(CODE.format(base=base))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes | {"auto_map": kind}))
    try:
        command(*arguments, typed=typed)
    finally:
        assert not (folder / "harmed").exists(), "the code ran"


for _of in ("model", "tokenizer"):
    for _typed in ("", "y\n" * 5):
        _what = f"Code of a {_of}, {'y typed' if _typed else 'nothing typed'}: it does not run"
        # Of a tokenizer the class is not needed: tokenizer.json says it all.
        _expected = "refused" if _of == "model" else "works"
        CASES.add(_what, _expected, _what, partial(_own_code, of=_of, typed=_typed))


@CASES.works
def code_that_is_trusted(folder: Path) -> str:
    """Code of a tokenizer, with trust_remote_code=true."""
    try:
        _own_code(folder, "trust_remote_code=true", of="tokenizer", typed="")
    except AssertionError as error:
        assert str(error) == "the code ran", error
        return "ran"
    raise AssertionError("the code did not run")


@CASES.refused
def tokenizer_of_a_larger_model(folder: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings."""
    arguments = write_inputs(folder)
    path = folder / "model" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["good"] = 64
    path.write_text(json.dumps(data))
    command(*arguments)


@CASES.refused
def tokenizer_without_padding(folder: Path) -> None:
    """A tokenizer without a padding and an end token."""
    _config(folder, {"pad_token": None, "eos_token": None}, "tokenizer_config.json")


@CASES.refused
def encoder_for_a_language_model(folder: Path) -> None:
    """A model that sees both sides for task causal_lm."""
    command(*write_text_inputs(folder, "model=model"))


@CASES.refused
def a_head_of_other_classes(folder: Path) -> None:
    """A base whose head has another number of classes."""
    command(*write_inputs(folder, "output=first"))
    lines = "sentence1\tlabel\n" + "".join(f"w{i}\tclass {i % 3}\n" for i in range(9))
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.tsv").write_text(lines)
    shutil.rmtree(folder / "model")
    shutil.move(folder / "first" / "model", folder / "model")
    command("train", "task=text", "model=model", "data=data", "output=run", "max_length=32")


@CASES.refused
def model_is_a_file(folder: Path) -> None:
    """A model that is a file."""
    command(*write_inputs(folder, "model=text.txt"))


@CASES.refused
def model_is_missing(folder: Path) -> None:
    """A model that is no folder, without a network."""
    command(*write_inputs(folder, "model=nowhere"))


@CASES.refused
def model_is_the_data(folder: Path) -> None:
    """A model that is the folder of data."""
    command(*write_inputs(folder, "model=data"))
