"""What every registered method owes, generated from the registry; a new method is tested here
by being registered."""

import copy
import dataclasses
import io
import math
import typing
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.core import registry
from leantune.core.config import Axis, MethodConfig
from leantune.core.discovery import find_sites
from leantune.core.linear import ConvertedConv1D, ConvertedLinear
from leantune.core.sites import Site, is_nested
from leantune.errors import ConfigError, SiteError, UnsupportedError
from leantune.measure._record import HIDDEN
from leantune.measure.ledger import ledger

EVERY = registry.list_methods()
# What needs a GPU is refused here: its own tests say what it does there.
SPECS = {method: spec for method, spec in EVERY.items() if not spec.needs_gpu}
CASES = [(method, model) for method in SPECS for model in MODELS]
# One of each kind where every model would add time and no new path.
FEW = [(method, model) for method in SPECS for model in ("bert", "t5", "gpt2", "llama")]
ONE = [(method, "bert") for method in SPECS]
IDENTITY = [(m, model) for m, model in CASES if SPECS[m].identity_options is not None]

# These leave output and input gradient alone to the bit.
EXACT_AXES = ("rows", "bits", "recompute")

Results = list[Tensor]


def example(method: str, **options: Any) -> MethodConfig:
    return EVERY[method].config(**{**EVERY[method].test_options, **options})


def identity(method: str) -> MethodConfig:
    options = SPECS[method].identity_options
    assert options is not None
    return SPECS[method].config(**options)


def merges(method: str) -> bool:
    return lt.apply(MODELS["bert"].build(), example(method)).can_merge


def convert(model: nn.Module, name: str, *methods: MethodConfig, **options: Any) -> lt.Session:
    """Apply and, for methods that ask for it, calibrate on two batches of the model ``name``."""
    session = lt.apply(model, *methods, **options)
    session.calibrate([batch_of(name, seed) for seed in (90, 91)])
    return session


def counted(session: lt.Session) -> int:
    """How many training forwards the session has seen."""
    return int(session.state_dict()["counter"])


def batch_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    return MODELS[name].batch(seed)


def step(model: nn.Module, batch: dict[str, Tensor]) -> Results:
    """Run one forward and backward: (loss, logits, gradients of what trains)."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.loss.detach(), out.logits.detach(), *grads]


def same(a: Results, b: Results) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_output(method: str, got: Tensor, wanted: Tensor) -> None:
    """What is kept or recomputed leaves the output alone to the bit.

    A trained parameter of another layout may round another way, and what an ``evaluated`` method
    computes is its own business.
    """
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if SPECS[method].axis == "evaluated":
        assert torch.isfinite(got).all()
    elif SPECS[method].axis in EXACT_AXES:
        assert torch.equal(got, wanted)
    else:
        check_close(got, wanted)


def check_close(got: Tensor, wanted: Tensor) -> None:
    eps = torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(got, wanted, rtol=16 * eps, atol=16 * eps)


def is_random(method: str) -> bool:
    return SPECS[method].axis == "rows"


@pytest.mark.parametrize(("method", "name"), CASES)
def test_remove_restores_objects_ties_and_values(method: str, name: str) -> None:
    model = MODELS[name].build()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties = {n: id(p) for n, p in parameters.items()}
    values = {n: v.clone() for n, v in model.state_dict().items()}
    session = convert(model, name, example(method))
    held = {id(p) for p in model.parameters()}
    assert {id(p) for p in parameters.values()} <= held, "a parameter was copied"
    step(model, batch_of(name))
    session.remove()
    assert list(model.named_modules()) == list(modules.items())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert {n: id(p) for n, p in after.items()} == ties
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("method", "name"), IDENTITY)
def test_identity_options_are_the_plain_model(method: str, name: str) -> None:
    plain, model = MODELS[name].build(), MODELS[name].build()
    convert(model, name, identity(method))
    given = {n for n, _ in plain.named_parameters()}
    for seed in range(2):
        wanted = step(plain, batch_of(name, seed))
        got = step(model, batch_of(name, seed))
        if SPECS[method].axis in EXACT_AXES:
            assert same(got, wanted)
            continue
        # A module of another shape rounds another way, and may train something of its own.
        check_close(got[1], wanted[1])
        grads = {n: p.grad for n, p in model.named_parameters() if n in given}
        for n, p in plain.named_parameters():
            if grads.get(n) is not None:
                torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("method", "name"), [c for c in FEW if SPECS[c[0]].axis == "rows"])
def test_saved_bytes_equal_the_prediction(method: str, name: str, dtype) -> None:
    model = MODELS[name].build()
    convert(model, name, example(method))
    kinds = (ConvertedLinear, ConvertedConv1D)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    shapes: dict[str, torch.Size] = {}
    for n, m in layers.items():
        m.register_forward_pre_hook(lambda module, args, n=n: shapes.__setitem__(n, args[0].shape))
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        book = ledger(model, batch_of(name))
    sites = {s.name: s for s in find_sites(MODELS[name].build())}
    groups: dict[str, list[str]] = {}
    for n in layers:
        groups.setdefault(sites[n].shared_input or n, []).append(n)
    assert groups
    for members in groups.values():
        measured = sum(
            entry.num_bytes
            for entry in book.entries
            if entry.ledger == "activations" and any(h.module in members for h in entry.holders)
        )
        rows = layers[members[0]].rows
        assert rows is not None
        assert measured == rows.nbytes(shapes[members[0]], dtype or torch.float32), members


@pytest.mark.parametrize(("method", "name"), FEW)
def test_no_tensor_is_hidden_from_saved_tensor_hooks(method: str, name: str) -> None:
    model = MODELS[name].build()
    convert(model, name, example(method))
    step(model, batch_of(name))
    book = ledger(model, batch_of(name))
    assert not [entry for entry in book.entries if entry.kind == HIDDEN]


@pytest.mark.parametrize("mode", ["no_grad", "eval"])
@pytest.mark.parametrize(("method", "name"), FEW)
def test_no_grad_and_eval_compute_and_keep_what_the_plain_model_does(method, name, mode) -> None:
    def run(model: nn.Module) -> tuple[Tensor, list[int]]:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        model.train(mode != "eval")
        with (
            torch.set_grad_enabled(mode != "no_grad"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            return model(**batch_of(name)).logits.detach(), sizes

    model = MODELS[name].build()
    logits, sizes = run(model)
    session = convert(model, name, example(method))
    got, got_sizes = run(model)
    check_output(method, got, logits)
    assert counted(session) == 0
    if mode == "no_grad":
        assert not got_sizes
    elif SPECS[method].axis in EXACT_AXES:
        assert got_sizes == sizes


@pytest.mark.parametrize(
    ("method", "name", "dtype"),
    [(m, n, torch.bfloat16) for m, n in FEW] + [(m, n, torch.float16) for m, n in ONE],
)
def test_autocast(method: str, name: str, dtype: torch.dtype) -> None:
    plain, model = MODELS[name].build(), MODELS[name].build()
    convert(model, name, example(method))
    with torch.autocast("cpu", dtype=dtype):
        results = step(model, batch_of(name))
        wanted = step(plain, batch_of(name))
    check_output(method, results[1], wanted[1])
    assert all(torch.isfinite(r).all() for r in results)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("method", "name"), [c for c in FEW if c[0] != "checkpoint"])
def test_checkpointing_by_transformers(method: str, name: str, use_reentrant: bool) -> None:
    plain = MODELS[name].build()
    wanted = step(plain, batch_of(name))
    model = MODELS[name].build()
    convert(model, name, example(method))
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        # Reentrant checkpoints need an input with a gradient, which frozen embeddings lack.
        model.enable_input_require_grads()
    results = step(model, batch_of(name))
    if SPECS[method].axis != "evaluated":
        # T5 takes another path without its cache, which rounds another way.
        torch.testing.assert_close(results[1], wanted[1])
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(torch.isfinite(r).all() for r in results)


class Small(nn.Module):
    """Enough for a compiler: two linears and a block-free model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


# Warnings of torch's own compiler about itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in SPECS if "linear" in SPECS[m].roles])
def test_compiled_equals_eager(method: str) -> None:
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Small()
        # A pattern, since a method may want blocks by default.
        session = lt.apply(model, example(method, sites=["up", "down"]))
        session.calibrate([torch.randn(4, 8, 8)])
        models.append(model)
    compiled = torch.compile(models[1], backend="aot_eager")
    x = torch.randn(4, 8, 8)
    for _ in range(3):
        grads = []
        for run, model in ((models[0], models[0]), (compiled, models[1])):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()


@pytest.mark.parametrize(("method", "name"), FEW)
def test_same_seed_same_gradients_and_next_step_another_draw(method: str, name: str) -> None:
    runs = []
    for _ in range(2):
        model = MODELS[name].build()
        convert(model, name, example(method), seed=4)
        runs.append([step(model, batch_of(name)) for _ in range(2)])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert same(runs[0][0], runs[0][1]) == (not is_random(method))


@pytest.mark.parametrize(("method", "name"), FEW)
def test_load_gives_the_same_output_and_next_gradients(method: str, name: str, tmp_path) -> None:
    model = MODELS[name].build()
    session = convert(model, name, example(method), seed=4)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    for seed in range(2):
        step(model, batch_of(name, seed))
        optimizer.step()
    session.save(tmp_path / "saved")
    other = MODELS[name].build()
    lt.load(other, tmp_path / "saved")
    got, wanted = step(other, batch_of(name, 5)), step(model, batch_of(name, 5))
    if SPECS[method].axis == "trained" and session.conversions[0].num_calibration_batches:
        # Dense weights that were brought up to date step by step have rounded at each step.
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    else:
        assert same(got, wanted)


@pytest.mark.parametrize(("method", "name"), ONE)
def test_state_of_another_shape_or_dtype_is_refused(method: str, name: str) -> None:
    model = MODELS[name].build()
    session = convert(model, name, example(method))
    step(model, batch_of(name))
    state = session.state_dict()
    for key, value in state.items():
        other = torch.int8 if value.is_floating_point() else torch.float32
        for damaged in (value.unsqueeze(0), value.to(other)):
            with pytest.raises(ConfigError, match="got "):
                session.load_state_dict({**state, key: damaged})


@pytest.mark.parametrize(("method", "name"), [c for c in FEW if merges(c[0])])
def test_merged_model_is_plain_and_equals_the_unmerged(method: str, name: str) -> None:
    model = MODELS[name].build()
    modules = dict(model.named_modules())
    session = convert(model, name, example(method))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    for seed in range(2):
        step(model, batch_of(name, seed))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(**batch_of(name, 5)).logits
        session.merge()
        after = model(**batch_of(name, 5)).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert list(model.named_modules()) == list(modules.items())
    assert not any(m.training for m in model.modules())
    plain = MODELS[name].build().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(**batch_of(name, 5)).logits, after)
        assert not torch.allclose(MODELS[name].build().eval()(**batch_of(name, 5)).logits, after)


@pytest.mark.parametrize("method", [m for m in SPECS if not merges(m)])
def test_merge_without_a_dense_equivalent_is_refused_and_changes_nothing(method: str) -> None:
    model = MODELS["bert"].build()
    session = convert(model, "bert", example(method))
    wanted = step(model, batch_of("bert"))
    with pytest.raises(UnsupportedError, match="must have a dense equivalent, got"):
        session.merge()
    assert len(step(model, batch_of("bert"))) == len(wanted) and counted(session) == 2


def test_merged_checkpoint_loads_without_this_library(tmp_path: Path) -> None:
    model = MODELS["bert"].build()
    session = convert(model, "bert", *compatible(model))
    optimizer = session.optimizer(torch.optim.SGD, lr=0.5)
    step(model, batch_of("bert"))
    optimizer.step()
    session.merge()
    model.eval().save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(back(**batch_of("bert")).logits, model(**batch_of("bert")).logits)


PAIRS = list(combinations(SPECS, 2))


def chosen(method: str, model: nn.Module) -> list[Site]:
    spec, config = SPECS[method], example(method)
    return [s for s in find_sites(model) if s.role in spec.roles and spec.default_sites(s, config)]


def clash(one: str, other: str, model: nn.Module) -> bool:
    """Whether two methods act along one axis on one site or on nested ones."""
    if SPECS[one].axis != SPECS[other].axis:
        return False
    names = [
        {n for s in chosen(method, model) for n in (s.name, *s.also_replaced)}
        for method in (one, other)
    ]
    return any(is_nested(a, b) for a in names[0] for b in names[1])


def compatible(model: nn.Module) -> list[MethodConfig]:
    """As many methods that merge as go together: of those that clash the first."""
    taken: list[str] = []
    for method in filter(merges, SPECS):
        if not any(clash(method, other, model) for other in taken):
            taken.append(method)
    return [example(method) for method in taken]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_runs_or_is_refused_before_anything_is_swapped(pair: tuple[str, str]) -> None:
    model = MODELS["bert"].build()
    modules = dict(model.named_modules())
    methods = [example(m) for m in pair]
    if clash(*pair, model):
        with pytest.raises(SiteError, match="at most one method per axis"):
            lt.apply(model, *methods)
    else:
        session = convert(model, "bert", *methods)
        results = step(model, batch_of("bert"))
        assert all(torch.isfinite(r).all() for r in results)
        session.remove()
    assert list(model.named_modules()) == list(modules.items())


@pytest.mark.parametrize("method", SPECS)
def test_two_configs_on_different_sites_are_two_conversions(method: str) -> None:
    """They calibrate, step, save and undo apart, and count once each."""
    model = MODELS["bert"].build()
    modules = dict(model.named_modules())
    halves = [
        example(method, sites=lambda s, i=i: s.block is not None and f".{i}" in s.block)
        for i in range(2)
    ]
    if method == "lora":
        halves = halves[:1]  # peft holds one adapter for each model
    session = lt.apply(model, *halves)
    assert len(session.conversions) == len(halves)
    calls: list[tuple[str, int]] = []
    for i, conversion in enumerate(session.conversions):
        for name in ("calibrate", "on_step"):
            original = getattr(conversion, name)
            setattr(
                conversion,
                name,
                lambda given, original=original, name=name, i=i: (
                    calls.append((name, i)),
                    original(given),
                ),
            )
    session.calibrate([batch_of("bert", 90), batch_of("bert", 91)])
    step(model, batch_of("bert"))
    session.on_step()
    wanted = [("on_step", i) for i in range(len(halves))]
    if session.conversions[0].num_calibration_batches:
        wanted += [("calibrate", i) for i in range(len(halves))]
    assert sorted(calls) == sorted(wanted)
    session.remove()
    assert list(model.named_modules()) == list(modules.items())


def test_all_methods_together_give_the_gradient_of_the_weights_alone() -> None:
    """Identity options on other axes change nothing for the one that trains."""
    for method in (m for m in SPECS if SPECS[m].axis == "trained"):
        alone, together = MODELS["bert"].build(), MODELS["bert"].build()
        convert(alone, "bert", example(method))
        axes = {m: SPECS[m].axis for m in SPECS if SPECS[m].identity_options is not None}
        others = [identity(m) for m, axis in axes.items() if axis != "trained"]
        convert(together, "bert", example(method), *others)
        wanted, got = (step(m, batch_of("bert")) for m in (alone, together))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", SPECS)
def test_method_twice_on_one_site_is_refused(method: str) -> None:
    model = MODELS["bert"].build()
    modules = dict(model.named_modules())
    with pytest.raises(SiteError, match="at most one method per axis"):
        lt.apply(model, example(method), example(method))
    assert list(model.named_modules()) == list(modules.items())


@pytest.mark.parametrize("method", EVERY.keys() - SPECS.keys())
def test_a_method_that_needs_a_gpu_is_refused_without_one(method: str) -> None:
    """Before anything is done, whatever is beside it in the recipe."""
    model = MODELS["llama"].build()
    before = [(name, dict(vars(module))) for name, module in model.named_modules()]
    who = SPECS["lora"].config, EVERY[method].config
    with pytest.raises(
        UnsupportedError,
        match=rf"^{who[1].__name__}: model must be on an NVIDIA GPU, got one on cpu; move it",
    ):
        lt.apply(model, who[0](), example(method))
    assert [(name, dict(vars(module))) for name, module in model.named_modules()] == before


def bad_values(config: type[MethodConfig]) -> list[tuple[str, Any]]:
    """Derive wrong values from each option's annotation and bounds."""
    hints = typing.get_type_hints(config)
    cases: list[tuple[str, Any]] = [("sites", []), ("sites", 3), ("sites", [""])]
    for field in dataclasses.fields(config):
        if field.name == "sites":
            continue
        values: list[Any] = [[], {}, object(), "no such choice"]
        hint, bounds = hints[field.name], field.metadata["bounds"]
        parts = typing.get_args(hint) or (hint,)
        if float in parts:
            values += [math.nan, math.inf, True]
        if int in parts:
            values += [1.5, True]
        if typing.get_origin(hint) is Literal:
            values += [0, None]
        if bool in parts:
            values += [0, None]
        if bounds["gt"] is not None:
            values += [bounds["gt"], bounds["gt"] - 1]
        if bounds["ge"] is not None:
            values.append(bounds["ge"] - 1)
        if bounds["lt"] is not None:
            values.append(bounds["lt"])
        if bounds["le"] is not None:
            values.append(bounds["le"] + 1)
        cases += [(field.name, value) for value in values]
    return cases


@pytest.mark.parametrize("method", EVERY)
def test_each_bad_option_names_itself(method: str) -> None:
    config = EVERY[method].config
    for name, value in bad_values(config):
        with pytest.raises(ConfigError) as error:
            config(**{name: value})
        assert str(error.value).startswith(f"{config.__name__}: {name} must be "), (name, value)
        assert "got " in str(error.value)
    with pytest.raises(ConfigError, match=f"{config.__name__}: option must be one of"):
        config.from_dict({"no_such_option": 1})


@pytest.mark.parametrize("method", EVERY)
def test_options_are_documented_and_round_trip(method: str) -> None:
    spec = EVERY[method]
    rows = spec.config.describe()
    assert [r["name"] for r in rows] == [f.name for f in dataclasses.fields(spec.config)]
    assert all(r["help"] and r["rule"] for r in rows)
    assert spec.summary and spec.source and spec.axis in typing.get_args(Axis)
    config = example(method)
    assert registry.config_from_dict(config.to_dict()) == config
    assert spec.config.__doc__ and getattr(lt, spec.config.__name__) is spec.config


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
@pytest.mark.parametrize(("method", "name"), ONE)
def test_copies_train_independently(method: str, name: str, way) -> None:
    model = MODELS[name].build()
    session = convert(model, name, example(method), seed=4)
    step(model, batch_of(name))
    twin = way(model)
    other = twin._leantune_session
    assert other is not session and other.model is twin and counted(other) == counted(session) == 1
    mine = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
    assert not mine & ({id(p) for p in twin.parameters()} | {id(m) for m in twin.modules()})
    values = [p.detach().clone() for p in model.parameters()]
    first = step(twin, batch_of(name, 1))
    assert (counted(other), counted(session)) == (2, 1)
    # The same state, hence the same gradients.
    assert same(step(model, batch_of(name, 1)), first)
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))
    other.remove()
    plain = MODELS[name].build()
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert all(p.requires_grad for p in twin.parameters())
    step(twin, batch_of(name))
    assert session.conversions and not other.conversions


@pytest.mark.parametrize("method", SPECS)
def test_sites_by_predicate(method: str) -> None:
    """A predicate sees every site that the method can act on, and is obeyed."""
    seen: list[Site] = []
    spec = SPECS[method]

    def first(site: Site) -> bool:
        seen.append(site)
        return site.block is not None and site.block.endswith(".0")

    model = MODELS["bert"].build()
    session = lt.apply(model, example(method, sites=first))
    assert {s.role for s in seen} == set(spec.roles)
    assert all(".layer.1" not in n for n in changed(model, session))


def changed(model: nn.Module, session: lt.Session) -> set[str]:
    before = dict(model.named_modules())
    flags = {n: getattr(m, "gradient_checkpointing", False) for n, m in before.items()}
    session.remove()
    after = dict(model.named_modules())
    return {n for n in {*before, *after} if before.get(n) is not after.get(n)} | {
        n for n, m in after.items() if getattr(m, "gradient_checkpointing", False) != flags.get(n)
    }
