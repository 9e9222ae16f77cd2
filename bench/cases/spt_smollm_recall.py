"""The share of SmolLM2's attention that the kept keys hold, for each way of choosing them.

Legend: h query heads, hk key heads, n tokens, d width, j blocks.
"""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import rows
from bench.cases.spt_smollm import smollm, windows
from bench.quality import NO_ROWS
from leantune.ops.sparse_attention.blocks import choose_blocks
from leantune.ops.sparse_attention.codebooks import Scorer, kmeans, quantise
from leantune.ops.sparse_attention.top_keys import KeyBudget, Visibility

RESULT = "spt_smollm_recall"
RATIOS = {"1/4": 1 / 4, "1/8": 1 / 8}
_LENGTH, _BLOCK, _ALWAYS, _EVERY = 2048, 16, 8, 3


def main() -> None:
    """Measure every third layer on held-out text; codebooks are learnt on training text."""
    model, tokenizer = smollm()
    train, held_out = windows(tokenizer, _LENGTH)
    layers = zip(_heads(model, train[0]), _heads(model, held_out[0]), strict=True)
    found: dict[tuple[str, str], list[float]] = {}
    for shown, (q, k) in list(layers)[::_EVERY]:
        hidden = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).triu(1)
        scores = (_grouped(q, k) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        mass = scores.softmax(-1)
        for choice, score in _choices(shown, q, k, scores):
            for share, seen in _seen(mass, score.masked_fill(hidden, -torch.inf)).items():
                found.setdefault((choice, share), []).append(seen)
        for always in (0, _ALWAYS):
            for share, ratio in RATIOS.items():
                kept = _kept_by_blocks(q, k, KeyBudget(ratio, 1, always))
                seen = float((mass * kept).sum(-1).mean())
                found.setdefault((_name(f"blocks of {_BLOCK}", always), share), []).append(seen)
    table = [
        {"choice": choice, "share": share, "mass": fmean(seen), "mass_min": min(seen)}
        | {"num_layers": len(seen), "num_tokens": _LENGTH}
        for (choice, share), seen in found.items()
    ]
    rows.replace(RESULT, ("choice", "share"), table)
    print(summary())


def summary() -> str:
    """Return the share of attention by choice and share of keys, as Markdown."""

    def lay_out(found: list[dict[str, Any]]) -> str:
        lines: dict[str, dict[str, str]] = {}
        for row in found:
            line = lines.setdefault(row["choice"], {"choice": row["choice"]})
            line[row["share"]] = f"{row['mass']:.3f} ({row['mass_min']:.3f})"
        heads = {share: f"{share} of the keys: mean (worst layer)" for share in RATIOS}
        return rows.table(list(lines.values()), {"choice": "choice"} | heads)

    return rows.by_device(rows.read(RESULT), lay_out) or NO_ROWS


def _name(choice: str, always: int) -> str:
    return f"{choice}, always {always}" if always else choice


def _heads(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return queries (1, h, n, d) and keys (1, hk, n, d) of each layer, after rotation."""
    kept: list[tuple[Tensor, Tensor]] = []

    def attend(module: Any, q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
        kept.append((q, k))
        return sdpa_attention_forward(module, q, k, *args, **options)

    AttentionInterface.register("kept", attend)
    model.set_attn_implementation("kept")
    with torch.no_grad():
        model.eval()(input_ids=ids[None], use_cache=False)
    return kept


def _choices(
    shown: tuple[Tensor, Tensor], q: Tensor, k: Tensor, exact: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the scores of each way of choosing single keys, the largest the first to be kept."""
    position = torch.arange(_LENGTH, dtype=torch.float32).expand_as(exact)
    yield "exact", exact
    books = _books(*shown)
    everything = slice(None)
    scorers: tuple[Scorer, ...] = ("adc", "match")
    for scorer in scorers:
        factors = quantise(q, k, books, scorer)
        score = _grouped(factors.queries(everything, everything), factors.keys(everything))
        yield scorer, score
        yield _name(scorer, _ALWAYS), _lift(score, position)
    yield "recent", position
    yield f"recent, and the first {_ALWAYS}", _lift(position, position)
    yield "random", torch.rand(exact.shape, generator=torch.Generator().manual_seed(0))


def _books(q: Tensor, k: Tensor) -> Tensor:
    """Return a codebook for each key head, (hk, s, e, w), as calibration makes them."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    by_head = [torch.cat([grouped[:, i].flatten(0, 2), k[0, i]]) for i in range(k.shape[1])]
    return torch.stack([kmeans(x, x.shape[1] // 8, 16, 10, seed=0) for x in by_head])


def _lift(score: Tensor, position: Tensor) -> Tensor:
    """Put the first and the most recent keys before all others."""
    own = position.transpose(-2, -1)
    is_kept = (position < _ALWAYS) | (position > own - _ALWAYS)
    return score.masked_fill(is_kept, torch.inf)


def _seen(mass: Tensor, score: Tensor) -> dict[str, float]:
    """Return the mean mass of the keys with the largest scores, for each share of keys."""
    score.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    # Equal scores go to the nearest key.
    order = score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    total = mass.flip(-1).gather(-1, order).cumsum(-1)
    visible = torch.arange(1, _LENGTH + 1)
    seen = {}
    for share, ratio in RATIOS.items():
        last = KeyBudget(ratio).num_kept(visible)[:, None] - 1
        seen[share] = float(total.gather(-1, last.expand(*total.shape[:-1], 1)).mean())
    return seen


def _kept_by_blocks(q: Tensor, k: Tensor, budget: KeyBudget) -> Tensor:
    """Return which keys the queries read under a choice of blocks, (1, h, n, n)."""
    chosen = choose_blocks(q, k, budget, Visibility("causal", None), _BLOCK)
    num_blocks = _LENGTH // _BLOCK
    kept = torch.zeros(*chosen.indices.shape[:3], num_blocks + 1)
    kept = kept.scatter(-1, chosen.indices.long(), 1.0)[..., :num_blocks]
    return kept.repeat_interleave(_BLOCK, -1).repeat_interleave(_BLOCK, -2)


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """Return the products of q (1, h, n, any) with the keys (1, hk, n, any) of its key head."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
