"""Sparse attention beside dense: saved bytes, time, peak, and the share of attention it sees."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import leantune as lt
from bench import rows
from bench.models import glue, minilm
from bench.timing import TIMES, run_cases, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import StepStats, compare_steps
from leantune.ops.sparse_attention.codebooks import kmeans, quantise
from leantune.ops.sparse_attention.tiles import unpack_bits
from leantune.ops.sparse_attention.top_keys import KeyBudget, Visibility, top_keys

SPEED = "spt_attention_speed"
RECALL = "spt_attention_recall"

_HEADS, _WIDTH = 2, 64
_SPARSE = {
    "SPT 1/8, adc": lt.SPTAttention(),
    "SPT 1/8, match": lt.SPTAttention(scorer="match"),
    "SPT 1/8, blocks": lt.SPTAttention(granularity="block"),
}
# What stores queries times keys, or goes through all pairs, is left out of longer sequences.
_LONGEST = {
    "eager": 2**14,
    "SDPA with a mask": 2**15,
    **{name: 2**15 for name, method in _SPARSE.items() if method.granularity == "token"},
}


@dataclass(frozen=True)
class Case:
    """Sequences of ``n`` tokens; in bfloat16 on a GPU. See :class:`bench.timing.Case`."""

    n: int
    needs_gpu: bool = False

    @property
    def name(self) -> str:
        """The length, and where."""
        return f"{'GPU, ' if self.needs_gpu else ''}n = {self.n}"


_CPU, _GPU = (2**10, 2**12, 2**13, 2**14), (2**13, 2**15, 2**17)
CASES = [*map(Case, _CPU), *(Case(n, needs_gpu=True) for n in _GPU)]


class Attention(nn.Module):
    """One causal decoder layer of head width 64; (1, n, 128) -> a () loss.

    The other parts are small beside the attention at these lengths, and the same everywhere.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=_HEADS * _WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=_HEADS,
            max_position_embeddings=2**17,
            attn_implementation=how,
            use_cache=False,
        )
        self.model = LlamaModel(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean square of the output; ``mask`` is (1, n), 1 on real tokens."""
        out = self.model(inputs_embeds=x, attention_mask=mask)
        return out.last_hidden_state.square().mean()


def speed(num_rounds: int = 5) -> None:
    """Measure forward and backward of one layer at every length, write the rows, print tables."""
    run_cases(SPEED, CASES, partial(_measure, num_rounds=num_rounds), _SPEED_COLUMNS)


_SPEED_COLUMNS = {
    **TIMES,
    "attention_mib": "attention MiB",
    "saved_mib": "saved MiB",
    "peak_mib": "peak MiB",
}


def _measure(case: Case, device: torch.device, num_rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    n, dtype = case.n, torch.bfloat16 if case.needs_gpu else torch.float32
    base = {how: Attention(how).to(device, dtype).train() for how in ("sdpa", "eager")}
    base["eager"].load_state_dict(base["sdpa"].state_dict())
    x = torch.randn(1, n, _HEADS * _WIDTH, device=device, dtype=dtype)
    padded = torch.ones(1, n, dtype=torch.long, device=device)
    padded[:, 0] = 0
    plain: dict[str, tuple[MethodConfig, ...]] = {"SDPA": (), "checkpointing": (lt.Checkpoint(),)}
    batches: dict[str, tuple[Tensor, ...]] = {}
    models: dict[str, nn.Module] = {}
    for name, methods in {**plain, **{k: (v,) for k, v in _SPARSE.items()}}.items():
        models[name], batches[name] = copy.deepcopy(base["sdpa"]), (x,)
        if methods:
            lt.apply(models[name], *methods).calibrate([x])
    models["SDPA with a mask"], batches["SDPA with a mask"] = base["sdpa"], (x, padded)
    models["eager"], batches["eager"] = base["eager"], (x,)
    models = {name: m for name, m in models.items() if n <= _LONGEST.get(name, n)}

    def step(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        models[name](*batches[name]).backward()

    steps: dict[str, Callable[[], None]] = {m: (lambda m=m: step(m)) for m in models}
    stats = compare_steps(steps, reference="SDPA", rounds=num_rounds, warmup=1)
    out = []
    for name, s in stats.items():
        book = lt.ledger(models[name], batches[name])
        attention = sum(v for k, v in book.by_kind(ledger="activations").items() if _is_ours(k))
        out.append(
            {
                **timing_row(case, name, s, book.activations),
                "n": n,
                "attention_bytes": attention,
                "attention_mib": round(attention / 2**20, 2),
                "peak_mib": round(_peak(steps[name], s) / 2**20, 1),
            }
        )
    return out


def _is_ours(kind: str) -> bool:
    return any(word in kind for word in ("ttention", "softmax", "matmul", "dropout"))


def _peak(step: Callable[[], None], stats: StepStats) -> int:
    """Return the bytes that a step holds at its highest beyond what it began with."""
    if stats.peak_bytes is not None and stats.resident_bytes is not None:
        return stats.peak_bytes - stats.resident_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class _Table:
    """Scores (b, h, n, m) that are there as a whole, on a grid of whole numbers."""

    def __init__(self, scores: Tensor) -> None:
        top = scores.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        self.scores = (scores / top * 2**22).round()

    def queries(self, batch: slice, part: slice) -> Tensor:
        return self.scores[batch, :, part]

    def keys(self, batch: slice) -> Tensor:
        m = self.scores.shape[-1]
        return torch.eye(m).expand(len(self.scores[batch]), 1, m, m)


def recall(num_tokens: int = 256, num_texts: int = 8, keep_ratio: float = 0.125) -> None:
    """Measure which share of the dense attention mass the kept keys hold, on MiniLM and RTE text.

    Each way of choosing keys gives one row; rows of ways that are gone stay in the file.
    """
    model, tokenizer = minilm()
    model.eval()
    data = glue("rte")["train"]
    ids = tokenizer(" ".join(data["sentence1"]))["input_ids"]
    pieces = torch.tensor(ids[: 2 * num_texts * num_tokens]).view(2, num_texts, num_tokens)
    calibration, shown = (_queries_and_keys(model, p) for p in pieces)
    found: dict[str, list[float]] = {}
    for (q0, k0), (q, k) in zip(calibration, shown, strict=True):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        mass = scores.softmax(-1)
        for name, factors in _ladder(q0, k0, q, k, scores):
            budget = KeyBudget(keep_ratio)
            bits = top_keys(factors, q, num_tokens, budget, Visibility("self", None))
            share = (mass * unpack_bits(bits, num_tokens)).sum(-1).mean()
            found.setdefault(name, []).append(float(share))
    table = [
        {
            "choice": name,
            "mass": sum(shares) / len(shares),
            "mass_min": min(shares),
            "mass_max": max(shares),
            "keep_ratio": keep_ratio,
            "num_tokens": num_tokens,
            "num_texts": num_texts,
        }
        for name, shares in found.items()
    ]
    columns = {"choice": "choice", "mass": "mass", "mass_min": "min layer", "mass_max": "max layer"}
    print(rows.table(table, columns))
    rows.replace(RECALL, ("choice",), table)


def _ladder(
    q0: Tensor, k0: Tensor, q: Tensor, k: Tensor, scores: Tensor
) -> Iterator[tuple[str, Any]]:
    """Yield ways of choosing keys; codebooks are learnt on other text, (q0, k0)."""
    yield "exact top-L", _Table(scores)
    b, h, n, d = q.shape
    by_head = [torch.cat([q0[:, i], k0[:, i]]).reshape(-1, d) for i in range(h)]
    for width, words in ((8, 16), (4, 16), (8, 64), (2, 16)):
        books = torch.stack([kmeans(x, d // width, words, 10, seed=0) for x in by_head])
        for scorer in ("adc", "match"):
            name = f"{scorer}, w {width}, e {words}, l2, per head"
            yield name, quantise(q, k, books, scorer)
    layer = kmeans(torch.cat([q0, k0]).reshape(-1, d)[::4], d // 8, 16, 10, seed=0)[None]
    yield "match, w 8, e 16, l2, per layer", quantise(q, k, layer, "match")
    noise = torch.randn(1, d // 8, 16, 8)
    yield "match, random codebook (the prototype's start)", quantise(q, k, noise, "match")
    yield "random", _Table(torch.rand(b, h, n, n))
    yield "recent", _Table(torch.zeros(b, h, n, n))


def _queries_and_keys(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the q and k (b, h, n, d) of each layer."""
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), _outputs(model, (".query", ".key"), kept):
        model(input_ids=ids)
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    split = {n: x.unflatten(-1, (heads, -1)).transpose(1, 2) for n, x in kept.items()}
    names = [n.removesuffix(".query") for n in split if n.endswith(".query")]
    return [(split[f"{n}.query"], split[f"{n}.key"]) for n in names]


@contextmanager
def _outputs(model: nn.Module, endings: tuple[str, ...], kept: dict[str, Tensor]) -> Iterator[None]:
    handles = [
        m.register_forward_hook(lambda module, args, out, n=n: kept.__setitem__(n, out))
        for n, m in model.named_modules()
        if n.endswith(endings)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
