"""Errors of routed FFNs by layer: those of real tokens, less with a guess."""

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from bench.cases.routed_ffn_error import output_errors
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
    assert error("lowrank") < error("mean") < error("none")
