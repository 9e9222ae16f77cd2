"""Step time and saved bytes of WTA-CRS beside its rivals, interleaved in one run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench.models import BertBlocks, Gpt2Blocks, LlamaBlocks
from bench.timing import TIMES, run_cases, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import compare_steps
from leantune.measure.text import format_bytes

RESULT = "wta_crs_speed"

VARIANTS: dict[str, tuple[MethodConfig, ...]] = {
    "exact": (),
    "WTA-CRS 0.3": (lt.WTACRS(keep_ratio=0.3),),
    "WTA-CRS 0.1": (lt.WTACRS(keep_ratio=0.1),),
    "WTA-CRS 0.1, activation norms": (lt.WTACRS(keep_ratio=0.1, norms="activation"),),
    "checkpointing": (lt.Checkpoint(),),
    "MLP recomputed + WTA-CRS 0.1": (lt.Checkpoint(parts="mlp"), lt.WTACRS(keep_ratio=0.1)),
    "checkpointing + WTA-CRS 0.1": (lt.Checkpoint(), lt.WTACRS(keep_ratio=0.1)),
    "LoRA 16": (lt.LoRA(rank=16),),
    "LoRA 16 + WTA-CRS 0.1": (lt.LoRA(rank=16), lt.WTACRS(keep_ratio=0.1)),
    "LoRA 16 + checkpointing": (lt.LoRA(rank=16), lt.Checkpoint()),
}


@dataclass(frozen=True)
class Case:
    """One model shape and batch; see :class:`bench.timing.Case`."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.device], Tensor]
    dtype: torch.dtype
    needs_gpu: bool


CASES = (
    Case(
        "BERT-base block x 4, 16 x 128",
        BertBlocks,
        lambda device: torch.randn(16, 128, 768, device=device),
        torch.float32,
        needs_gpu=False,
    ),
    Case(
        "GPT-2 block x 4, 16 x 128",
        Gpt2Blocks,
        lambda device: torch.randn(16, 128, 768, device=device),
        torch.float32,
        needs_gpu=False,
    ),
    Case(
        "BERT-base x 12, 64 x 512, bf16",
        lambda: BertBlocks(12),
        lambda device: torch.randn(64, 512, 768, device=device, dtype=torch.bfloat16),
        torch.bfloat16,
        needs_gpu=True,
    ),
    Case(
        "Llama-1B x 16, 8 x 2048, bf16",
        LlamaBlocks,
        lambda device: torch.randint(0, 1024, (8, 2048), device=device),
        torch.bfloat16,
        needs_gpu=True,
    ),
)


def main(num_rounds: int = 9) -> None:
    """Measure every case that this machine can run, write the rows, print tables."""
    measure = partial(_measure, num_rounds=num_rounds)
    run_cases(RESULT, CASES, measure, _COLUMNS, note=still_held)


_COLUMNS = {
    **TIMES,
    "saved_mib": "saved MiB",
    "saved_ratio": "saved ratio",
    "peak_mib": "peak MiB",
}


def _measure(case: Case, device: torch.device, num_rounds: int) -> list[dict[str, Any]]:
    """Time forward + backward of every variant in turn; count what each saves."""
    torch.manual_seed(0)
    base = case.model().to(device, case.dtype).train()
    batch = case.batch(device)
    models: dict[str, nn.Module] = {}
    for name, methods in VARIANTS.items():
        models[name] = copy.deepcopy(base) if methods else base
        if methods:
            lt.apply(models[name], *methods)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(batch).backward()

    steps = {name: (lambda m=model: step(m)) for name, model in models.items()}
    stats = compare_steps(steps, reference="exact", rounds=num_rounds)
    saved = {name: lt.ledger(model, (batch,)).activations for name, model in models.items()}
    return [
        {
            **timing_row(case, name, s, saved[name]),
            "saved_ratio": round(saved[name] / saved["exact"], 3),
        }
        for name, s in stats.items()
    ]


def still_held(case: Case) -> str:
    """Say which inputs of sampled linears something else keeps, and what keeps them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = case.model().to(device, case.dtype).train()
    found = lt.still_held(model, (case.batch(device),), lt.WTACRS(keep_ratio=0.1))  # type: ignore[arg-type]
    return "\n".join(
        f"still held: {held.num_tensors} x {format_bytes(held.num_bytes // held.num_tensors)}, "
        f"input of {', '.join(held.linears)}, by {', '.join(op for _, op in held.holders)}"
        for held in found
    )
