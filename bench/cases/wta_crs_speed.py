"""Step time and saved bytes of WTA-CRS beside its rivals, interleaved in one run."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import device
from bench.models import BertBlocks, Gpt2Blocks, LlamaBlocks
from bench.timing import TIMES, Bench, settle, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import compare_steps
from leantune.measure.text import format_bytes

Recipe = Callable[[], tuple[MethodConfig, ...]]

_TENTH = lt.WTACRS(keep_ratio=0.1)
_TENTH_ACTIVATION = lt.WTACRS(keep_ratio=0.1, norms="activation")

ON_CPU: dict[str, Recipe] = {
    "exact": lambda: (),
    "WTA-CRS 0.3": lambda: (lt.WTACRS(keep_ratio=0.3),),
    "WTA-CRS 0.1": lambda: (_TENTH,),
    "WTA-CRS 0.1, activation norms": lambda: (_TENTH_ACTIVATION,),
    "checkpointing": lambda: (lt.Checkpoint(),),
    "checkpointing + WTA-CRS 0.1": lambda: (lt.Checkpoint(), _TENTH),
    "MLP recomputed + WTA-CRS 0.1": lambda: (lt.Checkpoint(parts="mlp"), _TENTH),
    "LoRA 16": lambda: (lt.LoRA(rank=16),),
    "LoRA 16 + WTA-CRS 0.1": lambda: (lt.LoRA(rank=16), _TENTH),
    "LoRA 16 + checkpointing": lambda: (lt.LoRA(rank=16), lt.Checkpoint()),
}
"""Variant -> what is applied, made when it is measured."""

ON_GPU: dict[str, Recipe] = {
    "exact": lambda: (),
    "WTA-CRS 0.1": lambda: (_TENTH,),
    "WTA-CRS 0.1, activation norms": lambda: (_TENTH_ACTIVATION,),
    "checkpointing": lambda: (lt.Checkpoint(),),
    "checkpointing + WTA-CRS 0.1": lambda: (lt.Checkpoint(), _TENTH),
    "MLP recomputed + WTA-CRS 0.1": lambda: (lt.Checkpoint(parts="mlp"), _TENTH),
}


def _on_liger(recipe: Recipe) -> Recipe:
    return lambda: (lt.Liger(), *recipe())


WITH_LIGER: dict[str, Recipe] = {
    "Liger" if name == "exact" else f"Liger + {name}": _on_liger(recipe)
    for name, recipe in ON_GPU.items()
}
COMPILED = {
    "torch.compile": 1.0,
    "torch.compile, memory budget 0.5": 0.5,
    "torch.compile, memory budget 0.1": 0.1,
}
"""Variant -> torch's ``activation_memory_budget``, the share of saved bytes that it aims at."""


@dataclass(frozen=True)
class Case:
    """One model shape and batch; see :class:`bench.timing.Case`.

    Args:
        name: of the table.
        model: a new stack.
        batch: its input.
        dtype: of the weights.
        recipes: what is measured, what all is compared with first.
        compiled: further variants, see ``COMPILED``.
        needs_gpu: whether it is for an NVIDIA GPU, and for CPUs otherwise.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    dtype: torch.dtype
    recipes: Mapping[str, Recipe]
    compiled: Mapping[str, float]
    needs_gpu: bool

    @property
    def variants(self) -> list[str]:
        return [*self.recipes, *self.compiled]


def _cases(tiny: bool) -> list[Case]:
    num_layers, width, tokens = (1, 64, (2, 64)) if tiny else (12, 768, (64, 512))
    bert = Case(
        "BERT-base x 12, 64 x 512, bf16",
        lambda: BertBlocks(num_layers, width),
        lambda: torch.randn(*tokens, width, dtype=torch.bfloat16),
        torch.bfloat16,
        ON_GPU,
        {"torch.compile": 1.0},
        needs_gpu=True,
    )
    depth, llama_width, ids = (1, 128, (2, 64)) if tiny else (16, 2048, (8, 2048))
    llama = Case(
        "Llama-1B x 16, 8 x 2048, bf16",
        lambda: LlamaBlocks(depth, llama_width),
        lambda: torch.randint(0, 1024, ids),
        torch.bfloat16,
        ON_GPU | WITH_LIGER,
        COMPILED,
        needs_gpu=True,
    )
    on_cpu = [
        Case(
            f"{name} block x 4, 16 x 128",
            model,
            lambda: torch.randn(16, 128, 768),
            torch.float32,
            ON_CPU,
            {},
            needs_gpu=False,
        )
        for name, model in (("BERT-base", BertBlocks), ("GPT-2", Gpt2Blocks))
    ]
    return [llama, bert] if tiny else [*on_cpu, bert, llama]


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Time forward + backward of some variants in turn; count what each saves."""
    torch.manual_seed(0)
    with where:
        base, batch = case.model().to(case.dtype).train(), case.batch()
    models: dict[str, Any] = {name: copy.deepcopy(base) for name in variants}
    for name, model in models.items():
        if name in case.compiled:
            models[name] = device.compiled(model, case.compiled[name], device.compiler())
        elif methods := case.recipes[name]():
            settle(lt.apply(model, *methods))
    plain = {type(m).__module__.partition(".")[0] for m in models[variants[0]].modules()}
    assert "liger_kernel" not in plain, "Liger must not reach beyond the model it was applied to"

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(batch).backward()

    steps = {name: (lambda m=model: step(m)) for name, model in models.items()}
    rounds, warmup = (5, 1) if case.needs_gpu else (9, 2)
    stats = compare_steps(steps, reference=variants[0], rounds=rounds, warmup=warmup)
    saved = {name: lt.ledger(model, (batch,)).activations for name, model in models.items()}
    return [
        {
            **timing_row(case, name, s, saved[name]),
            "saved_ratio": round(saved[name] / saved[variants[0]], 3),
        }
        for name, s in stats.items()
    ]


def still_held(case: Case) -> str:
    """Say which inputs of sampled linears something else keeps, and what keeps them."""
    with device.find():
        model, batch = case.model().to(case.dtype).train(), case.batch()
    found = lt.still_held(model, (batch,), _TENTH)
    return "\n".join(
        f"still held: {held.num_tensors} x {format_bytes(held.num_bytes // held.num_tensors)}, "
        f"input of {', '.join(held.linears)}, by {', '.join(op for _, op in held.holders)}"
        for held in found
    )


BENCH = Bench(
    "wta_crs_speed",
    _cases,
    _measure,
    {**TIMES, "saved_mib": "saved MiB", "saved_ratio": "saved ratio", "peak_mib": "peak MiB"},
    note=still_held,
)
