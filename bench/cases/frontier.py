"""The frontier: saved bytes and time of whole steps, ours and what users would take instead.

A step is forward, backward and optimiser (fused AdamW, or what the method brings). Saved bytes are
counted in the autograd graph, compiled regions and PEFT's own functions included.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import device
from bench.cases.wta_crs_speed import COMPILED, Recipe
from bench.models import BertBlocks, Gpt2Blocks, LlamaBlocks, minilm
from bench.timing import TIMES, Bench, say_left_out, settle, timing_row
from leantune.core.linear import is_conv1d
from leantune.measure.peak import compare_steps

RANK = 8
"""Of every LoRA: PEFT's default, and that of the quality rows."""
_RATE = 1e-5

Trained = tuple[nn.Module, torch.optim.Optimizer]
Prepare = Callable[[nn.Module], Trained]


def _applied(recipe: Recipe) -> Prepare:
    def prepare(model: nn.Module) -> Trained:
        methods = recipe()
        if not methods:
            return model, _adamw(model)
        session = lt.apply(model, *methods)
        settle(session)
        return model, session.optimizer(torch.optim.AdamW, lr=_RATE, fused=True)

    return prepare


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=_RATE, fused=True)


def _compiled(budget: float, backend: str) -> Prepare:
    return lambda model: (device.compiled(model, budget, backend), _adamw(model))


def _offloaded(model: nn.Module) -> Trained:
    if not device.has_gpu():
        raise RuntimeError("needs an NVIDIA GPU: a CPU has nowhere to offload to")
    inner: Any = next((m for m in model.children() if hasattr(m, "post_init")), model)
    inner.activation_checkpointing_enable(offload=True)
    return model, _adamw(model)


def peft_model(model: nn.Module, **options: Any) -> Any:
    """Return the model under PEFT, whose LoRA is at the linears that ours adapts."""
    from peft import LoraConfig, get_peft_model

    sites = [s for s in lt.find_sites(model) if s.role == "linear" and s.block is not None]
    config = LoraConfig(
        r=RANK,
        target_modules=[site.name for site in sites],
        modules_to_save=["classifier"] if hasattr(model, "classifier") else None,
        fan_in_fan_out=any(is_conv1d(site.module) for site in sites),
        **options,
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _velora(model: nn.Module) -> Trained:
    from peft import VeloraConfig

    adapted = peft_model(model, velora_config=VeloraConfig())
    return adapted, _adamw(adapted)


def _lora_fa(model: nn.Module) -> Trained:
    from peft.optimizers import create_lorafa_optimizer

    adapted = peft_model(model)
    return adapted, create_lorafa_optimizer(adapted, r=RANK, lora_alpha=RANK, lr=_RATE)


def _by_trainer(optimizer: str) -> Prepare:
    """Let transformers' Trainer make an optimiser that compresses the state of linears."""

    def prepare(model: nn.Module) -> Trained:
        from transformers import Trainer, TrainingArguments

        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder,
                optim=optimizer,
                optim_target_modules="all-linear",
                learning_rate=_RATE,
                report_to=[],
            )
            return model, Trainer(model, args).create_optimizer()

    return prepare


_TENTH = lt.WTACRS(keep_ratio=0.1)
_LORA = lt.LoRA(rank=RANK)
# `lt.Checkpoint` sets transformers' flag, and `lt.LoRA` hands over to peft: what all would take.
EVERYBODYS: dict[str, Recipe] = {
    "plain": lambda: (),
    "checkpointing": lambda: (lt.Checkpoint(),),
    "LoRA": lambda: (_LORA,),
    "LoRA + checkpointing": lambda: (_LORA, lt.Checkpoint()),
}
OTHERS: dict[str, Prepare] = {
    "VeLoRA": _velora,
    "LoRA-FA": _lora_fa,
    "checkpointing, offloaded": _offloaded,
    "GaLore": _by_trainer("galore_adamw"),
    "APOLLO": _by_trainer("apollo_adamw"),
}
OURS: dict[str, Recipe] = {
    "WTA-CRS 0.3": lambda: (lt.WTACRS(keep_ratio=0.3),),
    "WTA-CRS 0.1": lambda: (_TENTH,),
    "MLP recomputed + WTA-CRS 0.1": lambda: (lt.Checkpoint(parts=("mlp",)), _TENTH),
    "checkpointing + WTA-CRS 0.1": lambda: (lt.Checkpoint(), _TENTH),
}
ON_LIGER: dict[str, Recipe] = {
    "Liger": lambda: (lt.Liger(),),
    "Liger + checkpointing": lambda: (lt.Liger(), lt.Checkpoint()),
    **{f"Liger + {name}": lambda r=recipe: (lt.Liger(), *r()) for name, recipe in OURS.items()},
}


def variants(backend: str, has_liger: bool = False) -> dict[str, Prepare]:
    """Return name -> what makes a plain model ready; what all are compared with comes first."""
    compiled = {name: _compiled(budget, backend) for name, budget in COMPILED.items()}
    recipes = OURS | ON_LIGER if has_liger else OURS
    ours = {name: _applied(recipe) for name, recipe in recipes.items()}
    return {n: _applied(r) for n, r in EVERYBODYS.items()} | ours | OTHERS | compiled


@dataclass(frozen=True)
class Case:
    """A model and its batch; see :class:`bench.timing.Case`.

    Args:
        name: of the table.
        model: makes it; called with ``batch``, it returns a loss or an output that has one.
        batch: keyword arguments.
        prepare: of each variant.
        needs_gpu: whether it is for an NVIDIA GPU, and for CPUs otherwise.
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    prepare: dict[str, Prepare]
    needs_gpu: bool = False

    @property
    def variants(self) -> list[str]:
        return list(self.prepare)


def _minilm() -> nn.Module:
    model, _ = minilm()
    # As where its quality is measured.
    model.get_submodule("bert.embeddings").requires_grad_(False)
    return model


def _cases(tiny: bool) -> list[Case]:
    def ids(*shape: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 1000, shape)}

    layers, width, tokens = (1, 64, (2, 64)) if tiny else (12, 768, (64, 512))
    depth, llama_width, shape = (1, 128, (2, 64)) if tiny else (16, 2048, (8, 2048))
    half = torch.bfloat16
    backend = device.compiler() if tiny else "inductor"
    all_of = variants(backend)
    on_gpu = [
        Case(
            "Llama-1B x 16, 8 x 2048, bf16",
            lambda: LlamaBlocks(depth, llama_width).to(half),
            lambda: ids(*shape),
            variants(backend, has_liger=True),
            needs_gpu=True,
        ),
        Case(
            "BERT-base x 12, 64 x 512, bf16",
            lambda: BertBlocks(layers, width).to(half),
            lambda: {"x": torch.randn(*tokens, width, dtype=half)},
            all_of,
            needs_gpu=True,
        ),
    ]
    if tiny:
        return on_gpu
    on_cpu = [
        Case(
            f"{name} block x 4, 16 x 128",
            model,
            lambda: {"x": torch.randn(16, 128, 768)},
            all_of,
        )
        for name, model in (("BERT-base", BertBlocks), ("GPT-2", Gpt2Blocks))
    ]
    labels = {"labels": torch.zeros(16, dtype=torch.long)}
    real = Case("MiniLM, 16 x 128", _minilm, lambda: ids(16, 128) | labels, all_of)
    return [*on_cpu, real, *on_gpu]


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Time whole steps of the variants in turn; count what each keeps in the graph and beside it.

    On a GPU a variant that fails ends its comparison with plain training; on a CPU, where all are
    in one, it is left out.
    """
    torch.manual_seed(0)
    with where:
        base, batch = case.model().train(), case.batch()
    models: dict[str, Trained] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name in variants:
        try:
            models[name] = case.prepare[name](copy.deepcopy(base))
            step = _step(*models[name], batch)
            # The warm-up: compiles, and makes the optimiser's state.
            step()
            steps[name] = step
        except Exception as error:
            if case.needs_gpu or name == variants[0]:
                raise
            say_left_out(case, name, error)
    stats = compare_steps(steps, reference=variants[0], rounds=5, warmup=0)
    made = []
    for name, s in stats.items():
        model, optimizer = models[name]
        book = lt.ledger(model, batch, optimizer=optimizer)
        # What is offloaded lies elsewhere.
        saved = sum(
            entry.num_bytes
            for entry in book.entries
            if entry.ledger == "activations" and torch.device(entry.device).type == where.type
        )
        state = book.gradients + book.optimizer
        made.append(timing_row(case, name, s, saved) | {"state_bytes": state})
    plain = made[0]["saved_bytes"]
    return [row | {"saved_ratio": round(row["saved_bytes"] / plain, 3)} for row in made]


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> Callable[[], None]:
    def step() -> None:
        out = model(**batch)
        getattr(out, "loss", out).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


COLUMNS = {**TIMES, "saved_mib": "saved MiB", "saved_ratio": "saved ratio", "peak_mib": "peak MiB"}
BENCH = Bench("frontier", _cases, _measure, COLUMNS, goes_on=True)
