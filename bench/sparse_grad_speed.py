"""Step time and bytes of SparseGrad beside its rivals, interleaved in one run, steps included."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench.cases import run_cases, timing_row
from bench.models import BertBlocks
from leantune.core.config import MethodConfig
from leantune.measure import compare_steps

RESULT = "sparse_grad_speed"
MLP = ["intermediate.dense", "re:layer\\.\\d+\\.output\\.dense"]
LORA_RANK = 7
"""The paper's: 26,880 numbers a matrix, against 23,593 entries at a density of 1 %."""

VARIANTS: dict[str, tuple[MethodConfig, ...]] = {
    "full fine-tuning": (),
    "LoRA 7 on the MLP": (lt.LoRA(rank=LORA_RANK, sites=tuple(MLP)),),
    "SparseGrad, fixed": (lt.SparseGrad(),),
    "SparseGrad, block": (lt.SparseGrad(selection="block"),),
    "SparseGrad, block + WTA-CRS 0.1": (
        lt.SparseGrad(selection="block"),
        lt.WTACRS(keep_ratio=0.1),
    ),
    "SparseGrad, the paper's form": (lt.SparseGrad(selection="step"),),
    "meProp, unified 4 %": (lt.MeProp(sites=tuple(MLP)),),
    "top-k of dW 1 %": (lt.MeProp(sites=tuple(MLP), variant="weight", keep_ratio=0.01),),
}


@dataclass(frozen=True)
class Case:
    """One stack of RoBERTa-base-shaped blocks and a batch of ``num_tokens`` tokens."""

    name: str
    num_layers: int
    shape: tuple[int, int]
    dtype: torch.dtype
    needs_gpu: bool

    def batch(self, device: torch.device, seed: int = 0) -> Tensor:
        """Return (b, t, 768) rows whose features differ in size, as activations do."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(*self.shape, 768, generator=rng) * torch.logspace(0, -1.5, 768)
        return x.to(device, self.dtype)


CASES = (
    Case("RoBERTa-base block x 4, 32 x 128", 4, (32, 128), torch.float32, needs_gpu=False),
    Case("RoBERTa-base block x 12, 64 x 512, bf16", 12, (64, 512), torch.bfloat16, needs_gpu=True),
)


class Blocks(BertBlocks):
    """The same blocks under a loss that pulls every row towards its own target."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a () loss whose gradient differs from row to row."""
        return (self.encoder(x).last_hidden_state - x.roll(1, 1)).square().mean()


def main(num_rounds: int = 5) -> None:
    """Measure every case that this machine can run, write the rows, print tables."""
    run_cases(RESULT, CASES, partial(_measure, num_rounds=num_rounds), _COLUMNS)


_COLUMNS = {
    "variant": "variant",
    "ratio": "step time ratio",
    "ratio_p20": "p20",
    "ratio_p80": "p80",
    "median_ms": "ms",
    "mlp_bytes": "MLP bytes, 12 layers",
    "copy_bytes": "and copies",
    "fewer": "times fewer than AdamW",
    "to_lora": "to LoRA",
    "saved_mib": "saved MiB",
    "peak_mib": "peak MiB",
}


def _measure(case: Case, device: torch.device, num_rounds: int) -> list[dict[str, Any]]:
    """Time forward, backward and optimiser step of every variant in turn; count its bytes."""
    torch.manual_seed(0)
    base = Blocks(case.num_layers).to(device, case.dtype).train()
    steps: dict[str, Callable[[], None]] = {}
    bytes_of: dict[str, int] = {}
    copies: dict[str, int] = {}
    saved: dict[str, int] = {}
    for name, methods in VARIANTS.items():
        model = copy.deepcopy(base)
        session = lt.apply(model, *methods) if methods else None
        # Beside LoRA everything else trains, too, as in the paper.
        for n, p in model.named_parameters():
            stands_in = n.endswith((".trained", ".applied", ".refreshes"))
            if session is not None and not stands_in and not _is_mlp_weight(n):
                p.requires_grad_(True)
        if session is not None:
            session.calibrate([case.batch(device, seed) for seed in range(1, 4)])
        optimizer = _optimizer(model, session)
        steps[name] = _step(model, optimizer, case.batch(device))
        steps[name]()
        bytes_of[name] = _mlp_bytes(model, optimizer, session, case.num_layers)
        applied = [p for n, p in model.named_parameters() if n.endswith(".applied")]
        copies[name] = sum(map(_num_bytes, applied)) * 12 // case.num_layers
        saved[name] = lt.ledger(model, (case.batch(device),)).activations
    stats = compare_steps(steps, reference="full fine-tuning", rounds=num_rounds)
    full, lora = bytes_of["full fine-tuning"], bytes_of["LoRA 7 on the MLP"]
    return [
        {
            **timing_row(case, name, s, saved[name]),
            "mlp_bytes": bytes_of[name],
            "copy_bytes": copies[name],
            "fewer": round(full / bytes_of[name], 2),
            "to_lora": round(bytes_of[name] / lora, 3),
        }
        for name, s in stats.items()
    ]


def _optimizer(model: nn.Module, session: lt.Session | None) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
    if session is not None:
        return session.optimizer(torch.optim.AdamW, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch).backward()
        optimizer.step()

    return step


def _is_mlp_weight(name: str) -> bool:
    is_mlp = "attention" not in name and ("intermediate.dense" in name or "output.dense" in name)
    return is_mlp and name.endswith("weight")


def _mlp_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: lt.Session | None, num_layers: int
) -> int:
    """Return gradients + optimiser state + bases + indices of the MLP weights, for 12 layers.

    Shared bases are counted once, whatever the number of layers; everything else per layer. What is
    trained (LoRA's factors, the entries) and SparseGrad's copy of it are weights, and not in here.
    """
    per_layer = 0
    for name, p in model.named_parameters():
        is_ours = _is_mlp_weight(name) or ".lora_" in name or name.endswith(".trained")
        if not is_ours or p.grad is None:
            continue
        tensors = [p.grad, *optimizer.state.get(p, {}).values()]
        per_layer += sum(_num_bytes(t) for t in tensors if isinstance(t, Tensor))
    shared = 0
    for key, value in session.state_dict().items() if session is not None else ():
        if key.endswith((":q_out", ":q_in")):
            shared += _num_bytes(value)
        elif key.endswith(":indices"):
            per_layer += _num_bytes(value)
    return shared + per_layer * 12 // num_layers


def _num_bytes(t: Tensor) -> int:
    if t.is_sparse:
        return _num_bytes(t._indices()) + _num_bytes(t._values())
    return t.numel() * t.element_size()
