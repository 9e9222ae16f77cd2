"""A session goes onto the base that it came from, and onto no other."""

from pathlib import Path

import pytest
import torch
from models import MODELS
from torch import nn

import leantune as lt
from leantune.core.disk import load_tensors
from leantune.core.files import BASE_FILE
from leantune.core.fingerprint import check_fingerprint, fingerprint
from leantune.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize("method", [lt.LoRA(rank=2), lt.SparseGrad()])
def test_frozen_weights_of_another_base_are_refused(tmp_path: Path, method) -> None:
    tiny = MODELS["bert"]
    session = lt.apply(tiny.build(seed=1), method)
    session.calibrate([tiny.batch()])
    session.save(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"got other weights in \d+ of \d+ parameters, bert\."):
        lt.load(tiny.build(seed=2), tmp_path / "s")
    lt.load(tiny.build(seed=1), tmp_path / "s")


def test_weights_that_train_are_no_part_of_it(tmp_path: Path) -> None:
    """A head is new in each model that is loaded; with all weights saved no base is needed."""
    tiny = MODELS["bert"]
    lt.apply(tiny.build(), lt.LoRA(rank=2)).save(tmp_path / "lora")
    names = load_tensors(tmp_path / "lora" / BASE_FILE)
    assert "bert.encoder.layer.0.attention.self.query.weight" in names
    assert not any("classifier" in name for name in names)
    base = tiny.build()
    nn.init.normal_(base.classifier.weight)
    lt.load(base, tmp_path / "lora")
    lt.apply(tiny.build(seed=1), lt.WTACRS(min_rows=2)).save(tmp_path / "all")
    assert load_tensors(tmp_path / "all" / BASE_FILE) == {}
    lt.load(tiny.build(seed=2), tmp_path / "all")


def test_what_was_frozen_after_training_is_not_lost(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    embeddings = model.get_input_embeddings().weight
    nn.init.normal_(embeddings)
    embeddings.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"got 1 that have changed .*word_embeddings\.wei"):
        session.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    embeddings.requires_grad_(True)
    session.save(tmp_path / "s")


def test_training_does_not_change_the_base(tmp_path: Path) -> None:
    """What SparseGrad trains is added to the base's own weights."""
    tiny = MODELS["bert"]
    model = tiny.build()
    session = lt.apply(model, lt.SparseGrad())
    session.calibrate([tiny.batch()])
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    session.on_step()
    session.save(tmp_path / "s")
    other = tiny.build()
    lt.load(other, tmp_path / "s")
    logits = [m.eval()(**tiny.batch()).logits for m in (model, other, tiny.build())]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float16, torch.float32])
def test_another_dtype_of_the_same_weights_is_the_same_base(dtype, loaded) -> None:
    model = nn.Linear(40, 30).bfloat16()
    saved = fingerprint(model.to(dtype))
    check_fingerprint(model.to(loaded), saved)
    with torch.no_grad():
        model.bias[-1] += 0.1
    with pytest.raises(ConfigError, match="in 1 of 2 parameters, bias among them"):
        check_fingerprint(model, saved)


def test_it_is_small_and_reads_little() -> None:
    weight = nn.Parameter(torch.arange(10_000.0))
    found = fingerprint(nn.ParameterDict({"a": weight, "b": nn.Parameter(torch.zeros(3))}))
    assert found["a"].numel() == 16 and found["a"][-1] == 9999 and found["b"].shape == (3,)
    assert found["a"].untyped_storage().nbytes() == 64
