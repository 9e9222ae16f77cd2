"""Apply is all or nothing; every refusal names what, where and the way out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import MODELS
from torch import nn

import leantune as lt
from leantune.core import registry
from leantune.core.config import Axis, MethodConfig
from leantune.core.conversion import Conversion, SwapConversion
from leantune.core.linear import ConvertedLinear
from leantune.core.registry import MethodSpec
from leantune.errors import ConfigError, SiteError, UnsupportedError


class Fingerprint:
    """Everything that a refused or undone conversion must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.attributes = {
            name: {k: v for k, v in vars(module).items() if not k.startswith("_")}
            for name, module in self.modules.items()
        }
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.flags = {name: p.requires_grad for name, p in self.parameters.items()}
        self.values = {name: v.clone() for name, v in model.state_dict().items()}
        self.hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in self.modules.items()
        }
        self.keys = sorted(vars(model))

    def check(self, model: nn.Module) -> None:
        other = Fingerprint(model)
        assert list(other.modules) == list(self.modules)
        assert all(other.modules[name] is module for name, module in self.modules.items())
        assert list(other.parameters) == list(self.parameters)
        assert all(other.parameters[name] is p for name, p in self.parameters.items())
        assert other.flags == self.flags and other.hooks == self.hooks and other.keys == self.keys
        assert other.attributes == self.attributes
        assert list(other.values) == list(self.values)
        assert all(torch.equal(other.values[name], v) for name, v in self.values.items())


def bert() -> nn.Module:
    return MODELS["bert"].build()


def test_no_methods() -> None:
    with pytest.raises(ConfigError, match="methods must name at least one method, got none"):
        lt.apply(bert())


@pytest.mark.parametrize("method", ["wta_crs", lt.WTACRS, None, {"method": "wta_crs"}])
def test_no_method_config(method) -> None:
    with pytest.raises(ConfigError, match="methods must be method configs, got "):
        lt.apply(bert(), method)


@pytest.mark.parametrize("seed", ["0", 1.0, None, True, 2**63])
def test_bad_seed(seed) -> None:
    model = bert()
    before = Fingerprint(model)
    with pytest.raises(ConfigError, match=r"seed must be integer >= .*, got "):
        lt.apply(model, lt.WTACRS(), seed=seed)
    before.check(model)


@pytest.mark.parametrize("seed", [-1, 0, -(2**63), 2**63 - 1])
def test_every_64_bit_seed_works(seed) -> None:
    model = bert()
    session = lt.apply(model, lt.WTACRS(min_rows=2), lt.LoRA(rank=2), seed=seed)
    model(**MODELS["bert"].batch()).loss.backward()
    state = session.state_dict()
    session.load_state_dict(state)
    assert session.seed == seed


def test_model_converted_already() -> None:
    model = bert()
    session = lt.apply(model, lt.WTACRS())
    with pytest.raises(
        ConfigError, match=r"must not be converted already, .* got BertFor\w+ with wta_crs; "
    ):
        lt.apply(model, lt.LoRA())
    session.remove()
    lt.apply(model, lt.LoRA()).remove()


def test_meta_model() -> None:
    with torch.device("meta"):
        model = MODELS["bert"].build()
    with pytest.raises(
        UnsupportedError, match=r"on the meta device \(bert\.embeddings\..*load the"
    ):
        lt.apply(model, lt.WTACRS())


def test_integer_weights_list_every_site() -> None:
    model = bert()
    layers = [model.bert.encoder.layer[i].output.dense for i in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    before = Fingerprint(model)
    with pytest.raises(SiteError, match="2 of 4 sites cannot be used") as error:
        lt.apply(model, lt.WTACRS(sites="output.dense"))
    for i in range(2):
        assert f"layer.{i}.output.dense: weight must be floating point, got int8" in str(
            error.value
        )
    before.check(model)


def test_two_methods_of_one_axis_on_one_site_list_every_site() -> None:
    model = bert()
    before = Fingerprint(model)
    with pytest.raises(SiteError, match="at most one method per axis, got 2 with two") as error:
        third = lt.WTACRS(keep_ratio=0.2, sites="query")  # its sites would count twice more
        second = lt.WTACRS(keep_ratio=0.1, sites=["query", "key"])
        lt.apply(model, lt.WTACRS(sites="query"), second, third)
    for i in range(2):
        assert f"layer.{i}.attention.self.query (WTACRS and WTACRS, axis 'rows')" in str(
            error.value
        )
    before.check(model)


def test_one_method_twice_on_different_sites() -> None:
    model = bert()
    lt.apply(model, lt.WTACRS(sites="query"), lt.WTACRS(keep_ratio=0.1, sites="output.dense"))
    layer = model.bert.encoder.layer[0]
    assert layer.attention.self.query.rows.config.keep_ratio == 0.3
    assert layer.output.dense.rows.config.keep_ratio == 0.1
    assert type(layer.attention.self.key) is nn.Linear
    model(**MODELS["bert"].batch()).loss.backward()


@pytest.fixture
def method_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Axis, str], MethodConfig]:
    """Register methods that act on a role along an axis, and change nothing."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    def make(axis: Axis, role: str) -> MethodConfig:
        name = f"{axis}_of_{role}"
        config = type(name, (MethodConfig,), {"method": name})
        registry.register(
            MethodSpec(
                config=config,
                axis=axis,
                roles=(role,),
                summary="",
                source="",
                convert=lambda model, sites, config, runtime: SwapConversion([]),
            )
        )
        return config()

    return make


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("model", "outer", "inner"),
    [
        ("bert", "block", lt.WTACRS(sites="query")),
        ("llama", "mlp", lt.WTACRS(sites="mlp.down")),
        # Not inside the MLP's own module, but replaced together with it.
        ("bert", "mlp", lt.WTACRS(sites="mlp.down")),
        ("opt", "mlp", lt.WTACRS(sites="mlp.down")),
    ],
)
def test_two_methods_of_one_axis_on_nested_sites_are_refused_before_anything_moves(
    method_on, model: str, outer: str, inner: MethodConfig, order: int
) -> None:
    model = MODELS[model].build()
    before = Fingerprint(model)
    methods = [lt.LoRA(rank=2), *[method_on("rows", outer), inner][::order]]
    with pytest.raises(SiteError, match="at most one method per axis, got 2 with two"):
        lt.apply(model, *methods)
    before.check(model)


def test_two_methods_of_one_axis_beside_each_other_and_two_axes_on_nested_sites_go(
    method_on,
) -> None:
    query = lt.WTACRS(sites="query")
    lt.apply(bert(), method_on("rows", "mlp"), query).remove()
    lt.apply(bert(), method_on("recompute", "block"), query).remove()


@pytest.mark.parametrize("sites", ["nothing", "re:^nothing", lambda site: False])
def test_sites_that_match_nothing(sites) -> None:
    model = bert()
    before = Fingerprint(model)
    with pytest.raises(SiteError, match="sites must match at least one module, got "):
        lt.apply(model, lt.WTACRS(sites=sites))
    before.check(model)


def test_no_site_by_the_methods_own_choice() -> None:
    with pytest.raises(SiteError, match="got none by the method's own choice"):
        lt.apply(nn.Sequential(nn.Conv2d(1, 1, 1)), lt.WTACRS())
    frozen = bert().requires_grad_(False)
    with pytest.raises(SiteError, match="got none by the method's own choice"):
        lt.apply(frozen, lt.WTACRS())


def test_role_that_the_method_cannot_act_on() -> None:
    with pytest.raises(SiteError, match="got 'block', which matches none"):
        lt.apply(bert(), lt.WTACRS(sites="block"))


def test_model_that_is_itself_a_linear() -> None:
    layer = nn.Linear(2, 2)
    before = Fingerprint(layer)
    with pytest.raises(SiteError, match="got the model itself"):
        lt.apply(layer, lt.WTACRS())
    before.check(layer)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], MethodConfig]:
    """Make a method that fails at its convert."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @dataclass(frozen=True, kw_only=True)
    class Failing(MethodConfig):
        method: ClassVar[str] = "failing"

    def make(error: BaseException) -> MethodConfig:
        def convert(model, sites, config, runtime) -> Conversion:
            raise error

        registry.register(
            MethodSpec(
                config=Failing,
                axis="rows",
                roles=("linear",),
                summary="",
                source="",
                convert=convert,
            )
        )
        return Failing(sites="output.dense")

    return make


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_failing_second_method_leaves_nothing_behind(failing, error) -> None:
    model = bert()
    before = Fingerprint(model)
    with pytest.raises(type(error)):
        lt.apply(model, lt.LoRA(rank=2, sites=["query", "key"]), failing(error))
    before.check(model)
    model(**MODELS["bert"].batch()).loss.backward()


def test_failing_peft_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    model = bert()
    before = Fingerprint(model)
    replace, count = LoraModel._replace_module, iter(range(100))

    def fail(self, *args, **options):
        if next(count) == 3:
            raise RuntimeError("disk on fire")
        return replace(self, *args, **options)

    monkeypatch.setattr(LoraModel, "_replace_module", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        lt.apply(model, lt.LoRA(rank=2))
    before.check(model)


@pytest.mark.parametrize("name", MODELS)
def test_remove_gives_everything_back(name: str) -> None:
    model = MODELS[name].build()
    before = Fingerprint(model)
    session = lt.apply(model, lt.WTACRS(), lt.LoRA(rank=2), lt.Checkpoint())
    model(**MODELS[name].batch()).loss.backward()
    session.remove()
    before.check(model)


def test_default_sites_of_wta_crs() -> None:
    model = bert()
    lt.apply(model, lt.WTACRS())
    assert isinstance(model.bert.encoder.layer[0].output.dense, ConvertedLinear)
    assert type(model.bert.pooler.dense) is nn.Linear and type(model.classifier) is nn.Linear


def test_methods_apply_in_the_order_of_their_axes() -> None:
    """LoRA comes first however the recipe is written: what trains is settled before."""
    model = bert()
    lt.apply(model, lt.WTACRS(), lt.LoRA(rank=2))
    query = model.bert.encoder.layer[0].attention.self.query
    assert isinstance(query.lora_A["default"], ConvertedLinear)
    assert type(query.base_layer) is nn.Linear and type(query.lora_B["default"]) is nn.Linear


def test_model_in_evaluation_mode_stays_so() -> None:
    model = bert().eval()
    session = lt.apply(model, lt.WTACRS(), lt.LoRA(rank=2))
    assert not any(m.training for m in model.modules())
    session.remove()
    assert not any(m.training for m in model.modules())
