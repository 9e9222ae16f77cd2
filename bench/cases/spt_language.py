"""Sparse attention in a small causal model of bytes, and on a task of distant keys.

The language model is trained from scratch on the documentation text that Python carries; scored in
bits per byte of a part that it has not seen. The copy task repeats a random string after filler;
the model learns it densely, then goes on under the recipe, as in the paper's use.
"""

import copy
import math
import pydoc_data.topics
import time
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import leantune as lt
from bench import quality, rows
from bench.quality import NO_ROWS, Recipe

RESULT = "spt_language"
SEEDS = (0, 1, 2)

RECIPES: dict[str, Recipe] = {
    "dense": (),
    "SPT 1/8": (lt.SPTAttention(min_keys=4),),
    "SPT 1/8, the paper's score": (lt.SPTAttention(min_keys=4, scorer="match"),),
    "SPT 1/4": (lt.SPTAttention(keep_ratio=0.25, min_keys=4),),
}
_LENGTH, _BATCH, _STEPS, _RATE = 256, 8, 600, 2e-3
_COPIED, _FILLER, _SYMBOLS = 16, 32, 64


def main(worker: int = 0, num_workers: int = 1) -> None:
    """Measure every row that is not there yet, then print the table."""
    done = {(r["task"], r["recipe"], r["seed"]) for r in rows.read(RESULT)}
    wanted = list(product(("copy", "bytes"), SEEDS, RECIPES))
    for task, seed, name in wanted[worker::num_workers]:
        if (task, name, seed) in done:
            continue
        start = time.process_time()
        scores = (_copy if task == "copy" else _bytes)(RECIPES[name], seed)
        row = {"task": task, "recipe": name, "seed": seed, **scores}
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        rows.append(RESULT, row)
        print(row, flush=True)
    print(summary())


def summary() -> str:
    """Return mean and spread of each recipe, bits with the difference to dense, as Markdown."""
    return rows.by_device(rows.read(RESULT), _table) or NO_ROWS


def _table(found: list[dict[str, Any]]) -> str:
    def cell(task: str, name: str, key: str) -> str:
        values, base = (
            {r["seed"]: r[key] for r in found if (r["task"], r["recipe"]) == (task, n)}
            for n in (name, "dense")
        )
        is_compared = task == "bytes" and name != "dense"
        return quality.cell(values, base if is_compared else None, 3) if values else ""

    lines = [
        {
            "recipe": name,
            "bits": cell("bytes", name, "bits_per_byte"),
            "before": cell("copy", name, "accuracy_before"),
            "accuracy": cell("copy", name, "accuracy"),
        }
        for name in RECIPES
    ]
    heads = {
        "recipe": "recipe",
        "bits": "bits per byte",
        "before": "copy accuracy, as converted",
        "accuracy": "copy accuracy, tuned",
    }
    return rows.table(lines, heads)


def _bytes(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train a model of bytes from scratch; score the last tenth of the text."""
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    data = torch.tensor(list(text.encode()), dtype=torch.int64)
    cut = len(data) * 9 // 10
    torch.manual_seed(seed)
    model = _model(vocabulary=256, width=128, num_layers=4)
    rng = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        starts = torch.randint(cut - _LENGTH, (_BATCH,), generator=rng)
        return torch.stack([data[s : s + _LENGTH] for s in starts.tolist()])

    session = _convert(model, recipe, [{"input_ids": batch()} for _ in range(4)], seed)
    _train(model, session, _RATE, _STEPS, lambda: _language_loss(model, batch()))
    model.eval()
    held_out = data[cut:].unfold(0, _LENGTH, _LENGTH)
    with torch.no_grad():
        losses = [float(_language_loss(model, part)) * len(part) for part in held_out.split(32)]
    return {"bits_per_byte": sum(losses) / len(held_out) / math.log(2), "num_steps": _STEPS}


def _copy(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Let a model that copies densely go on under the recipe: token accuracy before and after."""
    torch.manual_seed(seed)
    model = Copier()
    rng = torch.Generator().manual_seed(seed)
    _train(model, None, 1e-2, 400, lambda: model.loss(_copy_batch(rng)))
    model = copy.deepcopy(model)
    session = _convert(model, recipe, [_copy_batch(rng) for _ in range(4)], seed)
    before = _accuracy(model, seed)
    _train(model, session, 2e-3, 100, lambda: model.loss(_copy_batch(rng)))
    return {"accuracy_before": before, "accuracy": _accuracy(model, seed)}


class Copier(nn.Module):
    """One attention layer over embeddings of each token and the one before it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.own, self.previous = nn.Embedding(_SYMBOLS, width), nn.Embedding(_SYMBOLS, width)
        self.model = _model(vocabulary=8, width=width, num_layers=1).model
        self.head = nn.Linear(width, _SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (b, n, symbols) of the token after each of (b, n)."""
        before = F.pad(tokens[:, :-1], (1, 0))
        x = self.own(tokens) + self.previous(before)
        return self.head(self.model(inputs_embeds=x).last_hidden_state)

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of the copied tokens but the first, which nothing foretells."""
        logits = self(tokens)[:, -_COPIED:-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 - _COPIED :].flatten())


def _copy_batch(rng: torch.Generator, size: int = 32) -> Tensor:
    """Return (size, n) symbols: a string of distinct ones, filler from the others, the string."""
    symbols = torch.stack([torch.randperm(_SYMBOLS, generator=rng) for _ in range(size)])
    string, others = symbols[:, :_COPIED], symbols[:, _COPIED:]
    picked = torch.randint(others.shape[1], (size, _FILLER), generator=rng)
    return torch.cat([string, others.gather(1, picked), string], 1)


@torch.no_grad()
def _accuracy(model: nn.Module, seed: int) -> float:
    model.eval()
    tokens = _copy_batch(torch.Generator().manual_seed(1000 + seed), 256)
    guessed = model(tokens)[:, -_COPIED:-1].argmax(-1)
    model.train()
    return float((guessed == tokens[:, 1 - _COPIED :]).float().mean())


def _model(vocabulary: int, width: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        max_position_embeddings=512,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def _convert(model: nn.Module, recipe: Recipe, batches: list[Any], seed: int) -> lt.Session | None:
    if not recipe:
        return None
    session = lt.apply(model, *recipe, seed=seed)
    session.calibrate(batches)
    return session


def _language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss in nats of all bytes (b, n) but the first of each row."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _train(
    model: nn.Module, session: lt.Session | None, rate: float, num_steps: int, loss_of: Any
) -> None:
    """Adam with a short warm-up and linear decay; auxiliary losses are added."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    warmup = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (num_steps - s) / (num_steps - warmup))
    )
    for _ in range(num_steps):
        loss = loss_of()
        if session is not None:
            loss = loss + session.auxiliary_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if session is not None:
            session.on_step()
