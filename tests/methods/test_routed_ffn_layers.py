"""Which FFNs to route: errors by layer as they are, and the layers that cost least go first."""

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.errors import ConfigError
from leantune.methods.routed_ffn import choose_layers, layers
from leantune.methods.routed_ffn.layers import output_errors
from leantune.methods.routed_ffn.module import RoutedMLP

TINY = MODELS["bert"]
BATCHES = [TINY.batch(seed) for seed in range(4)]
NAMES = [f"bert.encoder.layer.{i}.intermediate" for i in range(2)]


def test_errors_are_those_of_real_tokens_under_the_plain_models_inputs() -> None:
    model = TINY.build()
    modules = list(model.modules())
    modes = [m.training for m in modules]
    config = lt.RoutedFFN(num_active=3)
    found = output_errors(model, config, BATCHES[:2], BATCHES[2:3])
    assert list(model.modules()) == modules and [m.training for m in modules] == modes
    session = lt.apply(model.eval(), config)
    session.calibrate(BATCHES[:2])
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedMLP)}
    inputs: dict[str, Tensor] = {}
    for name, layer in routed.items():
        layer.register_forward_hook(lambda m, args, out, n=name: inputs.update({n: args[0]}))
    with session.exact(), torch.no_grad():
        model(**BATCHES[2])
    real = BATCHES[2]["attention_mask"].bool()
    assert list(found) == NAMES and not real.all()
    for name, layer in routed.items():
        x = inputs[name]
        with torch.no_grad():
            dense = layer.ffn.output(layer.ffn.hidden(x))
            error = layer(x) - dense
        wanted = error[real].norm() / dense[real].norm()
        assert found[name] == pytest.approx(float(wanted), rel=1e-5)
        assert found[name] != pytest.approx(float(error.norm() / dense.norm()), rel=1e-5)


def test_compensation_lessens_the_error() -> None:
    def error(compensate: str) -> float:
        config = lt.RoutedFFN(compensate=compensate)  # type: ignore[arg-type]
        return output_errors(model, config, BATCHES, BATCHES)[NAMES[1]]

    model = TINY.build()
    nn.init.normal_(model.get_submodule("bert.encoder.layer.1.intermediate.dense").bias)
    assert error("lowrank") < error("none")


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (1.0, {}),
        (0.9, {3: ("a",)}),  # at 7 of 8 groups
        (0.75, {2: ("a",)}),
        (0.625, {1: ("a",)}),
        (0.5, {1: ("a",), 3: ("b",)}),
        (0.25, {1: ("a", "b")}),
    ],
)
def test_layers_that_cost_least_go_first(
    share: float, wanted: dict[int, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"a": [0.6, 0.3, 0.1], "b": [0.9, 0.8, 0.7]}
    shown = []

    def fake(
        model: nn.Module, config: lt.RoutedFFN, calibration: list[int], held_out: list[int]
    ) -> dict[str, float]:
        shown.append((calibration, held_out))
        return {name: found[config.num_active - 1] for name, found in errors.items()}

    monkeypatch.setattr(layers, "output_errors", fake)
    config = lt.RoutedFFN(compensate="lowrank", split="coactivation")
    chosen = choose_layers(nn.Identity(), [1, 2, 3], config, active_share=share)
    assert {c.num_active: c.sites for c in chosen} == wanted
    assert all((c.compensate, c.split) == ("lowrank", "coactivation") for c in chosen)
    assert shown == 3 * [([1], [2, 3])]


def test_choice_can_be_applied() -> None:
    model = TINY.build()
    chosen = choose_layers(model, BATCHES, lt.RoutedFFN(), active_share=0.6)
    session = lt.apply(model, lt.LoRA(), *chosen)
    routed = [m.config.num_active for m in model.modules() if isinstance(m, RoutedMLP)]
    assert sum(routed) + 4 * (2 - len(routed)) == 4  # the most that 0.6 of 8 groups allow
    session.calibrate(BATCHES[:1])
    model(**BATCHES[0]).loss.backward()


def test_bad_shares_and_batches_are_named() -> None:
    model = TINY.build()
    for share in (0.2, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"active_share must be from .* = 0.25 to 1, got"):
            choose_layers(model, BATCHES, lt.RoutedFFN(), active_share=share)
    with pytest.raises(ConfigError, match=r"batches must be at least two, .* got 1; give"):
        choose_layers(model, BATCHES[:1], lt.RoutedFFN(), active_share=0.5)
    assert not any(isinstance(m, RoutedMLP) for m in model.modules())
