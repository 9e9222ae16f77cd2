"""Bytes of a LoRA step on quantised bases, in the shape of SmolLM2-135M: exact, not timed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import leantune as lt
from bench import rows
from bench.quality import NO_ROWS
from bench.timing import LEFT_OUT

RESULT = "quantised_bytes"
SHAPE = (2, 256)


def _int8(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.get_submodule("model.layers"), Int8WeightOnlyConfig())


def _nf4(model: nn.Module) -> None:
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    layers = model.get_submodule("model.layers")
    found = [(m, n, c) for m in layers.modules() for n, c in m.named_children()]
    for parent, name, old in found:
        if isinstance(old, nn.Linear):
            new = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            weight = old.weight.data
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            setattr(parent, name, new.to("cpu"))


BASES: dict[str, Callable[[nn.Module], None]] = {
    "bfloat16": lambda model: None,
    "torchao int8": _int8,
    "bitsandbytes NF4": _nf4,
}
RECIPES = {
    "LoRA": (),
    "WTA-CRS 0.1": (lt.WTACRS(keep_ratio=0.1),),
    "Checkpoint": (lt.Checkpoint(),),
}


def main() -> None:
    """Count the bytes of each base whose library is installed, then print the table."""
    found: list[dict[str, Any]] = []
    for base in BASES:
        try:
            found += _measure(base)
        except ImportError as error:
            print(f"{LEFT_OUT}{base}: {error}")
    rows.replace(RESULT, ("base", "recipe"), found)
    print(summary())


def _measure(base: str) -> Iterator[dict[str, Any]]:
    for name, methods in RECIPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).requires_grad_(False)
        BASES[base](model)
        lt.apply(model, lt.LoRA(rank=16), *methods)
        ids = torch.randint(config.vocab_size or 0, SHAPE)
        book = lt.ledger(model, {"input_ids": ids, "labels": ids})
        copies = book.by_kind(ledger="activations").get("linear weight copy", 0)
        yield {
            "base": base,
            "recipe": name,
            "weight_bytes": book.weights,
            "saved_bytes": book.activations,
            "copy_bytes": copies,
        }


def summary() -> str:
    """Return mebibytes of each base under each recipe, as Markdown."""
    return rows.by_device(rows.read(RESULT), _table) or NO_ROWS


def _table(found: list[dict[str, Any]]) -> str:
    def mib(row: dict[str, Any] | None, key: str) -> str:
        return "" if row is None else f"{row[key] / 2**20:.1f}"

    by_key = {(r["base"], r["recipe"]): r for r in found}
    lines = []
    for base in BASES:
        of = {name: by_key.get((base, name)) for name in RECIPES}
        if any(of.values()):
            line = {name: mib(row, "saved_bytes") for name, row in of.items()}
            plain = of["LoRA"]
            copies, weights = mib(plain, "copy_bytes"), mib(plain, "weight_bytes")
            lines.append({"base": base, "weights": weights, "copies": copies, **line})
    heads = {"base": "base", "weights": "weights", "LoRA": "saved for backward"}
    heads |= {"copies": "of it copies of weights", "WTA-CRS 0.1": "with `WTACRS(0.1)`"}
    return rows.table(lines, heads | {"Checkpoint": "with `Checkpoint()`"})
