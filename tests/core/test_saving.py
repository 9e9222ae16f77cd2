"""What ``save_pretrained`` writes where a model computes with other weights than its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt

BLOCK = lt.SparseGrad(density=0.1)
STEP = lt.SparseGrad(density=0.1, selection="step")
LORA = lt.LoRA(rank=2, sites=["attention.output"])
MODEL = "model.safetensors"
# torch's own warning about its own sparse tensors; transformers' about what peft asks for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def _names(methods: list) -> str:
    return "+".join(m.method for m in methods)


def trained(name: str, *methods: Any) -> tuple[nn.Module, lt.Session]:
    model = MODELS[name].build()
    session = lt.apply(model, *methods)
    session.calibrate([MODELS[name].batch(90)])
    optimizer = session.optimizer(torch.optim.AdamW, lr=0.05)
    for seed in range(3):
        optimizer.zero_grad()
        model(**MODELS[name].batch(seed)).loss.backward()
        optimizer.step()
        session.on_step()
    return model, session


def check_saved(name: str, model: nn.Module, folder: Path) -> None:
    """The folder gives a plain model that computes what ``model`` does, and lacks no name."""
    back, how = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(how.values()), how
    wanted = MODELS[name].logits(model)
    torch.testing.assert_close(MODELS[name].logits(back), wanted)
    start = MODELS[name].build()
    assert not torch.allclose(MODELS[name].logits(start), wanted)
    # The control: the weights that training started from, with all else that has trained.
    plain = {n: p for n, p in model.state_dict().items() if n in dict(start.named_parameters())}
    start.load_state_dict(plain, strict=False)
    assert not torch.allclose(MODELS[name].logits(start), wanted)


def as_it_runs(model: nn.Module) -> dict[str, Tensor]:
    state = {n: v.clone() for n, v in model.state_dict().items()}
    return state | {n: torch.tensor(id(p)) for n, p in model.named_parameters()}


@pytest.mark.parametrize("methods", [[BLOCK], [BLOCK, LORA], [LORA, BLOCK]], ids=_names)
@pytest.mark.parametrize("name", ["bert", "gpt2"])  # gpt2: transposed weights, a tied head
def test_the_plain_model_is_written_and_the_running_one_stays(
    name: str, methods: list, tmp_path: Path
) -> None:
    model, session = trained(name, *methods)
    before, flags = as_it_runs(model), sorted(vars(model))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    check_saved(name, model, tmp_path)
    after = as_it_runs(model)
    assert all(torch.equal(after[n], value) for n, value in before.items())
    assert sorted(vars(model)) == flags
    session.merge()
    model.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / MODEL).read_bytes() == (tmp_path / MODEL).read_bytes()


def test_the_papers_form_is_written_without_its_rotated_weights(tmp_path: Path) -> None:
    model, _ = trained("bert", STEP)
    model.save_pretrained(tmp_path)
    back, how = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(how.values()), how
    tiny = MODELS["bert"]
    torch.testing.assert_close(tiny.logits(back), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_several_files_and_a_state_that_was_gathered_before(tmp_path: Path) -> None:
    """A sharded run's state comes from the trainer; it may be in another precision."""
    model, _ = trained("bert", BLOCK)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    check_saved("bert", model, tmp_path)
    given = {n: v.bfloat16() for n, v in model.state_dict().items()}
    names = set(given)
    model.save_pretrained(tmp_path / "half", state_dict=given)
    assert set(given) == names, "the caller's own"
    back = type(model).from_pretrained(tmp_path / "half").float()
    tiny = MODELS["bert"]
    torch.testing.assert_close(tiny.logits(back), tiny.logits(model), rtol=0.1, atol=0.05)


class OfAnother(type(MODELS["bert"].build())):
    """A model whose class can save no state but its own, as peft's and diffusers'."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        raise AssertionError("must not be called")


def test_a_class_that_saves_no_given_state_is_refused(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    model.__class__ = OfAnother
    lt.apply(model, BLOCK)
    with pytest.raises(lt.UnsupportedError, match=r"files would lack.*session\.merge\(\) first"):
        model.save_pretrained(tmp_path)


def test_a_method_of_the_models_own_is_called_and_given_back(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    seen: list[set[str]] = []

    def save(folder: Path, state_dict: dict[str, Tensor]) -> None:
        seen.append(set(state_dict))

    model.save_pretrained = save  # type: ignore[assignment]
    session = lt.apply(model, BLOCK)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert seen == [set(MODELS["bert"].build().state_dict())]
    session.remove()
    assert model.save_pretrained is save
