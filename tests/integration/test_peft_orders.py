"""PEFT and a session on one model, in every order: what works, what is refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import MODELS
from peft import LoraConfig, get_peft_model
from torch import nn

import leantune as lt
from leantune.core.linear import ConvertedLinear

TINY = MODELS["llama"]
TARGETS = ["q_proj", "up_proj", "down_proj"]
pytestmark = [
    # peft asks transformers for a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def lora(**options: Any) -> Any:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, **options})


def sampled() -> lt.WTACRS:
    return lt.WTACRS(min_rows=2)


def num_converted(model: nn.Module) -> int:
    return sum(isinstance(module, ConvertedLinear) for module in model.modules())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"bias": "all"},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", *TARGETS]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("end", ["merge", "remove"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_that_was_there_first(variant: str, end: str) -> None:
    model = get_peft_model(TINY.build(), lora(**VARIANTS[variant]))
    before = list(model.named_modules())
    session = lt.apply(model, sampled())
    assert num_converted(model) == 6
    TINY.train(model, 2)
    wanted = TINY.logits(model)
    getattr(session, end)()
    assert list(model.named_modules()) == before
    assert torch.equal(TINY.logits(model), wanted)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["q_proj"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
        peft.LNTuningConfig(target_modules=["input_layernorm"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_an_adapter_without_linears_leaves_nothing_to_sample(config: Any) -> None:
    model = get_peft_model(TINY.build(), config)
    with pytest.raises(lt.SiteError, match=r"got none by the method's own choice .*frozen"):
        lt.apply(model, sampled())


@pytest.mark.parametrize("end", ["merge", "remove"])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_an_adapter_that_peft_takes_out_again(how: str, end: str) -> None:
    model = get_peft_model(TINY.build(), lora())
    session = lt.apply(model, sampled())
    TINY.train(model)
    plain = getattr(model, how)()
    wanted = TINY.logits(plain)
    getattr(session, end)()
    assert [type(m) for m in plain.modules()] == [type(m) for m in TINY.build().modules()]
    assert not (session.conversions or model._forward_hooks or model._forward_pre_hooks)
    assert torch.equal(TINY.logits(plain), wanted)


@pytest.mark.parametrize("is_first_deleted", [False, True])
def test_a_second_adapter_comes_and_goes(is_first_deleted: bool) -> None:
    model = get_peft_model(TINY.build(), lora())
    session = lt.apply(model, sampled())
    TINY.train(model)
    model.add_adapter("second", lora())
    model.set_adapter("second")
    TINY.train(model)
    model.set_adapter("default")
    with model.disable_adapter():
        model(**TINY.batch())
    model.merge_adapter()
    model.unmerge_adapter()
    TINY.train(model)
    if is_first_deleted:
        model.delete_adapter("default")
    second = {n: p.clone() for n, p in model.named_parameters() if "second" in n}
    assert second
    session.merge()
    assert num_converted(model) == 0
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in second.items())


def test_our_own_adapter_with_another_beside_it_is_left_alone() -> None:
    model = TINY.build()
    session = lt.apply(model, lt.LoRA(rank=2), sampled())
    TINY.train(model)
    model.add_adapter(lora(), adapter_name="theirs")
    before = list(model.named_modules())
    with pytest.raises(lt.UnsupportedError, match=r"got 6 that others have .*q_proj"):
        session.merge()
    assert list(model.named_modules()) == before and session.conversions
    model.delete_adapter("theirs")
    model.set_adapter("default")
    wanted = TINY.logits(model)
    session.merge()
    torch.testing.assert_close(TINY.logits(model), wanted)


def test_an_adapter_on_a_model_inside_an_adapted_one_is_refused() -> None:
    model = get_peft_model(TINY.build(), lora())
    with pytest.raises(lt.UnsupportedError, match="must carry no PEFT adapter yet"):
        lt.apply(model.base_model.model.model, lt.LoRA(rank=2))


def test_copies_of_converted_modules_do_not_train() -> None:
    model = TINY.build()
    session = lt.apply(model, sampled())
    tuned = get_peft_model(model, lora(modules_to_save=["k_proj"]))
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    with pytest.raises(lt.SiteError, match=r"got a copy at .*k_proj\.modules_to_save\.default"):
        tuned(**TINY.batch())
    with pytest.raises(lt.UnsupportedError, match=r"got 2 .*modules_to_save"):
        session.remove()
    for layer in model.model.layers:
        layer.self_attn.k_proj = layer.self_attn.k_proj.original_module
    tuned.unload()
    session.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in TINY.build().modules()]


def linear(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    mlp = model.get_submodule("model.layers.0.mlp")
    return mlp, mlp.get_submodule("up_proj")


def in_sequence(model: nn.Module) -> None:
    mlp, up = linear(model)
    mlp.up_proj = nn.Sequential(up, nn.Identity())


def compiled(model: nn.Module) -> None:
    layers = model.get_submodule("model.layers")
    layers[0] = torch.compile(layers[0], backend="eager")  # type: ignore[index, operator]


def checkpointed(model: nn.Module) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.get_submodule("model.layers")
    layers[0] = checkpoint_wrapper(layers[0])  # type: ignore[index, operator]


def pruned(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:1]  # type: ignore[union-attr, index]


@pytest.mark.parametrize("change", [in_sequence, compiled, checkpointed, pruned])
def test_what_others_put_around_a_module_stays_around_the_original(change: Callable) -> None:
    model, twin = TINY.build(), TINY.build()
    originals = {id(m) for m in model.modules()}
    session = lt.apply(model, sampled())
    change(model)
    change(twin)
    session.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    now = {id(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert now <= originals


def replaced(model: nn.Module) -> None:
    linear(model)[0].up_proj = nn.Linear(16, 32)


def copied(model: nn.Module) -> None:
    layers = model.get_submodule("model.layers")
    layers[0] = copy.deepcopy(layers[0])  # type: ignore[index, operator]


def hooked(model: nn.Module) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(linear(model)[1], ModelHook())


def compiled_in_place(model: nn.Module) -> None:
    linear(model)[1].compile(backend="eager")


@pytest.mark.parametrize("change", [replaced, copied, hooked, compiled_in_place])
def test_what_others_replaced_is_named_and_nothing_moves(change: Callable) -> None:
    model = TINY.build()
    session = lt.apply(model, sampled())
    change(model)
    before = list(model.named_modules())
    for end in (session.merge, session.remove):
        with pytest.raises(lt.UnsupportedError, match=r"others have .*layers\.0\.mlp\.up_proj"):
            end()
    assert list(model.named_modules()) == before and session.conversions


@pytest.mark.parametrize("change", [hooked, compiled_in_place])
def test_a_linear_with_a_forward_of_its_own_is_refused(change: Callable) -> None:
    """A twin would hold that forward, which runs the original and samples nothing."""
    model = TINY.build()
    change(model)
    before = list(model.named_modules())
    with pytest.raises(lt.SiteError, match=r"1 of 2 sites .*forward must be that of"):
        lt.apply(model, lt.WTACRS(sites="mlp.up"))
    assert list(model.named_modules()) == before
    lt.apply(model, lt.LoRA(rank=2)).remove()


@pytest.mark.parametrize("order", [1, -1])
def test_our_adapter_beside_trained_weights_in_either_order(order: int) -> None:
    """What our own LoRA freezes another method of the recipe trains all the same."""
    model = TINY.build()
    sparse = lt.SparseGrad(num_calibration_batches=1, density=0.1)
    recipe = [lt.LoRA(rank=2, sites=["q_proj", "v_proj"]), sparse]
    session = lt.apply(model, *recipe[::order])
    session.calibrate([TINY.batch()])
    TINY.train(model, 2)
    wanted = TINY.logits(model)
    session.merge()
    torch.testing.assert_close(TINY.logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(TINY.logits(TINY.build()), wanted, atol=1e-3)
    assert all(p.requires_grad for p in model.parameters())


def test_siblings_are_two_sessions() -> None:
    model = TINY.build()
    before = list(model.named_modules())
    first, second = (lt.apply(model.model.layers[i], lt.WTACRS(sites="linear")) for i in range(2))
    first.remove()
    second.remove()
    assert list(model.named_modules()) == before
