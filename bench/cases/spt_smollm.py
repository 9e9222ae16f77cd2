"""Sparse attention and routed FFNs in a real language model: SmolLM2's perplexity on real text.

The text is the documentation that Python carries, its last tenth held out. Each recipe is scored as
converted, after calibration, and after a short fine-tuning of LoRA, the same for all of them.
"""

import math
import pydoc_data.topics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import leantune as lt
from bench import rows
from bench.quality import NO_ROWS, Recipe
from leantune.training.smollm import demo_llm_path

RESULT = "spt_smollm"
SEED = 0
STAGES = ("converted", "tuned")
_LENGTH, _HELD_OUT, _STEPS, _RATE = 1024, 6, 16, 5e-4
_SHOWN = 512
"""Tokens of a calibration batch, of which there are four: a routed FFN keeps so many of each."""
_ALWAYS = 8
_RATIOS = {"1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}


def smollm() -> tuple[Any, Any]:
    """Return SmolLM2 in float32, and its tokenizer."""
    folder = demo_llm_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _attention(share: str) -> dict[str, Recipe]:
    options: dict[str, Any] = {"keep_ratio": _RATIOS[share], "min_keys": 2 * _ALWAYS}
    block = options | {"granularity": "block", "block_size": 16}
    kept = f", always {_ALWAYS}"
    found: dict[str, Recipe] = {
        f"{share} of the keys, by block of 16{kept}": (
            lt.SPTAttention(**block, always_keep=_ALWAYS),
        ),
        f"{share} of the keys, by token": (lt.SPTAttention(**options),),
    }
    if share == "1/2":  # what is always kept pays for blocks, not for tokens
        found["1/2 of the keys, by block of 16"] = (lt.SPTAttention(**block),)
        found[f"1/2 of the keys, by token{kept}"] = (
            lt.SPTAttention(**options, always_keep=_ALWAYS),
        )
        found["1/2 of the keys, by token, subspaces of 4"] = (
            lt.SPTAttention(**options, subspace_width=4),
        )
    if share == "1/4":
        shared = lt.SPTAttention(**block, always_keep=_ALWAYS, share_choice="group")
        found[f"1/4 of the keys, by block of 16, always {_ALWAYS}, shared choice"] = (shared,)
    return found


RECIPES: dict[str, Recipe] = {
    "dense": (),
    **_attention("1/2"),
    **{
        f"routed {num_active} of 4, guess: {guess}": (
            lt.RoutedFFN(num_active=num_active, split="coactivation", compensate=guess),
        )
        for guess, num_active in product(("lowrank", "none"), (3, 2))
    },
    **_attention("1/4"),
    **_attention("1/8"),
}
"""By importance: a run that is cut short has measured the first ones."""


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Measure every recipe whose rows are not there yet, then print the tables."""
    done = {(r["recipe"], r["stage"]) for r in rows.read(RESULT)}
    for name in list(RECIPES)[worker::num_workers]:
        if all((name, stage) in done for stage in STAGES):
            continue
        for row in _measure(name):
            if (name, row["stage"]) not in done:
                rows.append(RESULT, row)
                print(row, flush=True)
    print(attention(), routed(), sep="\n\n")


def attention() -> str:
    """Return the perplexity under each way of sparse attention, as Markdown."""
    return _summary([name for name in RECIPES if not name.startswith("routed")])


def routed() -> str:
    """Return the perplexity under each way of routing, as Markdown."""
    return _summary([name for name in RECIPES if name == "dense" or name.startswith("routed")])


def _summary(names: list[str]) -> str:
    def lay_out(found: list[dict[str, Any]]) -> str:
        by_key = {(r["recipe"], r["stage"]): r for r in found}
        lines = []
        for name in names:
            cells = {
                stage: _cell(by_key[name, stage], by_key.get(("dense", stage)))
                for stage in STAGES
                if (name, stage) in by_key
            }
            if cells:
                lines.append({"recipe": name, **cells})
        heads = {"recipe": "recipe", "converted": "perplexity, as converted"}
        return rows.table(lines, heads | {"tuned": f"after {_STEPS} steps of LoRA"})

    return rows.by_device(rows.read(RESULT), lay_out) or NO_ROWS


def _cell(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Return perplexity and bits per byte, with the difference to dense over the same windows."""
    text = f"{row['perplexity']:.2f}, {row['bits_per_byte']:.3f} bits per byte"
    if base is None or row["recipe"] == "dense":
        return text
    change = [a - b for a, b in zip(row["losses"], base["losses"], strict=True)]
    ratio = math.exp(fmean(change))
    error = ratio * stdev(change) / len(change) ** 0.5
    return f"{text} ({ratio - 1:+.1%}, s.e. {error:.1%})"


def _measure(name: str) -> Iterator[dict[str, Any]]:
    """Yield the row of a recipe as converted, then that after fine-tuning."""
    start = time.process_time()
    model, tokenizer = smollm()
    train, held_out = windows(tokenizer, _LENGTH)
    held_out = held_out[:_HELD_OUT]
    num_bytes = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in held_out)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    tuned, shown = train[order[:_STEPS]], train[order[_STEPS : _STEPS + 2]]
    torch.manual_seed(SEED)
    session = lt.apply(model, lt.LoRA(rank=8), *RECIPES[name], seed=SEED)
    session.calibrate([{"input_ids": ids} for ids in shown.view(-1, 1, _SHOWN)])
    for stage in STAGES:
        if stage == "tuned":
            _tune(model, session, tuned)
        losses = _score(model, held_out)
        yield {
            "recipe": name,
            "stage": stage,
            "seed": SEED,
            "perplexity": math.exp(fmean(losses)),
            "bits_per_byte": sum(losses) * (_LENGTH - 1) / math.log(2) / num_bytes,
            "losses": losses,
            "num_tokens": _LENGTH,
            "num_steps": _STEPS if stage == "tuned" else 0,
            "learning_rate": _RATE,
            "cpu_seconds": round(time.process_time() - start, 1),
        }


def windows(tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Return windows of tokens, (r, n) each: of the training text, and of what is held out."""
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    cut = len(text) * 9 // 10
    train, held_out = (
        torch.tensor(tokenizer(part, verbose=False)["input_ids"]).unfold(0, length, length)
        for part in (text[:cut], text[cut:])
    )
    return train, held_out


def _tune(model: Any, session: lt.Session, texts: Tensor) -> None:
    """Train on one window a step, warmed up and then down to nothing."""
    optimizer = session.optimizer(torch.optim.AdamW, lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 2, 1 - step / len(texts))
    )
    model.train()
    with _half_products():
        for ids in texts:
            loss = _loss(model, ids) + session.auxiliary_loss()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            session.on_step()


@contextmanager
def _half_products() -> Iterator[None]:
    """Multiply in bfloat16 while training: half the time, the same for every recipe."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def _score(model: Any, texts: Tensor) -> list[float]:
    """Return the mean loss in nats of each text, its first token not counted."""
    model.eval()
    return [float(_loss(model, ids)) for ids in texts]


def _loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, ids[1:])
