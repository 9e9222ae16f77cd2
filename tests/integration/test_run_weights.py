"""Runs whose weights are frozen, in bfloat16 or in few bits: what trains, what is kept of it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from integration.tiny import cut_off, same, saved_weights, tokenizer
from safetensors.torch import load_file
from torch import Tensor

import leantune as lt
from leantune.core.linear import is_quantised
from leantune.training.recipe import RunRecipe
from leantune.training.weights import quantise

pytestmark = [
    # peft asks transformers for names that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # peft says that it cannot merge what was not quantised through transformers.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LORA = lt.LoRA(rank=4)


def test_what_is_frozen_stays_and_costs_no_gradient(base: dict[str, Any]) -> None:
    patterns = ["embeddings", r"re:^bert\.encoder\.layer\.0\.", "classifier.bias"]
    result = lt.train(base, freeze=patterns, compare=["baseline"], epochs=1)
    start = load_file(Path(base["model"]) / "model.safetensors")
    trained = saved_weights(base["output"])
    for name, value in start.items():
        is_frozen = name.startswith(("embeddings.", "encoder.layer.0."))
        assert torch.equal(trained[f"bert.{name}"], value) == is_frozen, name
    for run in result.runs:
        frozen = {e["module"] for e in run.ledger["entries"] if e["kind"] == "frozen parameter"}
        assert {"bert.embeddings.word_embeddings", "classifier"} <= frozen
        held = {e["module"] for e in run.ledger["entries"] if e["ledger"] == "gradients"}
        assert held and not any("embeddings" in name or ".layer.0." in name for name in held)


def test_a_pattern_that_freezes_nothing_or_all_is_named(base: dict[str, Any]) -> None:
    patterns: Any
    for patterns, message in (
        (["embedings"], r"freeze must fit .* got 'embedings'.* near it: bert\.embeddings"),
        (["re:("], "freeze must hold valid regular expressions"),
        (["*"], "freeze must leave something to train"),
        ([""], "freeze must be a list of patterns"),
        (3, "freeze must be a list of patterns"),
    ):
        with pytest.raises(lt.LeantuneError, match=f"RunRecipe: {message}"):
            lt.train(base, methods=[], freeze=patterns)
    with pytest.raises(lt.ConfigError, match=r"what a method trains, got classifier.*train_head"):
        lt.train(base, methods=["lora"], freeze="classifier")
    assert not Path(base["output"]).exists()
    methods = [lt.LoRA(rank=2, train_head=False)]
    lt.train(base, methods=methods, freeze="*", max_steps=2)


@pytest.fixture
def llama_run(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Options of a LoRA run of four steps on a tiny language model."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("good w1 w2 w3 bad w4\n" * 60)
    more = {"model": str(tmp_path / "llama"), "task": "causal_lm", "max_length": 8, "max_steps": 4}
    more |= {"methods": [LORA, lt.Checkpoint()], "save_steps": 1, "eval_steps": 4}
    return {**base, **more, "data": str(tmp_path / "text.txt")}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 21).view(2, 8)).logits.float()


def plain(run: dict[str, Any]) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantised_base_leaves_an_adapter_that_merges_into_the_plain_one(
    llama_run: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes" if kind == "nf4" else "torchao")
    llama_run["quantize"] = kind
    result = lt.train(llama_run, output=tmp_path / "whole")
    cut_off(tmp_path / "whole", llama_run["output"], 3)
    lt.train(llama_run, resume=True)
    for name in ("adapter/adapter_model", "session/weights"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("run", "whole"))
        assert same(a, b) and any(value.any() for key, value in a.items() if "lora_B" in key)
    output = Path(llama_run["output"])
    assert not (output / "model").exists()
    entries = [e for e in result.runs[0].ledger["entries"] if e["kind"] == "frozen parameter"]
    packed = sum(e["num_bytes"] for e in entries if "_proj" in e["module"])
    num = sum(p.numel() for n, p in plain(llama_run).named_parameters() if "_proj" in n)
    # A byte for each, which torchao spends on four bits as well, and half of one in NF4; for a row
    # or a group a scale and perhaps a zero point. NF4 has tables for each of the 14 linears.
    each, tables = (0.5, 14 * 1200) if kind == "nf4" else (1, 0)
    assert each * num < packed <= num * (each + 8 / 32) + tables

    twin = plain(llama_run)
    quantise(twin, kind)
    assert sum(is_quantised(module) for module in twin.modules()) == 14
    lt.load(twin, output / "session")
    adapted = peft.PeftModel.from_pretrained(plain(llama_run), output / "adapter")
    assert 0 < (logits(twin) - logits(adapted)).abs().max() < 0.2
    assert lt.merge_checkpoint(output, tmp_path / "merged") == ["lora", "checkpoint"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == 53


def test_a_classifier_beside_few_bits_keeps_its_head(base: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    base |= {"methods": [LORA], "quantize": "int8", "max_steps": 2}
    lt.train(base)
    lt.merge_checkpoint(base["output"], tmp_path / "merged")
    head = load_file(tmp_path / "merged" / "model.safetensors")["classifier.weight"]
    trained = load_file(Path(base["output"]) / "adapter" / "adapter_model.safetensors")
    assert torch.equal(head, trained["base_model.model.classifier.weight"])


def test_weights_in_few_bits_must_not_train(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any
    for options, names in (
        ({}, "wta_crs"),
        ({"methods": []}, "baseline"),
        ({"methods": [LORA], "compare": ["baseline", "wta_crs"]}, "baseline, wta_crs"),
    ):
        message = rf"quantize must be None .* got 'int8' for {names}; add lora"
        with pytest.raises(lt.ConfigError, match=message):
            lt.train(base, quantize="int8", **options)
    base["methods"] = [LORA]
    with pytest.raises(lt.UnsupportedError, match=r"for int4 one that reads a multiple of 32 .*16"):
        lt.train(base, quantize="int4")
    ways = {"int8": ("torchao", r"'leantune\[quant\]'"), "nf4": ("bitsandbytes", "bitsandbytes")}
    for kind, (package, way) in ways.items():
        find = "leantune.core.extras.importlib.util.find_spec"
        monkeypatch.setattr(find, lambda name, lacks=package: None if name == lacks else name)
        with pytest.raises(lt.UnsupportedError, match=rf"package {package} must .* install {way}$"):
            lt.train(base, quantize=kind)
    assert not Path(base["output"]).exists()


def test_bfloat16_weights_train_as_such_but_factors_do_not(
    base: dict[str, Any], llama_run: dict[str, Any], tmp_path: Path
) -> None:
    full = lt.train(base, dtype="bf16", max_steps=2, output=tmp_path / "full")
    entries = full.runs[0].ledger["entries"]
    weights = saved_weights(tmp_path / "full")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    num = sum(value.numel() for value in weights.values())
    assert sum(e["num_bytes"] for e in entries if e["kind"] == "parameter") == 2 * num

    lt.train(llama_run, dtype="bf16")
    factors = load_file(Path(llama_run["output"]) / "session" / "weights.safetensors")
    assert {value.dtype for value in factors.values()} == {torch.float32}
    merged = lt.merge_checkpoint(llama_run["output"], tmp_path / "merged")
    assert merged == ["lora", "checkpoint"]
    for folder in (llama_run["output"], tmp_path):
        name = "model" if folder != tmp_path else "merged"
        tensors = load_file(Path(folder) / name / "model.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    with pytest.raises(lt.ConfigError, match="precision must be 'float32' or 'bf16' where dtype"):
        RunRecipe(**llama_run, dtype="bf16", precision="fp16")
