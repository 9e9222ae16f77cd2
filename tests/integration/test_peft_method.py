"""SparseGrad as a PEFT method keeps PEFT's contract: files, merging, adapters, trainers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import leantune as lt
from leantune.integrations.peft import SparseGradConfig, SparseGradLinear, calibrate

MLP = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gpt2": ["mlp.c_fc", "mlp.c_proj"],
    "bert": ["intermediate.dense", "output.dense"],
}
pytestmark = [
    # peft asks transformers for a name that transformers is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def config(name: str = "llama", **options: Any) -> SparseGradConfig:
    return SparseGradConfig(**{"density": 0.1, "target_modules": MLP[name], **options})


def adapted(name: str = "llama", **options: Any) -> Any:
    model = get_peft_model(MODELS[name].build(), config(name, **options))
    calibrate(model, [MODELS[name].batch(i) for i in range(3)])
    return model


def trained(name: str = "llama") -> Any:
    model = adapted(name)
    MODELS[name].train(model, 3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.any()
                # So that all of it shows.
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**MODELS["llama"].batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_block_trains_and_nothing_else() -> None:
    model = adapted()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 6 and all(".sparse_grad_delta.default." in name for name in names)
    assert sum(model.get_parameter(n).numel() for n in names) == 6 * 50  # of 512: 10 % at most
    assert model.get_model_status().peft_types == {"default": "SPARSE_GRAD"}
    layers = [m for m in model.modules() if isinstance(m, SparseGradLinear)]
    ups = [m for m in layers if m.sparse_grad_q_in["default"].shape == (16, 10)]
    # Gate and up, each shared by both blocks.
    assert len({m.sparse_grad_q_in["default"].data_ptr() for m in ups}) == 2


@pytest.mark.parametrize("make", [adapted, trained])
def test_the_gradient_is_the_weights_own_in_these_bases(make: Callable[[], Any]) -> None:
    model = make()
    found = grads(model)
    full = grads(model.merge_and_unload().requires_grad_(True))
    model = make()
    for name, layer in model.named_modules():
        if isinstance(layer, SparseGradLinear):
            q_out, q_in = layer.sparse_grad_q_out["default"], layer.sparse_grad_q_in["default"]
            weight = full[f"{name.removeprefix('base_model.model.')}.weight"]
            wanted = q_out.t() @ weight @ q_in
            torch.testing.assert_close(found[f"{name}.sparse_grad_delta.default.weight"], wanted)
            # The leading block holds more of it than a block of its size does by chance.
            by_chance = wanted.numel() / weight.numel() * weight.square().sum()
            assert make is trained or wanted.square().sum() > 2 * by_chance


@pytest.mark.parametrize("name", MLP)
def test_files_and_merging_give_the_same_outputs(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model = trained(name)
    wanted = tiny.logits(model)
    assert not torch.allclose(tiny.logits(tiny.build()), wanted, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SPARSE_GRAD"
    assert isinstance(PeftConfig.from_pretrained(str(tmp_path)), SparseGradConfig)
    for is_light in (True, False):
        options = {"is_trainable": True, "low_cpu_mem_usage": is_light}
        back = PeftModel.from_pretrained(tiny.build(), str(tmp_path), **options)
        assert torch.equal(tiny.logits(back), wanted)
    tiny.train(back)  # It needs no second calibration.
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(tiny.logits(model), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(tiny.logits(model), wanted)
    plain = model.merge_and_unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in tiny.build().modules()]
    torch.testing.assert_close(tiny.logits(plain), wanted)


def test_two_adapters_are_trained_switched_disabled_and_deleted() -> None:
    tiny = MODELS["llama"]
    model = trained()
    first, base = tiny.logits(model), tiny.logits(tiny.build())
    model.add_adapter("second", config(density=0.2))
    model.set_adapter("second")
    calibrate(model, [tiny.batch(7)], "second")
    tiny.train(model, 2)
    second = tiny.logits(model)
    assert not torch.allclose(second, first) and not torch.allclose(second, base)
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model), first)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
    model.base_model.set_adapter(["default", "second"])
    both = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(model.merge_and_unload()), both)
    model = trained()
    model.add_adapter("second", config())
    calibrate(model, [tiny.batch()], "second")
    model.set_adapter("second")
    model(**tiny.batch())
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(tiny.logits(model), first)
    model.add_adapter("second", config())  # Of the same name, and without bases again.
    model.set_adapter("second")
    with pytest.raises(lt.ConfigError, match="bases must be calibrated before training"):
        model(**tiny.batch())


def test_it_loads_by_the_automatic_class_and_by_transformers(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    tiny.build().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny.build()).from_pretrained(tmp_path / "base").train(), config())
    calibrate(model, [tiny.batch()])
    tiny.train(model, 2)
    model.save_pretrained(tmp_path / "adapter")
    wanted = tiny.logits(model)
    auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(tiny.logits(auto), wanted)
    plain: Any = tiny.build()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(tiny.logits(plain), wanted)


def test_a_resumed_trainer_goes_on_to_the_bit(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    batch = MODELS["llama"].batch()
    rows = [{k: v[i % 4] for k, v in batch.items()} for i in range(8)]

    def run(folder: Path, resume: bool = False) -> dict[str, Tensor]:
        model = adapted()
        args = TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
        )
        trainer = Trainer(model, args, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in model.named_parameters() if "delta" in n}

    whole = run(tmp_path)
    again = run(tmp_path, resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)
    assert all(value.any() for value in whole.values())


def test_methods_act_on_it() -> None:
    model = trained()
    wanted = grads(model)
    session = lt.apply(model, lt.WTACRS(keep_ratio=1.0), lt.Checkpoint())
    found = grads(model)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in found)
    session.remove()
    lt.apply(model, lt.WTACRS(keep_ratio=0.25, min_rows=2))
    layer = "base_model.model.model.layers.0.mlp.up_proj.sparse_grad_delta.default"
    saved = lt.ledger(model, MODELS["llama"].batch()).saved_bytes(layer)
    assert saved == 8 * (10 * 4 + 4 + 4)  # 8 of 32 rows of 10 features, their numbers and weights


@pytest.mark.parametrize("density", [0, -0.1, 1.5])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(lt.ConfigError, match=rf"density must be in \(0, 1\], got {density}"):
        config(density=density)


def test_what_cannot_train_says_why() -> None:
    tiny = MODELS["llama"]
    with pytest.raises(lt.UnsupportedError, match=r"plain weight, got model.embed_tokens, a Embed"):
        get_peft_model(tiny.build(), config(target_modules=["embed_tokens"]))
    model = get_peft_model(tiny.build(), config())
    tiny.logits(model)
    with pytest.raises(lt.ConfigError, match="bases must be calibrated before training"):
        model(**tiny.batch())
    with pytest.raises(lt.ConfigError, match="adapter_name must be SparseGrad's, got 'other'"):
        calibrate(model, [tiny.batch()], "other")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(lt.ConfigError, match="must be finite and not zero, got none"):
        calibrate(model, [])
    ignored = {**tiny.batch(), "labels": torch.full((4, 8), -100)}
    with pytest.raises(lt.ConfigError, match="must be finite and not zero, got"):
        calibrate(model, [ignored])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    calibrate(model, [tiny.batch()])
    bases = {n: p.clone() for n, p in model.named_parameters() if "_q_" in n}
    calibrate(model, [tiny.batch(1)])
    assert all(torch.equal(p, bases[n]) for n, p in model.named_parameters() if n in bases)
