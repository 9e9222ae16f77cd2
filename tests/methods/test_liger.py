"""Liger's kernels in one model, against the plain model.

They need a GPU. Elsewhere ``test_liger_in_interpreter.py`` runs this file in Triton's interpreter,
on the CPU, in a process of its own.
"""

import copy
import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS, TinyModel
from torch import Tensor, nn

import leantune as lt
from leantune.core.config import MethodConfig
from leantune.core.discovery import find_sites
from leantune.planner.forecast import Blueprint
from leantune.planner.meter import Speed

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    # What the interpreter lacks: the device's own functions, and numbers as tensors.
    libdevice.rsqrt = lambda x: 1 / tl.sqrt(x)
    libdevice.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    as_tensor = interpreter._implicit_cvt

    def number_as_tensor(value: Any) -> Any:
        if not isinstance(value, float):
            return as_tensor(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = number_as_tensor

# After that: Liger takes the names over.
liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel")
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    *([] if IS_INTERPRETED else [pytest.mark.gpu]),
]
# The interpreter takes milliseconds for each row: one block, few tokens.
OPTIONS = {**MODELS["llama"].options, "num_hidden_layers": 1}


def tiny(name: str, config: str = "", **options: Any) -> TinyModel:
    kind, config = f"{name}ForCausalLM", config or f"{name}Config"
    return TinyModel(kind, config, {**OPTIONS, **options}, "generate", ("model.layers.*",))


TINY = {
    "llama": tiny("Llama"),
    "qwen3": tiny("Qwen3"),
    "gemma2": tiny("Gemma2"),
    "phi3": tiny("Phi3"),
}
LOSS = "output head must be a plain linear where the loss takes its weight, got "


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if IS_INTERPRETED:
        monkeypatch.setattr("leantune.core.apply.on_gpu", lambda device: True)


def build(name: str = "llama") -> Any:
    return TINY[name].build().to(DEVICE)


def batch_of(seed: int = 0) -> dict[str, Tensor]:
    return {name: value[1:3, :6].to(DEVICE) for name, value in TINY["llama"].batch(seed).items()}


def step(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return the loss and the gradients of one step, by name."""
    model.zero_grad()
    loss = model(**batch_of(seed)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def check_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error < 1e-5, (name, error)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return every attribute of every module, by identity; hooks alone may come and go."""
    settings = {f"{n}:{k}": v for n, m in model.named_modules() for k, v in vars(m).items()}
    return {key: id(value) for key, value in settings.items() if not key.endswith("_hooks")}


def outside() -> dict[str, int]:
    """Return everything in transformers' models and in torch.nn, by identity."""
    for model in TINY.values():
        getattr(transformers, model.kind)  # imports its module
    names = [n for n in sys.modules if n.startswith(("transformers.models.", "torch.nn"))]
    found: dict[str, int] = {}
    for name in names:
        for key, value in list(vars(sys.modules[name]).items()):
            found[f"{name}.{key}"] = id(value)
            if inspect.isclass(value):
                found[f"{name}.{key}()"] = id(vars(value).get("forward"))
    return found


@pytest.fixture(autouse=True)
def nothing_outside_changes() -> Iterator[None]:
    before = outside()
    yield
    after = outside()
    assert [name for name, value in before.items() if after.get(name, value) != value] == []


@pytest.mark.parametrize("name", TINY)
def test_loss_and_gradients_are_the_plain_models(name: str) -> None:
    plain, model = build(name), build(name)
    before, keys = state_of(model), list(model.state_dict())
    session = lt.apply(model, lt.Liger())
    sites = [s.name for s in find_sites(plain) if s.role in ("norm", "mlp")]
    assert {s.name for s in session.conversions[0].sites} == {*sites, "lm_head"}
    assert list(model.state_dict()) == keys
    assert "Liger" in repr(model.model.norm) and "Liger" in repr(model.model.layers[0].mlp)
    for seed in range(2):
        check_close(step(model, seed), step(plain, seed))
    assert model(**batch_of()).logits is None
    session.remove()
    model.zero_grad()
    assert state_of(model) == before
    assert torch.equal(step(model)["loss"], step(plain)["loss"])


def test_the_comparison_finds_an_error_of_a_thousandth() -> None:
    """The control."""
    wanted = step(build())
    with pytest.raises(AssertionError):
        check_close({name: value * 1.001 for name, value in wanted.items()}, wanted)


def test_merge_and_evaluation_are_the_plain_models() -> None:
    plain, model = build().eval(), build().eval()
    session = lt.apply(model, lt.Liger())
    with torch.no_grad():
        wanted = plain(**batch_of()).logits
        torch.testing.assert_close(model(**batch_of()).logits, wanted)
        session.merge()
        assert torch.equal(model(**batch_of()).logits, wanted)


@pytest.mark.parametrize(("sites", "fused"), [(["norm", "mlp"], False), (["lm_head"], True)])
def test_sites_choose_what_is_patched(sites: list[str], fused: bool) -> None:
    model = build()
    lt.apply(model, lt.Liger(sites=sites))
    assert ("Liger" in repr(model.model.norm)) == (not fused)
    assert (model(**batch_of()).logits is None) == fused
    check_close(step(model), step(build()))


RECIPES: dict[str, list[Any]] = {
    "wta_crs": [lt.WTACRS(keep_ratio=0.5, min_rows=2)],
    "lora": [lt.LoRA(rank=4), lt.WTACRS(keep_ratio=0.5, min_rows=2)],
    "checkpoint": [lt.LoRA(rank=4), lt.Checkpoint(), lt.WTACRS(keep_ratio=0.5, min_rows=2)],
    "spt_attention": [lt.SPTAttention(min_keys=2)],
    "meprop": [lt.MeProp(keep_ratio=0.5)],
}


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
@pytest.mark.parametrize("name", RECIPES)
def test_other_methods_do_inside_what_they_do_alone(name: str) -> None:
    results = []
    for more in ([], [lt.Liger()]):
        model = build()
        session = lt.apply(model, *more, *RECIPES[name], seed=3)
        session.calibrate([batch_of(90), batch_of(91)])
        results.append([step(model, seed) for seed in range(2)])
        session.remove()
        assert "Liger" not in repr(model)
    for wanted, got in zip(*results, strict=True):
        check_close(got, wanted)


def test_sparse_grad_trains_inside() -> None:
    """Bases found anew may turn over, so what is compared is where training leads."""
    losses = []
    for more in ([], [lt.Liger()]):
        model = build()
        session = lt.apply(model, *more, lt.SparseGrad())
        session.calibrate([batch_of(90), batch_of(91)])
        optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
        for seed in range(3):
            loss = step(model, seed)["loss"]
            optimizer.step()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0] != step(build(), 2)["loss"]


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_has_kernels_of_its_own(way: Callable[[nn.Module], Any]) -> None:
    model = build()
    session = lt.apply(model, lt.Liger())
    twin = way(model)
    norm = twin.model.norm
    assert norm.forward.module is norm and twin.forward.module is twin
    check_close(step(twin), step(model))
    twin._leantune_session.remove()
    assert [type(m) for m in twin.modules()] == [type(m) for m in build().modules()]
    assert "forward" not in vars(twin) and "Liger" not in repr(twin)
    assert session.conversions and "Liger" in repr(model)


def test_a_saved_session_comes_back(tmp_path: Path) -> None:
    model = build()
    session = lt.apply(model, lt.Liger(), lt.LoRA(rank=4))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    step(model)
    optimizer.step()
    session.save(tmp_path / "saved")
    other = build()
    assert lt.load(other, tmp_path / "saved").methods == session.methods
    check_close(step(other, 1), step(model, 1))


def test_what_wraps_the_forward_meanwhile_runs_the_plain_one_after_the_end() -> None:
    """As accelerate wraps a model's forward for mixed precision."""
    model = build()
    session = lt.apply(model, lt.Liger())
    names = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels", "kwargs"} <= names.keys(), "a trainer drops other columns"
    inner = model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    assert model(**batch_of()).logits is None
    session.remove()
    assert inspect.isfunction(model.forward)
    assert model(**batch_of()).logits is not None
    check_close(step(model), step(build()))


def patch_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a model as after Liger's patch of all Llamas, taken back when the test ends."""
    from transformers.models.llama import modeling_llama

    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    kind = modeling_llama.LlamaForCausalLM
    monkeypatch.setattr(kind, "forward", kind.forward)
    liger.apply_liger_kernel_to_llama(rope=False)
    return build()


def patch_instance(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a model and patch it as ``use_liger_kernel=True`` does."""
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.models.llama import modeling_llama

    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = build()
    apply_liger_kernel(model, {"rope": False})
    return model


@pytest.fixture(params=[patch_class, patch_instance])
def ligers_own(request: pytest.FixtureRequest) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield request.param(monkeypatch)


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
def test_methods_act_on_a_model_that_transformers_patched(ligers_own: Any) -> None:
    parts = {site.part for site in find_sites(ligers_own) if site.role == "linear"}
    assert {"mlp.gate", "mlp.up", "mlp.down"} < parts
    plain = build()
    sessions = [lt.apply(m, *RECIPES["checkpoint"], seed=3) for m in (ligers_own, plain)]
    check_close(step(ligers_own), step(plain))
    for session in sessions:
        session.remove()
    session = lt.apply(ligers_own, lt.SparseGrad())
    session.calibrate([batch_of(90), batch_of(91)])
    assert len(session.conversions[0].sites) == 3
    step(ligers_own)


def test_a_model_that_transformers_patched_is_refused(ligers_own: Any) -> None:
    before = state_of(ligers_own)
    with pytest.raises(lt.SiteError, match=r"4 of 5 sites .*must not be Liger's already"):
        lt.apply(ligers_own, lt.Liger())
    assert state_of(ligers_own) == before


def with_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(model.config.vocab_size, device=DEVICE))


def with_a_forward_of_its_own(model: Any) -> None:
    model.forward = functools.partial(type(model).forward, model)


@pytest.mark.parametrize(
    ("others", "prepare", "reason"),
    [
        ([lt.LoRA(sites="lm_head")], None, LOSS + r"peft\.tuners\.lora\.layer\.Linear"),
        ([lt.MeProp(sites="lm_head")], None, "must have no hooks where the loss takes its weight"),
        ([], with_bias, LOSS + "one with a bias"),
        ([], with_a_forward_of_its_own, "forward of the model must be that of its class"),
    ],
)
def test_a_loss_that_would_pass_by_something_is_refused(others, prepare, reason: str) -> None:
    model = build()
    if prepare is not None:
        prepare(model)
    before = state_of(model)
    with pytest.raises(lt.SiteError, match=rf"^Liger: .*{reason}.* give sites=\['norm', 'mlp'\]"):
        lt.apply(model, lt.Liger(), *others)
    assert state_of(model) == before
    session = lt.apply(model, lt.Liger(sites=["norm", "mlp"]), *others)
    assert model(**batch_of()).logits is not None
    session.remove()
    assert state_of(model) == before


def test_a_head_that_is_sampled_is_found_in_the_first_step() -> None:
    """Its method acts after Liger, and the loss would take the weight past it."""
    model = build()
    session = lt.apply(model, lt.Liger(), lt.WTACRS(sites="lm_head"))
    with pytest.raises(lt.UnsupportedError, match=rf"^Liger: {LOSS}\S*ConvertedLinear"):
        step(model)
    session.remove()
    check_close(step(model), step(build()))


def other_activation() -> Any:
    return tiny("Llama", hidden_act="gelu").build().to(DEVICE)


def of_another_build() -> Any:
    model = build()
    del model.model.layers[0].post_attention_layernorm
    model.model.layers[0].second_norm = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "config", "error", "reason"),
    [
        (lambda: MODELS["bert"].build().to(DEVICE), {}, lt.UnsupportedError, "got bert;.*llama"),
        (lambda: nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)]).to(DEVICE), {},
         lt.UnsupportedError, "type that Liger knows, got ModuleList"),
        (other_activation, {}, lt.SiteError, r"1 of 5 .*mlp: output must stay the same"),
        (of_another_build, {}, lt.UnsupportedError, "built as Liger knows its type, got Attr"),
        (build, {"sites": "q_proj"}, lt.SiteError, "linear must be the output head"),
        (lambda: tiny("Olmo2").build().to(DEVICE), {"sites": "norm"}, lt.SiteError,
         "a kernel for, got 2 others .*q_norm"),
    ],
)  # fmt: skip
def test_what_liger_cannot_do_is_refused_by_name(make, config, error, reason: str) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(error, match=f"^Liger: .*{reason}"):
        lt.apply(model, lt.Liger(**config))
    assert state_of(model) == before


def test_a_routed_ffn_and_liger_share_a_model_by_sites() -> None:
    model = build()
    with pytest.raises(lt.SiteError, match="at most one method per axis"):
        lt.apply(model, lt.Liger(), lt.RoutedFFN())
    lt.apply(model, lt.Liger(sites=["norm", "lm_head"]), lt.RoutedFFN())
    assert all(value.isfinite().all() for value in step(model).values())


def test_a_classifier_has_its_own_loss() -> None:
    classes = TinyModel("LlamaForSequenceClassification", "LlamaConfig", OPTIONS, "classify", ())
    plain, model = (classes.build().to(DEVICE) for _ in range(2))
    session = lt.apply(model, lt.Liger())
    assert len(session.conversions[0].sites) == 4 and "forward" not in vars(model)
    batch = {name: value.to(DEVICE) for name, value in classes.batch().items()}
    torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)


class Doubled(transformers.LlamaForCausalLM):
    """A user's model with a loss of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = 2 * output.loss if output.loss is not None else None
        return output


def test_a_subclass_has_its_own_loss() -> None:
    model = build()
    wanted = 2 * step(model)["loss"]
    model.__class__ = Doubled
    session = lt.apply(model, lt.Liger())
    assert len(session.conversions[0].sites) == 4
    torch.testing.assert_close(step(model)["loss"], wanted)


def test_peft_around_the_model_is_seen_through() -> None:
    from peft import LoraConfig, get_peft_model

    models = [get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear")) for _ in "12"]
    models[1].load_state_dict(models[0].state_dict())
    session = lt.apply(models[1], lt.Liger(), lt.WTACRS(keep_ratio=0.5, min_rows=2), seed=3)
    lt.apply(models[0], lt.WTACRS(keep_ratio=0.5, min_rows=2), seed=3)
    check_close(step(models[1]), step(models[0]))
    session.remove()
    assert "Liger" not in repr(models[1])


SAMPLED = lt.WTACRS(keep_ratio=0.25, min_rows=2)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", (lt.Checkpoint(parts="mlp"), SAMPLED)),
        ("qwen3", (SAMPLED,)),
        ("gemma2", ()),
        ("phi3", ()),
    ],
)
def test_a_forecast_knows_the_bytes(name: str, recipe: tuple[MethodConfig, ...]) -> None:
    """Kernels do not run without numbers; what they would write is there all the same."""
    recipe = (lt.Liger(), *recipe)
    blueprint = Blueprint(build(name), torch.device(DEVICE), Speed(1e13, 1e12, 1e-5, overlaps=True))
    forecast, plain = blueprint.forecast(batch_of(), recipe), blueprint.forecast(batch_of())
    model = build(name)
    lt.apply(model, *recipe)
    measured = lt.ledger(model, batch_of())
    saved, known = forecast.activations, measured.activations
    # Phi-3's FFN is found by running the model, so that its kernel is not forecast.
    assert saved > known if name == "phi3" else saved == known
    for ledger in ("weights", "gradients", "optimizer"):
        assert getattr(forecast, ledger) == getattr(measured, ledger), ledger
    assert saved < plain.activations
    # The control: kernels launch again.
    assert step(model)["loss"] > 0


def test_a_plan_may_take_ligers_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantune.planner.plan.by_device", lambda where, cpu, gpu: gpu)
    options: dict[str, Any] = {"batch_size": 2, "max_length": 16, "budget": "1GiB"}
    plan = lt.plan(build(), **options)
    ways = {way.methods: way for way in (plan, *plan.alternatives)}
    assert ways[(lt.Liger(),)].gradient == "exact" and len(ways) == 12
    for methods, way in ways.items():
        if methods[:1] != (lt.Liger(),):
            on_liger = ways[(lt.Liger(), *methods)]
            assert on_liger.num_bytes["activations"] <= way.num_bytes["activations"]
    unknown = lt.plan(MODELS["gpt2"].build().to(DEVICE), **options)
    assert list(unknown.left_out) == ["Liger()"]
    assert "that Liger knows" in unknown.left_out["Liger()"]
