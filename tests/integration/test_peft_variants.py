"""Every variant of PEFT's LoRA computes under a session what it computes alone, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from torch import Tensor, nn

import leantune as lt
from leantune.core.config import MethodConfig
from leantune.core.linear import ConvertedLinear
from leantune.core.survey import survey

TINY = MODELS["llama"]
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
pytestmark = [
    # peft asks transformers for a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "all"},
    "factor_bias": {"lora_bias": True},
    "ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 3}},
    "layers": {"layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "embedding": {"target_modules": ["embed_tokens", *TARGETS]},
    "replicated": {"layer_replication": [[0, 2], [0, 2]]},
    **{name: {"init_lora_weights": name} for name in ("gaussian", "pissa", "olora", "orthogonal")},
}
CALLING: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "mica": {"init_lora_weights": "mica"},
    "kasa": {"kasa_config": KasaConfig()},
    "alora": {"alora_invocation_tokens": [40], "task_type": "CAUSAL_LM"},
    "block_b": {"use_bdlora": BdLoraConfig(target_modules_bd_b=TARGETS, nblocks=2)},
}
BLOCK_A = {"use_bdlora": BdLoraConfig(target_modules_bd_a=TARGETS, nblocks=2)}
IN_PARAMETERS = {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}
MULTIPLYING: dict[str, tuple[dict[str, Any], str]] = {
    "velora": ({"velora_config": VeloraConfig(num_groups=4)}, "VeloraLinearVariant"),
    "monteclora": ({"monteclora_config": MontecloraConfig()}, "MontecloraLinearVariant"),
    "block_a": (BLOCK_A, "BdLoraLinearVariant"),
    "parameters": (IN_PARAMETERS, "ParamWrapper"),
}


def lora(**options: Any) -> Any:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, **options})


def fill(model: nn.Module) -> None:
    """Give both factors of every adapter numbers that depend on their names' order alone."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name and "magnitude" not in name and "sampler" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(TINY.build(), lora(**options))
    fill(model)
    return model


def step(model: Any) -> dict[str, Tensor]:
    """Return logits and gradients of one batch, by the names without what PEFT puts in front."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**{**TINY.batch(), "input_ids": TINY.batch()["input_ids"].clamp(max=40)})
    out.loss.backward()
    grads = {n.split("layers.")[-1]: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), **{n: g for n, g in grads.items() if g is not None}}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert len(a) > 1
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


EXACT: dict[str, Callable[[], MethodConfig]] = {
    "rows": lambda: lt.WTACRS(keep_ratio=1.0),
    "checkpoint": lt.Checkpoint,
    "attention": lambda: lt.SPTAttention(keep_ratio=1.0),
    "ffn": lambda: lt.RoutedFFN(num_active=4, balance_weight=0.0),
}


@pytest.mark.parametrize("variant", PLAIN)
def test_plain_lora_however_it_starts_is_seen_through_by_all(variant: str) -> None:
    wanted = step(build(**PLAIN[variant]))
    model = build(**PLAIN[variant])
    session = lt.apply(model, *(make() for make in EXACT.values()))
    assert same(step(model), wanted)
    session.remove()
    assert same(step(model), wanted)


@pytest.mark.parametrize("variant", CALLING)
def test_a_variant_that_calls_its_factors_is_sampled(variant: str) -> None:
    wanted = step(build(**CALLING[variant]))
    model = build(**CALLING[variant])
    lt.apply(model, EXACT["rows"](), EXACT["attention"]())
    assert sum(isinstance(m, ConvertedLinear) for m in model.modules()) == 2 * len(TARGETS)
    assert same(step(model), wanted)
    model = build(**CALLING[variant])
    lt.apply(model, lt.WTACRS(keep_ratio=0.3, min_rows=2))
    got = step(model)
    firsts = [name for name in wanted if "lora_A" in name]
    assert got.keys() == wanted.keys() and firsts
    assert not any(torch.equal(got[name], wanted[name]) for name in firsts)


@pytest.mark.parametrize("variant", CALLING)
def test_what_is_sampled_can_be_sparse_in_features_instead(variant: str) -> None:
    wanted = step(build(**CALLING[variant]))
    model = build(**CALLING[variant])
    lt.apply(model, lt.MeProp(keep_ratio=1.0))
    assert same(step(model), wanted)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
        AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q_proj", "up_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_tuners_are_worked_around(config: Any) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(TINY.build(), config)

    wanted = step(adapted())
    model = adapted()
    lt.apply(model, lt.Checkpoint(), EXACT["attention"]())
    assert same(step(model), wanted)
    with pytest.raises(lt.SiteError, match="RoutedFFN: 2 of 2 sites cannot be used"):
        lt.apply(adapted(), lt.RoutedFFN())


@pytest.mark.parametrize("variant", ["dora", "mica", "kasa", "block_b", "velora", "parameters"])
def test_a_variant_that_is_a_function_is_recomputed(variant: str) -> None:
    options = CALLING[variant] if variant in CALLING else MULTIPLYING[variant][0]
    wanted = step(build(**options))
    model = build(**options)
    lt.apply(model, lt.Checkpoint(), EXACT["attention"]())
    assert same(step(model), wanted)


@pytest.mark.parametrize("variant", MULTIPLYING)
def test_a_variant_that_reads_its_factors_weights_is_refused_by_name(variant: str) -> None:
    options, kind = MULTIPLYING[variant]
    model = build(**options)
    before = list(model.named_modules())
    for config in (lt.WTACRS(), lt.WTACRS(sites=["*lora_A*"]), lt.MeProp(sites=["*lora_A*"])):
        with pytest.raises(lt.SiteError, match=rf"must call its factors as linears, got {kind}"):
            lt.apply(model, config)
    assert list(model.named_modules()) == before
    assert any(kind in left.why for left in survey(model).left)


@pytest.mark.parametrize("variant", [*CALLING, *MULTIPLYING])
def test_a_routed_ffn_refuses_what_is_no_plain_lora(variant: str) -> None:
    options = CALLING[variant] if variant in CALLING else MULTIPLYING[variant][0]
    with pytest.raises(lt.SiteError, match=r"adapter must be plain LoRA, got .*(Variant|Param)"):
        lt.apply(build(**options), lt.RoutedFFN())


@pytest.mark.parametrize("parts", ["block", ["mlp"]])
@pytest.mark.parametrize("variant", ["alora", "monteclora"])
def test_what_would_compute_something_else_is_not_recomputed(variant: str, parts: Any) -> None:
    options = CALLING[variant] if variant in CALLING else MULTIPLYING[variant][0]
    with pytest.raises(
        lt.SiteError, match=r"the same when it is run again, got (ALora|Monteclora)"
    ):
        lt.apply(build(**options), lt.Checkpoint(parts=parts))


def test_an_activated_adapter_under_the_models_own_checkpointing() -> None:
    wanted = step(build(**CALLING["alora"]))
    model = build(**CALLING["alora"])
    model.activation_checkpointing_enable()
    lt.apply(model, EXACT["rows"]())
    assert same(step(model), wanted)


def ours(*methods: MethodConfig) -> tuple[Any, lt.Session]:
    model: Any = TINY.build()
    sites = [f"*{name}" for name in TARGETS]
    return model, lt.apply(model, lt.LoRA(rank=2, alpha=8, sites=sites), *methods)


def theirs(*methods: MethodConfig) -> tuple[Any, lt.Session]:
    model: Any = get_peft_model(TINY.build(), lora())
    return model, lt.apply(model, *methods)


def life_of(model: Any) -> list[dict[str, Tensor]]:
    """Add, switch, disable and delete an adapter; one step after each."""
    is_wrapped = isinstance(model, PeftModel)
    steps = [step(model)]
    if is_wrapped:
        model.add_adapter("second", lora(r=3))
    else:
        model.add_adapter(lora(r=3), adapter_name="second")
    fill(model)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        steps.append(step(model))
    if is_wrapped:
        with model.disable_adapter():
            steps.append({"logits": TINY.logits(model)})
    else:
        model.disable_adapters()
        steps.append({"logits": TINY.logits(model)})
        model.enable_adapters()
    steps.append(step(model))
    model.delete_adapter("second")
    return [*steps, step(model)]


@pytest.mark.parametrize("method", [*EXACT, "all"])
@pytest.mark.parametrize("order", [ours, theirs], ids=["ours", "theirs"])
def test_adapters_come_and_go_under_a_session(order: Callable, method: str, tmp_path: Path) -> None:
    chosen = [EXACT[method]] if method in EXACT else list(EXACT.values())
    plain, (model, session) = get_peft_model(TINY.build(), lora()), order(*(m() for m in chosen))
    fill(plain)
    fill(model)
    for got, wanted in zip(life_of(model), life_of(plain), strict=True):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in got)
    wanted = TINY.logits(model)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(TINY.build(), str(tmp_path))
    assert torch.equal(TINY.logits(back), wanted)
    if order is theirs:
        plain = model.merge_and_unload()
        session.remove()
    else:
        session.merge()
        plain = model
    assert [type(m) for m in plain.modules()] == [type(m) for m in TINY.build().modules()]
    torch.testing.assert_close(TINY.logits(plain), wanted)


def test_a_session_of_an_adapter_loads_onto_its_own_base_alone(tmp_path: Path) -> None:
    model = get_peft_model(TINY.build(), lora())
    lt.apply(model, lt.WTACRS(min_rows=2)).save(tmp_path)
    other = get_peft_model(TINY.build(seed=1), lora())
    with pytest.raises(lt.ConfigError, match=r"must be the base .* got other weights in"):
        lt.load(other, tmp_path)
    lt.load(get_peft_model(TINY.build(), lora()), tmp_path)
