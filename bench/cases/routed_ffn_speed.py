"""Step time and saved bytes of routed FFNs beside the dense LoRA FFN, interleaved in one run."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer

import leantune as lt
from bench.timing import TIMES, Bench, timing_row
from leantune.core.config import MethodConfig
from leantune.measure.peak import compare_steps

NUM_TOKENS = 2048

_LORA = lt.LoRA(rank=16)


class LlamaFFN(nn.Module):
    """The gated FFN of a Llama block with its norm and residual; (n, d_model) -> a () loss."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=d_model, intermediate_size=d_model * 11 // 4, num_attention_heads=8
        )
        self.block = LlamaDecoderLayer(config, 0)
        del self.block.self_attn

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of the residual stream, a () loss with a gradient on each row."""
        return (x + self.block.mlp(self.block.post_attention_layernorm(x))).float().square().mean()


class OPTFFN(nn.Module):
    """The plain FFN of an OPT block with its norm and residual; (n, d_model) -> a () loss."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        config = OPTConfig(hidden_size=d_model, ffn_dim=4 * d_model, num_attention_heads=8)
        self.block = OPTDecoderLayer(config)
        del self.block.self_attn

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean square of the residual stream, a () loss with a gradient on each row."""
        block = self.block
        y = x + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))
        return y.float().square().mean()


@dataclass(frozen=True)
class Case:
    """One FFN; see :class:`bench.timing.Case`."""

    name: str
    model: Callable[[], nn.Module]
    d_model: int
    dtype: torch.dtype
    num_tokens: int = NUM_TOKENS
    needs_gpu: bool = False

    @property
    def variants(self) -> list[str]:
        return list(VARIANTS)


def _cases(tiny: bool) -> list[Case]:
    num_tokens = 128 if tiny else 16384
    kinds: dict[str, Callable[[int], nn.Module]] = {"Llama": LlamaFFN, "OPT": OPTFFN}
    cases = []
    for kind, build in kinds.items():
        for width in (1024, 2048):
            name = f"{kind} FFN {width}, {NUM_TOKENS} tokens"
            cases.append(Case(name, lambda b=build, w=width: b(w), width, torch.float32))
        for width in (4096, 2048):
            name = f"{kind} FFN {width}, 16384 tokens, bf16"
            d = width // 64 if tiny else width
            model = lambda b=build, d=d: b(d)  # noqa: E731
            cases.append(Case(name, model, d, torch.bfloat16, num_tokens, needs_gpu=True))
    return [case for case in cases if case.needs_gpu or not tiny]


VARIANTS: dict[str, tuple[MethodConfig, ...]] = {
    "LoRA 16": (_LORA,),
    "LoRA 16 + routed 2 of 4": (_LORA, lt.RoutedFFN()),
    "LoRA 16 + routed 2 of 4, low-rank guess": (_LORA, lt.RoutedFFN(compensate="lowrank")),
    "LoRA 16 + routed 4 of 8": (_LORA, lt.RoutedFFN(num_groups=8, num_active=4)),
}


_COLUMNS = {
    **TIMES,
    "saved_mib": "saved MiB",
    "load": "load of the groups",
}


def _measure(case: Case, where: torch.device, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Time forward + backward of some variants in turn, the gradient of the input included."""
    torch.manual_seed(0)
    with where:
        base = case.model().to(case.dtype).train()
        x = torch.randn(case.num_tokens, case.d_model, dtype=case.dtype)
    x.requires_grad_()
    models, sessions = {}, {}
    for name in variants:
        models[name] = copy.deepcopy(base)
        sessions[name] = lt.apply(models[name], *VARIANTS[name])
        sessions[name].calibrate([x.detach()])

    def step(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        x.grad = None
        (models[name](x) + sessions[name].auxiliary_loss()).backward()

    steps = {name: (lambda n=name: step(n)) for name in models}
    stats = compare_steps(steps, reference="LoRA 16", rounds=5)
    return [
        {
            **timing_row(case, name, s, lt.ledger(models[name], (x,)).activations),
            "load": _load(models[name], VARIANTS[name], x),
        }
        for name, s in stats.items()
    ]


def _load(model: nn.Module, methods: tuple[MethodConfig, ...], x: Tensor) -> list[float] | None:
    """Return the share of tokens that each group gets, or None for a dense FFN."""
    config = next((m for m in methods if isinstance(m, lt.RoutedFFN)), None)
    if config is None:
        return None
    logits: list[Tensor] = []
    router = next(m for name, m in model.named_modules() if name.endswith(".router"))
    handle = router.register_forward_hook(lambda module, args, out: logits.append(out[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    chosen = logits[0].topk(config.num_active, -1).indices
    counts = chosen.flatten().bincount(minlength=config.num_groups)
    return [round(c, 3) for c in (counts / len(x)).tolist()]


BENCH = Bench("routed_ffn_speed", _cases, _measure, _COLUMNS)
