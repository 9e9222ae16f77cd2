"""Every method on every popular model type: it runs and is right, or it is refused by name."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import zoo
from peft.tuners.lora import LoraLayer
from stats import Check, mean_check
from torch import Tensor, nn
from transformers import Conv1D
from transformers.modeling_layers import GradientCheckpointingLayer

import leantune as lt
from leantune.core import registry
from leantune.core.config import MethodConfig
from leantune.errors import LeantuneError

REFUSED: dict[str, dict[str, str]] = {
    "lora": {"incompatible with Mamba": "mamba"},
    "sparse_grad": {"the method's own choice": "gpt_oss mamba mixtral qwen3_moe"},
    "routed_ffn": {
        "the model has none": "gpt_oss mamba mixtral qwen3_moe",
        "without activation": "xlnet",
    },
    "spt_attention": {
        "computes its own": "big_bird bloom deberta deberta_v2 falcon gpt_neo gptj led "
        "longformer longt5 mpnet mpt",
        "softcap": "gemma2",
        "s_aux": "gpt_oss",
        "the model has none": "mamba xlnet",
    },
}
"""Method -> what the refusal says -> types. One that appears or disappears fails a test."""

CASES = [(m, reason, n) for m, of in REFUSED.items() for reason in of for n in of[reason].split()]


LAYOUTS = (
    "albert bart bert bloom deberta_v2 gemma2 gpt2 gpt_oss llama mamba mixtral modernbert phi phi3 "
    "t5 vit whisper"
)
"""One type of each layout; the others are the same in other words, and their tests slow."""
_MORE = f"{LAYOUTS} cohere deepseek_v3 falcon led longformer qwen2_vl qwen3_next".split()
MORE_LAYOUTS = [name for name in _MORE if name in zoo.NAMES]
"""And of each that only some of the methods tell apart: what takes seconds runs on these alone."""


def runs(*methods: str) -> Any:
    """Parametrise by the types that no refusal of these methods names."""
    refused = {name for method, _, name in CASES if method in methods}
    fast = LAYOUTS.split()
    names = [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in zoo.NAMES]
    return pytest.mark.parametrize("name", [p for p in names if p.values[0] not in refused])


@pytest.mark.parametrize(
    ("method", "reason", "name"), [case for case in CASES if case[2] in zoo.NAMES]
)
def test_refused_by_name_and_untouched(method: str, reason: str, name: str) -> None:
    model, _ = zoo.build(name)
    modules = list(model.named_modules())
    with pytest.raises(LeantuneError, match=reason):
        lt.apply(model, example(method))
    assert list(model.named_modules()) == modules


def convert(name: str, *methods: MethodConfig) -> tuple[nn.Module, zoo.Batch]:
    model, batch = zoo.build(name)
    lt.apply(model, *methods).calibrate([batch, batch])
    return model, batch


def example(method: str) -> MethodConfig:
    return registry.get(method).config(**registry.get(method).test_options)


def neutral(method: str) -> MethodConfig:
    options = registry.get(method).identity_options
    assert options is not None
    return registry.get(method).config(**options)


def outputs(model: nn.Module, batch: zoo.Batch) -> list[Tensor]:
    """Every floating-point tensor of the model's output."""
    found = model(**batch).to_tuple()
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


def step(model: nn.Module, batch: zoo.Batch) -> dict[str, Tensor]:
    """Run forward and backward: the gradients, and the outputs under "0", "1", ..."""
    model.zero_grad()
    found = outputs(model, batch)
    found[0].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**grads, **{str(i): x.detach() for i, x in enumerate(found)}}


def differing(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    """Outputs differ unless they are equal to the bit; sums of gradients may round another way."""
    assert got.keys() == wanted.keys()
    return {
        name
        for name in wanted
        if not torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-7)
        or (name.isdigit() and not torch.equal(got[name], wanted[name]))
    }


def sampled(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if getattr(m, "rows", None) is not None}


class Exact(NamedTuple):
    """What a plain model computes, and the bytes of activations that it keeps."""

    training: dict[str, Tensor]
    evaluation: list[Tensor]
    activations: int

    @property
    def outputs(self) -> list[Tensor]:
        """Those of training."""
        return [x for name, x in self.training.items() if name.isdigit()]


@cache
def exact(name: str) -> Exact:
    model, batch = zoo.build(name)
    training, activations = step(model, batch), lt.ledger(model, batch).activations
    with torch.no_grad():
        return Exact(training, outputs(model.eval(), batch), activations)


@runs()
def test_wta_crs_takes_every_linear_of_the_blocks_and_touches_their_weight_gradients_alone(
    name: str,
) -> None:
    plain, _ = zoo.build(name)
    model, batch = convert(name, lt.WTACRS())
    taken = sampled(model).keys()
    blocks = [n for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    linears = {n for n, m in plain.named_modules() if type(m) in (nn.Linear, Conv1D)}
    inside = {n for n in linears if any(n.startswith(f"{b}.") for b in blocks)}
    assert inside <= taken
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert head is None or all(model.get_submodule(n) is not head for n in taken)
    changed = differing(step(model, batch), exact(name).training)
    assert changed <= {f"{linear}.weight" for linear in sampled(model)}
    with torch.no_grad():
        assert all(map(torch.equal, outputs(model.eval(), batch), exact(name).evaluation))


@runs()
def test_wta_crs_draws_once_for_each_tensor_that_is_read_and_keeps_less(name: str) -> None:
    model, batch = convert(name, lt.WTACRS(keep_ratio=0.3))
    linears, readers = sampled(model), Readers()
    for linear, module in linears.items():
        module.register_forward_pre_hook(readers.hook(linear))
    book = lt.ledger(model, batch)
    assert book.activations < exact(name).activations
    samples = Counter(
        frozenset(holder.module for holder in entry.holders)
        for entry in book.entries
        # The rows' numbers, which each sample has of its own.
        if entry.dtype == torch.int32 and entry.module in linears
    )
    assert samples == readers.by_tensor()


class Readers:
    """Which linears read one tensor at one version, as hooks see it."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[Tensor, list[str]]] = {}

    def hook(self, linear: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            if x.shape[:-1].numel() > lt.WTACRS().min_rows:
                self.seen.setdefault((id(x), x._version), (x, []))[1].append(linear)

        return note

    def by_tensor(self) -> Counter[frozenset[str]]:
        return Counter(frozenset(linears) for _, linears in self.seen.values())


# Linears called twice; parallel blocks; blocks that read one encoder; one layer for all blocks.
UNBIASED = ["deberta_v2", "phi", "bart", "albert"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MORE_LAYOUTS if name not in UNBIASED])
def test_wta_crs_weight_gradients_show_no_bias(name: str) -> None:
    model, batch = convert(name, lt.WTACRS())
    overall = lt.fidelity(model, batch, num_draws=16).overall
    assert overall is not None and overall.bias_ratio < 2 and overall.cosine > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_wta_crs_weight_gradients_are_unbiased(name: str) -> None:
    assert bias(name, lt.WTACRS()).ok
    assert not bias(name, lt.WTACRS(estimator="topk")).ok


def bias(name: str, method: lt.WTACRS) -> Check:
    plain, batch = zoo.build(name)
    model, _ = convert(name, method)
    weights = sorted(f"{linear}.weight" for linear in sampled(model))

    def gradients(model: nn.Module) -> Tensor:
        grads = step(model, batch)
        return torch.cat([grads[weight].flatten()[::5] for weight in weights])

    draws = torch.stack([gradients(model) for _ in range(50)])
    return mean_check(draws, gradients(plain), resolution=1e-7)


@runs()
def test_checkpoint_is_exact_and_keeps_less(name: str) -> None:
    model, batch = convert(name, lt.Checkpoint())
    assert not differing(step(model, batch), exact(name).training)
    assert lt.ledger(model, batch).activations < exact(name).activations


# Mixtures of experts, mixers of another kind, and blocks whose attention or FFN is not seen.
NO_PART = {
    "mlp": "albert deepseek_v3 gpt_oss llama4 mamba mixtral qwen2_moe qwen2_vl qwen3_moe "
    "qwen3_next",
    "attention": "albert mamba qwen3_5 qwen3_next xlnet",
}


@pytest.mark.parametrize("part", NO_PART)
@runs()
def test_a_recomputed_part_is_exact_and_keeps_less_or_is_refused(name: str, part: str) -> None:
    if name in NO_PART[part].split():
        with pytest.raises(LeantuneError, match=f"its {part} must be told from the rest, got"):
            lt.apply(zoo.build(name)[0], lt.Checkpoint(parts=part))
        return
    model, batch = convert(name, lt.Checkpoint(parts=part))
    assert not differing(step(model, batch), exact(name).training)
    assert lt.ledger(model, batch).activations < exact(name).activations


@runs("lora")
def test_lora_adapts_every_linear_asked_for_and_samples_beside_it(name: str) -> None:
    plain, _ = zoo.build(name)
    linears = [s for s in lt.find_sites(plain) if s.role == "linear" and s.unusable is None]
    asked = {s.name for s in linears if s.block is not None}
    model, batch = convert(name, lt.LoRA(rank=4), lt.WTACRS())
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapters.keys() == asked
    torch.testing.assert_close(outputs(model, batch), exact(name).outputs, rtol=1e-4, atol=1e-5)
    grads = step(model, batch)
    # Without a token of global attention nothing runs through its linears.
    for adapter in [name for name in adapters if not name.endswith("_global")]:
        assert torch.isfinite(grads[f"{adapter}.lora_B.default.weight"]).all()


@runs("sparse_grad")
def test_sparse_grad(name: str) -> None:
    check_neutral_and_other_options("sparse_grad", name)


@runs("routed_ffn")
def test_routed_ffn(name: str) -> None:
    check_neutral_and_other_options("routed_ffn", name)


@runs("spt_attention")
def test_spt_attention(name: str) -> None:
    check_neutral_and_other_options("spt_attention", name)


def check_neutral_and_other_options(method: str, name: str) -> None:
    model, batch = convert(name, neutral(method))
    torch.testing.assert_close(outputs(model, batch), exact(name).outputs, rtol=1e-4, atol=1e-5)
    model, _ = convert(name, example(method))
    assert all(torch.isfinite(x).all() for x in step(model, batch).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_LAYOUTS)
def test_remove_puts_the_objects_back(name: str) -> None:
    model, batch = zoo.build(name)
    modules = list(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    for method in registry.list_methods():
        try:
            session = lt.apply(model, example(method))
        except LeantuneError:
            continue  # Other tests know which.
        session.calibrate([batch, batch])
        step(model, batch)
        session.remove()
        assert list(model.named_modules()) == modules
        assert [p.requires_grad for p in model.parameters()] == flags
