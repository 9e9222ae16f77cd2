"""The memory and time of whole training steps: weights, gradients, AdamW and activations.

The models and batches are those of WTA-CRS's memory table, in float32, with random weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import leantune as lt
from bench.cases.wta_crs_speed import Recipe
from bench.timing import TIMES, Bench, settle
from leantune.measure.peak import compare_steps

_LORA = lt.LoRA(rank=16)
_03, _01 = lt.WTACRS(keep_ratio=0.3), lt.WTACRS(keep_ratio=0.1)
RECIPES: dict[str, Recipe] = {
    "full": lambda: (),
    "LoRA": lambda: (_LORA,),
    "LoRA + WTA-CRS 0.3": lambda: (_LORA, _03),
    "LoRA + MLP recomputed + WTA-CRS 0.3": lambda: (_LORA, lt.Checkpoint(parts=("mlp",)), _03),
    "LoRA + checkpointing": lambda: (_LORA, lt.Checkpoint()),
    "WTA-CRS 0.3": lambda: (_03,),
    "MLP recomputed + WTA-CRS 0.3": lambda: (lt.Checkpoint(parts=("mlp",)), _03),
    "checkpointing": lambda: (lt.Checkpoint(),),
    "LoRA + WTA-CRS 0.1": lambda: (_LORA, _01),
    "WTA-CRS 0.1": lambda: (_01,),
}


@dataclass(frozen=True)
class Case:
    """A model with a loss and a batch; see :class:`bench.timing.Case`."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    needs_gpu: bool = True

    @property
    def variants(self) -> list[str]:
        return list(RECIPES)


def _t5(tiny: bool) -> nn.Module:
    small: dict[str, int] = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    base: dict[str, int] = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    config = T5Config(**small, d_kv=16) if tiny else T5Config(**base, d_kv=64)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def _roberta(tiny: bool) -> nn.Module:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    shape = small if tiny else large
    vocabulary, width = (100, 128) if tiny else (50265, 4096)
    config = RobertaConfig(**shape, vocab_size=vocabulary, intermediate_size=width)
    return RobertaForSequenceClassification(config)


def _cases(tiny: bool) -> list[Case]:
    def batch(num_texts: int, labels: Callable[[int], Tensor]) -> dict[str, Tensor]:
        shape = (2, 16) if tiny else (num_texts, 128)
        return {"input_ids": torch.randint(2, 100, shape), "labels": labels(shape[0])}

    return [
        # A label is a word and the end of the text.
        Case(
            "T5-base 100 x 128, fp32",
            lambda: _t5(tiny),
            lambda: batch(100, lambda n: torch.randint(2, 100, (n, 2))),
        ),
        Case(
            "RoBERTa-large 32 x 128, fp32",
            lambda: _roberta(tiny),
            lambda: batch(32, lambda n: torch.randint(0, 2, (n,))),
        ),
    ]


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Time whole steps in turn; a peak is what lives between steps and what a step adds."""
    torch.manual_seed(0)
    steps: dict[str, Callable[[], None]] = {}
    books: dict[str, Callable[[], lt.Ledger]] = {}
    with where:
        batch = case.batch()
    for name in variants:
        with where:
            model = case.model().train()
        methods = RECIPES[name]()
        session = lt.apply(model, *methods) if methods else None
        if session is not None:
            settle(session)
        optimizer = _optimizer(model, session)
        steps[name] = _step(model, optimizer, batch)
        books[name] = lambda m=model, o=optimizer: lt.ledger(m, batch, optimizer=o)
    stats = compare_steps(steps, reference=variants[0], rounds=3, warmup=1)
    made = []
    for name, s in stats.items():
        book = books[name]()
        held = book.weights + book.optimizer
        peak = None
        if s.peak_bytes is not None and s.resident_bytes is not None:
            peak = held + s.peak_bytes - s.resident_bytes
        row = {"case": case.name, "variant": name, **s.to_dict(), "held_bytes": held}
        made.append(row | {"saved_bytes": book.activations, "whole_bytes": peak})
    full = made[0]["whole_bytes"]
    for row in made:
        whole = row["whole_bytes"]
        row["whole_gib"] = whole and round(whole / 2**30, 2)
        row["fewer"] = whole and round(full / whole, 2)
    return made


def _optimizer(model: nn.Module, session: lt.Session | None) -> torch.optim.Optimizer:
    if session is not None:
        return session.optimizer(torch.optim.AdamW, lr=1e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> Callable[[], None]:
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        # At the end, so that gradients are part of what a step adds.
        optimizer.zero_grad(set_to_none=True)

    return step


COLUMNS = {**TIMES, "whole_gib": "peak of the whole step, GiB", "fewer": "times fewer"}
BENCH = Bench("whole_step", _cases, _measure, COLUMNS)
