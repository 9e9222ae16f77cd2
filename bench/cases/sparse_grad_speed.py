"""Step time and bytes of SparseGrad beside its rivals, interleaved in one run, steps included."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import rivals
from bench.models import BERT_MLP, BertBlocks, LlamaBlocks
from bench.timing import TIMES, Bench, say_left_out, settle, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import compare_steps
from leantune.methods.sparse_grad.conversion import SparseGradConversion

GALORE, APOLLO, SHIRA = "GaLore 128", "APOLLO 128", "SHiRA 7"
"""Projections are chosen again every 200 steps, which none of the timed steps is. Without the
package of the first two, their rows are left out."""


class Blocks(BertBlocks):
    """The same blocks under a loss that pulls every row towards its own target."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a () loss whose gradient differs from row to row."""
        return (self.encoder(x).last_hidden_state - x.roll(1, 1)).square().mean()


@dataclass(frozen=True)
class Case:
    """A stack of blocks, a batch, and which of its linears are the MLP's.

    Args:
        name: of the table.
        model: a new stack.
        batch: (device, seed) -> its input.
        dtype: of weights and of the stack's floating input.
        mlp: name patterns of the linears that SparseGrad and its rivals act on.
        lora_rank: about as many numbers as SparseGrad's entries, or the usual choice.
        num_layers: of the stack.
        whole_layers: of the model that bytes are counted for; shared bases count once.
        needs_gpu: whether it is for an NVIDIA GPU, and for CPUs otherwise; a GPU gets what has a
            goal, and the rivals.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.device, int], Tensor]
    dtype: torch.dtype
    mlp: tuple[str, ...]
    lora_rank: int
    num_layers: int
    whole_layers: int
    needs_gpu: bool

    @property
    def variants(self) -> list[str]:
        if not self.needs_gpu:
            return list(self.recipes())
        ours = ["SparseGrad, block", "SparseGrad, block + WTA-CRS 0.1"]
        return [FULL, self.lora, *ours, GALORE, APOLLO]

    def recipes(self) -> dict[str, tuple[MethodConfig, ...]]:
        """Return name -> recipe of everything that can be timed, full fine-tuning first."""
        return {
            FULL: (),
            self.lora: (lt.LoRA(rank=self.lora_rank, sites=self.mlp),),
            "SparseGrad, block": (lt.SparseGrad(),),
            "SparseGrad, block + WTA-CRS 0.1": (lt.SparseGrad(), lt.WTACRS(keep_ratio=0.1)),
            "SparseGrad, the paper's form": (lt.SparseGrad(selection="step"),),
            "meProp, unified 4 %": (lt.MeProp(sites=self.mlp),),
            "top-k of dW 1 %": (lt.MeProp(sites=self.mlp, variant="weight", keep_ratio=0.01),),
            SHIRA: (),
            GALORE: (),
            APOLLO: (),
        }

    @property
    def lora(self) -> str:
        return f"LoRA {self.lora_rank} on the MLP"


FULL = "full fine-tuning"


def _rows(
    shape: tuple[int, int], width: int, dtype: torch.dtype
) -> Callable[[torch.device, int], Tensor]:
    """Return what makes (b, t, width) rows whose features differ in size, as activations do."""

    def batch(where: torch.device, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, width, generator=rng) * torch.logspace(0, -1.5, width)
        return x.to(where, dtype)

    return batch


def _ids(shape: tuple[int, int]) -> Callable[[torch.device, int], Tensor]:
    def batch(where: torch.device, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randint(0, 1024, shape, generator=rng).to(where)

    return batch


def _cases(tiny: bool) -> list[Case]:
    on_cpu = Case(
        "RoBERTa-base block x 4, 32 x 128",
        lambda: Blocks(4),
        _rows((32, 128), 768, torch.float32),
        torch.float32,
        BERT_MLP,
        # The paper's: 26,880 numbers a matrix, against 23,593 entries at a density of 1 %.
        lora_rank=7,
        num_layers=4,
        whole_layers=12,
        needs_gpu=False,
    )
    num_layers, width, shape = (1, 64, (2, 64)) if tiny else (12, 768, (64, 512))
    roberta = replace(
        on_cpu,
        name="RoBERTa-base block x 12, 64 x 512, bf16",
        model=lambda: Blocks(num_layers, width),
        batch=_rows(shape, width, torch.bfloat16),
        dtype=torch.bfloat16,
        num_layers=num_layers,
        needs_gpu=True,
    )
    depth, llama_width, ids = (1, 128, (2, 64)) if tiny else (16, 2048, (4, 2048))
    llama = Case(
        "Llama-1B x 16, 4 x 2048, bf16",
        lambda: LlamaBlocks(depth, llama_width),
        _ids(ids),
        torch.bfloat16,
        ("gate_proj", "up_proj", "down_proj"),
        lora_rank=16,
        num_layers=depth,
        whole_layers=16,
        needs_gpu=True,
    )
    return [llama, roberta] if tiny else [on_cpu, llama, roberta]


_COLUMNS = {
    **TIMES,
    "mlp_bytes": "MLP bytes, all layers",
    "fewer": "times fewer than AdamW",
    "to_lora": "to LoRA",
    "saved_mib": "saved MiB",
    "peak_mib": "peak MiB",
}


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Time forward, backward and optimiser step of some variants in turn; count their bytes."""
    torch.manual_seed(0)
    with where:
        base = case.model().to(case.dtype).train()
    steps: dict[str, Callable[[], None]] = {}
    bytes_of: dict[str, int] = {}
    saved: dict[str, int] = {}
    for name in variants:
        methods = case.recipes()[name]
        model = copy.deepcopy(base)
        session = lt.apply(model, *methods) if methods else None
        if name == SHIRA:
            rivals.shira(model, _MLP_WEIGHTS, rank=7)
        # Beside LoRA everything else trains, too, as in the paper.
        for n, p in model.named_parameters():
            stands_in = n.endswith((".delta", ".rotated_weight"))
            if session is not None and not stands_in and not _is_mlp_weight(n):
                p.requires_grad_(True)
        if session is not None:
            session.calibrate([case.batch(where, seed) for seed in range(1, 4)])
            settle(session)
        try:
            optimizer = _optimizer(name, model, session)
        except ImportError as error:
            say_left_out(case, name, error)
            continue
        steps[name] = _step(model, optimizer, case.batch(where, 0))
        steps[name]()
        bytes_of[name] = _mlp_bytes(case, model, optimizer, session)
        saved[name] = lt.ledger(model, (case.batch(where, 0),)).activations
    stats = compare_steps(steps, reference=FULL, rounds=5)
    full, lora = bytes_of[FULL], bytes_of[case.lora]
    return [
        {
            **timing_row(case, name, s, saved[name]),
            "num_layers": case.whole_layers,
            "mlp_bytes": bytes_of[name],
            "fewer": round(full / bytes_of[name], 2),
            "to_lora": round(bytes_of[name] / lora, 3),
        }
        for name, s in stats.items()
    ]


def _optimizer(name: str, model: nn.Module, session: lt.Session | None) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
    if name in (GALORE, APOLLO):
        kind, rank = name.split()
        how = {"rank": int(rank), "num_steps": 200, **options}
        return rivals.projected(kind, model, _MLP_WEIGHTS, **how)
    if session is not None:
        return session.optimizer(torch.optim.AdamW, **options)
    return torch.optim.AdamW(model.parameters(), **options)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch).backward()
        optimizer.step()

    return step


_MLP_WEIGHTS = (
    r"(intermediate\.dense|layer\.\d+\.output\.dense|(gate|up|down)_proj)(\.base_layer)?\.weight$"
)


def _is_mlp_weight(name: str) -> bool:
    """Whether a parameter's name is that of an MLP linear's own weight."""
    return re.search(_MLP_WEIGHTS, name) is not None


def _mlp_bytes(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, session: lt.Session | None
) -> int:
    """Return gradients + optimiser state + bases of the MLP weights, for all layers.

    Shared bases are counted once, whatever the number of layers; everything else per layer. What is
    trained (LoRA's factors, the entries) are weights, and not in here.
    """
    per_layer = 0
    for name, p in model.named_parameters():
        is_ours = (
            _is_mlp_weight(name)
            or ".lora_" in name
            or ".shira_" in name
            or name.endswith((".delta", ".rotated_weight"))
        )
        if not is_ours or p.grad is None:
            continue
        state = optimizer.state.get(p, {})
        projector = state.get("projector")
        tensors = [p.grad, *state.values(), getattr(projector, "ortho_matrix", None)]
        per_layer += sum(_num_bytes(t) for t in tensors if isinstance(t, Tensor))
    conversions = () if session is None else session.conversions
    rules = [r for c in conversions if isinstance(c, SparseGradConversion) for r in c.rules]
    # As they are held, in the dtype of the products; a file has them in half precision.
    bases = {r.bases for r in rules if r.bases is not None}
    shared = sum(_num_bytes(q) for b in bases for q in (b.q_out, b.q_in))
    return shared + per_layer * case.whole_layers // case.num_layers


def _num_bytes(t: Tensor) -> int:
    if t.is_sparse:
        return _num_bytes(t._indices()) + _num_bytes(t._values())
    return t.numel() * t.element_size()


# Bytes are relative to LoRA's as well.
BENCH = Bench("sparse_grad_speed", _cases, _measure, _COLUMNS, num_references=2)
