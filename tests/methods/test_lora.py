"""LoRA through peft: what trains, what it starts from, its files, its merging."""

from pathlib import Path

import pytest
import torch
import zoo
from models import MODELS
from torch import nn

import leantune as lt
from leantune.core.linear import ConvertedLinear
from leantune.errors import UnsupportedError

TINY = MODELS["bert"]
# peft asks transformers for a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_factors_and_head_train_and_nothing_else() -> None:
    model = TINY.build()
    lt.apply(model, lt.LoRA(rank=3))
    names = trained(model)
    factors = {n for n in names if "lora_" in n}
    # Six linears in each of two blocks.
    assert len(factors) == 2 * 12
    assert {n.split(".")[0] for n in names - factors} == {"classifier"}
    shapes = {tuple(model.get_parameter(n).shape) for n in factors if "lora_A" in n}
    assert shapes == {(3, 16), (3, 32)}


def test_head_may_stay_frozen_and_sites_may_be_chosen() -> None:
    model = TINY.build()
    lt.apply(model, lt.LoRA(rank=3, train_head=False, sites=["query", "value"]))
    assert {n.split("self.")[1].split(".")[0] for n in trained(model)} == {"query", "value"}


def test_start_is_the_plain_model_and_depends_on_the_seed_alone() -> None:
    plain = TINY.build()
    results = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        model = TINY.build()
        lt.apply(model, lt.LoRA(rank=3), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(**TINY.batch()).logits, plain(**TINY.batch()).logits)
        names = [n for n in sorted(trained(model)) if "lora_A" in n]
        results.append(torch.cat([model.get_parameter(n).flatten() for n in names]).detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_the_start_is_drawn_without_starting_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY.build()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    lt.apply(model, lt.LoRA(rank=3))


def test_scaling_is_alpha_by_rank() -> None:
    model = TINY.build()
    lt.apply(model, lt.LoRA(rank=4, alpha=6.0, sites="query"))
    layer = model.bert.encoder.layer[0].attention.self.query
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    nn.init.normal_(b.weight)
    x = torch.randn(3, 16)
    wanted = layer.base_layer(x) + 1.5 * (x @ a.weight.t() @ b.weight.t())
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_adapter_on_disk_is_a_plain_peft_one(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny = MODELS[name]
    model = tiny.build()
    session = lt.apply(model, lt.LoRA(rank=2), lt.WTACRS(min_rows=2))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    back = PeftModel.from_pretrained(tiny.build(), str(tmp_path)).eval()
    torch.testing.assert_close(back(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_only_the_first_factor_is_sampled() -> None:
    model = TINY.build()
    lt.apply(model, lt.LoRA(rank=2), lt.WTACRS(min_rows=2))
    sampled = [n for n, m in model.named_modules() if isinstance(m, ConvertedLinear)]
    assert len(sampled) == 12 and all(n.endswith("lora_A.default") for n in sampled)


def test_adapter_that_is_there_already_is_worked_on() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TINY.build(), LoraConfig(r=2, target_modules=["query", "value"]))
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    sampled = [n for n, m in model.named_modules() if isinstance(m, ConvertedLinear)]
    assert len(sampled) == 4 and all("lora_A" in n for n in sampled)
    model(**TINY.batch()).loss.backward()
    assert int(session.state_dict()["counter"]) == 1
    session.remove()
    with pytest.raises(UnsupportedError, match="model must carry no PEFT adapter yet"):
        lt.apply(model, lt.LoRA())


def test_model_outside_transformers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Net()
    keys = sorted(vars(model))
    session = lt.apply(model, lt.LoRA(rank=2, sites=["a"]), lt.WTACRS(min_rows=1))
    optimizer = session.optimizer(torch.optim.SGD, lr=1.0)
    x = torch.randn(8, 4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained_output = model(x)
    session.merge()
    assert type(model.a) is nn.Linear and sorted(vars(model)) == keys
    torch.testing.assert_close(model(x), trained_output)


def test_frozen_parameters_come_back_frozen() -> None:
    model = TINY.build()
    model.bert.embeddings.requires_grad_(False)
    before = trained(model)
    lt.apply(model, lt.LoRA(rank=2)).remove()
    assert trained(model) == before
    lt.apply(model, lt.LoRA(rank=2)).merge()
    assert trained(model) == before


def test_newer_mixtures_are_adapted_where_it_was_asked_for() -> None:
    """By itself peft adapts the experts in place of the dense FFN and the shared experts."""
    model, batch = zoo.build("deepseek_v3")
    wanted = {s.name for s in lt.find_sites(model) if s.role == "linear" and s.block}
    assert {n.split(".")[4] for n in wanted if n.startswith("model.layers.1.mlp")} == {
        "shared_experts"
    }
    lt.apply(model, lt.LoRA(rank=2))
    assert {n for n, m in model.named_modules() if hasattr(m, "lora_A")} == wanted
    assert {n.split(".lora_")[0] for n in trained(model)} == wanted
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_peft_refuses_is_an_error_of_ours_and_leaves_nothing_behind() -> None:
    model, _ = zoo.build("mamba")
    keys, modules = sorted(vars(model)), list(model.modules())
    with pytest.raises(
        UnsupportedError, match="LoRA: sites must be modules that peft can adapt, go"
    ):
        lt.apply(model, lt.LoRA())
    assert sorted(vars(model)) == keys
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    lt.apply(model, lt.LoRA(sites="in_proj"))


def test_a_linear_that_peft_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    replace = LoraModel._create_and_replace

    def lazy(self, *args, current_key: str, **kwargs) -> None:
        if not current_key.endswith("key"):
            replace(self, *args, current_key=current_key, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", lazy)
    model = TINY.build()
    with pytest.raises(UnsupportedError, match=r"leaving out bert.*0\.attention\.self\.key, bert"):
        lt.apply(model, lt.LoRA(rank=2))
    assert not any(hasattr(m, "lora_A") for m in model.modules())
