"""Sparse attention beside dense: saved bytes, time, peak, and the share of attention it sees."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

import leantune as lt
from bench import rows
from bench.models import glue, minilm
from bench.timing import TIMES, Bench, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import StepStats, compare_steps
from leantune.ops.sparse_attention.codebooks import kmeans, quantise
from leantune.ops.sparse_attention.tiles import unpack_bits
from leantune.ops.sparse_attention.top_keys import KeyBudget, Visibility, top_keys

RECALL = "spt_attention_recall"

_BLOCKS, _SHARED = "SPT 1/8, blocks", "SPT 1/8, blocks, shared choice"
_SPARSE = {
    "SPT 1/8, adc": lt.SPTAttention(),
    "SPT 1/8, match": lt.SPTAttention(scorer="match"),
    _BLOCKS: lt.SPTAttention(granularity="block"),
    "SPT 1/16, blocks": lt.SPTAttention(granularity="block", keep_ratio=1 / 16),
    _SHARED: lt.SPTAttention(granularity="block", share_choice="group"),
}
_RECIPES: dict[str, tuple[MethodConfig, ...]] = {
    "SDPA": (),
    "checkpointing": (lt.Checkpoint(),),
    **{name: (method,) for name, method in _SPARSE.items()},
    "SDPA with a mask": (),
    "eager": (),
}


@dataclass(frozen=True)
class Case:
    """Sequences of ``n`` tokens; in bfloat16 on a GPU, with one way of choosing ``blocks``.

    See :class:`bench.timing.Case`.
    """

    n: int
    num_heads: int = 2
    width: int = 64
    needs_gpu: bool = False
    blocks: str = _BLOCKS
    num_key_heads: int | None = None

    @property
    def name(self) -> str:
        """The length, and the heads on a GPU or where several read one key head."""
        heads = f"{self.num_heads} heads of {self.width}, " if self.needs_gpu else ""
        if self.num_key_heads is not None:
            heads = f"{self.num_heads} heads on {self.num_key_heads}, "
        return f"{heads}n = {self.n}"

    @property
    def variants(self) -> list[str]:
        if self.needs_gpu:
            return ["SDPA", self.blocks]
        if self.num_key_heads is not None:
            return ["SDPA", _BLOCKS, _SHARED]
        if self.n > 2**13:  # the others take minutes, or gigabytes
            return ["SDPA", self.blocks]
        return [name for name in _RECIPES if name not in ("SPT 1/16, blocks", _SHARED)]


def _cases(tiny: bool) -> list[Case]:
    # In order of importance: each takes two compilations, and the time is short.
    on_gpu = [
        Case(n, num_heads, width, needs_gpu=True, blocks=blocks)
        for num_heads, width in ((16, 64), (32, 128), (16, 128), (32, 64))
        for blocks in ("SPT 1/8, blocks", "SPT 1/16, blocks")
        for n in (2**15, 2**17, 2**13)
    ]
    if tiny:
        return [Case(256, 2, 16, needs_gpu=True, blocks=case.blocks) for case in on_gpu[2:4]]
    grouped = Case(2**13, 8, num_key_heads=2)
    return [*(Case(n) for n in (2**10, 2**12, 2**13, 2**14)), grouped, *on_gpu]


class Attention(nn.Module):
    """One causal decoder layer with next to no FFN; (1, n, heads x width) -> a () loss.

    The other parts are small beside the attention at most lengths, and the same everywhere.
    """

    def __init__(self, how: str, num_heads: int, width: int, num_key_heads: int | None) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=num_heads * width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_heads,
            max_position_embeddings=2**17,
            attn_implementation=how,
            use_cache=False,
        )
        self.model = LlamaModel(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean square of the output; ``mask`` is (1, n), 1 on real tokens."""
        out = self.model(inputs_embeds=x, attention_mask=mask)
        return out.last_hidden_state.square().mean()


_SPEED_COLUMNS = {
    **TIMES,
    "attention_mib": "attention MiB",
    "saved_mib": "saved MiB",
    "peak_mib": "peak MiB",
}


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.needs_gpu else torch.float32
    with where:
        kinds = ("sdpa", "eager")
        shape = (case.num_heads, case.width, case.num_key_heads)
        base = {how: Attention(how, *shape).to(dtype).train() for how in kinds}
        x = torch.randn(1, case.n, case.num_heads * case.width, dtype=dtype)
        padded = torch.ones(1, case.n, dtype=torch.long)
    base["eager"].load_state_dict(base["sdpa"].state_dict())
    padded[:, 0] = 0
    batches: dict[str, tuple[Tensor, ...]] = {}
    models: dict[str, nn.Module] = {}
    for name in variants:
        models[name] = copy.deepcopy(base["eager" if name == "eager" else "sdpa"])
        batches[name] = (x, padded) if name == "SDPA with a mask" else (x,)
        if _RECIPES[name]:
            lt.apply(models[name], *_RECIPES[name]).calibrate([x])

    def step(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        models[name](*batches[name]).backward()

    steps: dict[str, Callable[[], None]] = {m: (lambda m=m: step(m)) for m in models}
    stats = compare_steps(steps, reference="SDPA", rounds=5, warmup=1)
    out = []
    for name, s in stats.items():
        book = lt.ledger(models[name], batches[name])
        attention = sum(v for k, v in book.by_kind(ledger="activations").items() if _is_ours(k))
        out.append(
            {
                **timing_row(case, name, s, book.activations),
                "n": case.n,
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


BENCH = Bench("spt_attention_speed", _cases, _measure, _SPEED_COLUMNS)


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
