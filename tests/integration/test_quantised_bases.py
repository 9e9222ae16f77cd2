"""LoRA beside weights in few bits: sampling, checkpointing, the ledger, files and undo."""

from pathlib import Path
from typing import Any

import bits
import pytest
import torch
from models import MODELS
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import leantune as lt
from leantune.core.linear import is_quantised

TINY = MODELS["llama"]
pytestmark = [
    # peft asks transformers for a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # peft says that it cannot merge what was not quantised through transformers.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def adapted(kind: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        bits.build(kind), LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in TINY.batch().items()}


def step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch(model))
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) == 1 + 2 * 6
    # What a GPU adds up in another order on its second run is no difference of ours.
    exact = {"rtol": 0.0, "atol": 0.0} if a["logits"].device.type == "cpu" else {}
    for name in a:
        torch.testing.assert_close(a[name], b[name], **exact)


@pytest.mark.parametrize("kind", bits.KINDS)
def test_gradients_and_undo_are_exact(kind: str) -> None:
    model = adapted(kind)
    wanted = step(model)
    before = list(model.named_modules())
    numbers = [t.clone() for m in model.modules() if is_quantised(m) for t in bits.packed(m.weight)]
    assert len(numbers) >= 14 * 2
    exact = lt.WTACRS(keep_ratio=1.0), lt.Checkpoint(), lt.SPTAttention(keep_ratio=1.0)
    session = lt.apply(model, *exact)
    assert_same(step(model), wanted)
    session.remove()
    assert list(model.named_modules()) == before
    assert_same(step(model), wanted)
    now = [t for m in model.modules() if is_quantised(m) for t in bits.packed(m.weight)]
    assert all(torch.equal(a, b) for a, b in zip(now, numbers, strict=True))


@pytest.mark.parametrize("kind", bits.KINDS)
def test_the_sampled_gradient_is_unbiased(kind: str) -> None:
    model = adapted(kind)
    lt.apply(model, lt.WTACRS(keep_ratio=0.3, min_rows=2), lt.Checkpoint())
    found = lt.fidelity(model, batch(model), num_draws=40)
    assert len(found.parameters) == 6
    for site in found.parameters:
        assert "lora_A" in site.name and site.relative_variance > 0 and not site.looks_biased


@pytest.mark.parametrize("kind", bits.KINDS)
def test_the_ledger_counts_every_tensor_that_a_weight_is_made_of(kind: str) -> None:
    model = adapted(kind)
    layers = [m for m in model.modules() if is_quantised(m)]
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for layer in layers
        for part in bits.packed(layer.weight)
    }
    packed = {id(layer.weight) for layer in layers}
    others = [p for p in model.parameters() if id(p) not in packed]
    rest = {t.data_ptr(): t.numel() * t.element_size() for t in (*others, *model.buffers())}
    plain = lt.ledger(model, batch(model))
    assert plain.weights == sum(storages.values()) + sum(rest.values())
    lt.apply(model, lt.WTACRS(keep_ratio=0.25, min_rows=2), lt.Checkpoint(parts="mlp"))
    found = lt.ledger(model, batch(model))
    assert found.weights == plain.weights
    # q_proj keeps 8 of 32 rows of 16 features, each with its number and its weight.
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
    assert found.saved_bytes(factor) == 8 * (16 * 4 + 4 + 4)


@pytest.mark.parametrize("kind", bits.KINDS)
def test_a_recomputed_block_keeps_no_weight_in_full(kind: str) -> None:
    """Torchao multiplies by a full copy, which backward would keep: more than no quantising."""
    model = adapted(kind)
    copies = lt.ledger(model, batch(model)).by_kind(ledger="activations").get(COPY, 0)
    full = sum(m.in_features * m.out_features for m in model.modules() if is_quantised(m))
    # The first block's query, key and value read an input without a gradient.
    first = (16 + 8 + 8) * 16
    assert copies == (0 if kind.startswith("nf4") else 4 * (full - first))
    lt.apply(model, lt.WTACRS(), lt.Checkpoint())
    assert COPY not in lt.ledger(model, batch(model)).by_kind(ledger="activations")


COPY = "linear weight copy"


@pytest.mark.parametrize("kind", bits.KINDS)
def test_our_own_adapter_is_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = bits.build(kind)
    before = [(name, id(module)) for name, module in model.named_modules()]
    session = lt.apply(model, lt.LoRA(rank=2), lt.WTACRS(min_rows=2), lt.Checkpoint())
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    for _ in range(2):
        step(model)
        optimizer.step()
    # In training mode: for evaluation bitsandbytes packs weights anew; these are too small.
    wanted = step(model)["logits"]
    session.save(tmp_path / "session")
    twin = bits.build(kind)
    lt.load(twin, tmp_path / "session")
    torch.testing.assert_close(step(twin)["logits"], wanted)
    with pytest.raises(lt.ConfigError, match="must be the base that the session was saved from"):
        lt.load(bits.build(kind, seed=1), tmp_path / "session")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(lt.UnsupportedError, match="got lora, which has none on this model"):
        session.merge()
    session.remove()
    assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("kind", bits.KINDS)
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lt.WTACRS(sites=["*q_proj"]), "weight must be a plain tensor, got {kind}"),
        (lt.MeProp(sites=["*q_proj"]), "weight must be a plain tensor, got {kind}"),
        (lt.SparseGrad(sites=["*up_proj"]), "weight must be a plain tensor, got {kind}"),
        (lt.RoutedFFN(), r"linear must be .* weight must be a plain tensor, got {kind}"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_needs_the_weight_itself_names_its_class(kind: str, config: Any, why: str) -> None:
    model = bits.build(kind)
    weight = next(m for m in model.modules() if is_quantised(m)).weight
    with pytest.raises(lt.SiteError, match=why.format(kind=type(weight).__name__)):
        lt.apply(model, config)


@pytest.mark.parametrize("kind", [k for k in bits.KINDS if k != "nf4"][:3])
def test_weights_in_few_bits_are_not_trained(kind: str) -> None:
    model = bits.build(kind)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = list(model.named_modules())
    with pytest.raises(
        lt.UnsupportedError, match=r"must be frozen, got 14 that are to train \(mod"
    ):
        lt.apply(model, lt.Checkpoint())
    assert list(model.named_modules()) == before
    # LoRA freezes them.
    lt.apply(model, lt.LoRA(rank=2), lt.Checkpoint())
