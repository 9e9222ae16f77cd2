"""Fidelity on a session double whose noise is known in closed form."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leantune.errors import ConfigError
from leantune.measure.fidelity import fidelity

# One false alarm in a million, two-sided.
Z_LIMIT = 4.9


class NoisySession:
    """Counts draws; adds normal noise and a constant bias to weight gradients."""

    def __init__(self, sigma: float, bias: float) -> None:
        self.sigma, self.bias = sigma, bias
        self.draw = 0
        self.is_exact = False

    @contextmanager
    def exact(self) -> Iterator[None]:
        self.is_exact = True
        try:
            yield
        finally:
            self.is_exact = False

    def state_dict(self) -> dict[str, int]:
        return {"draw": self.draw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.draw = state["draw"]


class NoisyMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, session: NoisySession) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.session, ctx.draw = session, session.draw
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        exact = x.t() @ grads[0]
        estimate = exact
        if not ctx.session.is_exact:
            generator = torch.Generator().manual_seed(ctx.draw)
            noise = torch.randn(exact.shape, generator=generator)
            size = ctx.session.sigma * exact.norm() / sqrt(exact.numel())
            estimate = exact * (1 + ctx.session.bias) + noise * size
        return grads[0] @ weight.t(), estimate, None


class NoisyLinear(nn.Module):
    def __init__(self, session: NoisySession, d_in: int, d_out: int) -> None:
        super().__init__()
        self.session = session
        self.weight = nn.Parameter(torch.randn(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return NoisyMatmul.apply(x, self.weight, self.session)  # type: ignore[no-any-return]


def make_model(sigma: float = 0.5, bias: float = 0.0, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    session = NoisySession(sigma, bias)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(dropout), NoisyLinear(session, 8, 5), nn.Linear(5, 3)
    )
    model._leantune_session = session  # type: ignore[assignment]

    def advance(*_: Any) -> None:
        session.draw += 1

    model.register_forward_pre_hook(advance)
    return model


def variance_z(measured: float, expected: float, num_draws: int, numel: int) -> float:
    """Return z of a mean of ``num_draws * numel`` squared normals."""
    return (measured / expected - 1) / sqrt(2 / (num_draws * numel))


def test_noise_of_known_variance_is_measured_and_called_unbiased() -> None:
    model, num_draws, sigma = make_model(), 200, 0.5
    result = fidelity(model, torch.randn(10, 6), num_draws)
    (p,) = result.parameters
    assert (p.name, p.module, p.num_elements) == ("2.weight", "2", 40)
    assert abs(variance_z(p.relative_variance, sigma**2, num_draws, 40)) < Z_LIMIT
    # the same test refuses a noise that is 1.25 times larger
    assert abs(variance_z(p.relative_variance, (1.25 * sigma) ** 2, num_draws, 40)) > Z_LIMIT
    assert p.expected_bias == pytest.approx(sqrt(p.relative_variance / num_draws))
    # bias_ratio^2 is chi-square with 40 degrees of freedom over 40
    assert abs((p.bias_ratio**2 - 1) / sqrt(2 / 40)) < Z_LIMIT
    assert not p.looks_biased
    # cos = (1 + e1) / sqrt((1 + e1)^2 + rest), and rest is sigma^2 * 39 / 40 in the mean
    assert p.cosine == pytest.approx(1 / sqrt(1 + sigma**2), abs=0.02)
    assert set(result.exact_parameters) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert result.overall is not None
    assert result.overall.relative_variance == pytest.approx(p.relative_variance)


def test_a_biased_method_is_detected() -> None:
    result = fidelity(make_model(bias=0.3), torch.randn(10, 6), 200)
    (p,) = result.parameters
    assert p.looks_biased
    assert p.relative_bias == pytest.approx(0.3, abs=Z_LIMIT * 0.5 / sqrt(200))
    assert " !" in result.table()


def test_a_constant_error_is_all_bias() -> None:
    result = fidelity(make_model(sigma=0.0, bias=-0.5), torch.randn(10, 6), 36)
    (p,) = result.parameters
    assert p.relative_variance == pytest.approx(0.25)
    assert p.relative_bias == pytest.approx(0.5)
    assert p.bias_ratio == pytest.approx(6.0)
    assert p.cosine == pytest.approx(1.0)


def test_dropout_is_no_part_of_the_error() -> None:
    result = fidelity(make_model(sigma=0.0), torch.randn(10, 6), 4)
    assert result.parameters == () and result.overall is None
    assert len(result.exact_parameters) == 5
    # the control: two plain runs do differ by their masks
    model, x = make_model(sigma=0.0), torch.randn(10, 6)
    assert not torch.equal(model(x), model(x))


def test_the_variance_of_batches_is_that_of_the_exact_gradients() -> None:
    model: Any = make_model(dropout=0.0)
    batches = [torch.randn(10, 6) for _ in range(5)]
    result = fidelity(model, batches[0], 4, batches=batches[1:])
    gradients = []
    session = model._leantune_session
    for x in batches:
        with session.exact():
            (g,) = torch.autograd.grad(model(x).sum(), model[2].weight)
        gradients.append(g)
    stacked = torch.stack(gradients).double()
    expected = stacked.var(0).sum() / stacked.mean(0).square().sum()
    (p,) = result.parameters
    assert p.batch_variance == pytest.approx(float(expected), rel=1e-5)
    assert result.num_batches == 5
    assert fidelity(model, batches[0], 4).parameters[0].batch_variance is None


def test_a_loss_can_be_given() -> None:
    model, x = make_model(dropout=0.0), torch.randn(10, 6)
    norms = [
        fidelity(model, x, 2, loss=loss).parameters[0].exact_norm
        for loss in (None, lambda y: 3 * y.sum(), lambda y: y.square().sum())
    ]
    assert norms[1] == pytest.approx(3 * norms[0])
    assert norms[2] != pytest.approx(norms[0])


def test_an_estimate_of_a_zero_gradient_is_infinitely_off() -> None:
    class Ghost(NoisyMatmul):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            _, weight = ctx.saved_tensors
            is_exact = ctx.session.is_exact
            return grads[0] @ weight.t(), None if is_exact else torch.ones_like(weight), None

    model: Any = make_model()
    model[2].forward = lambda x: Ghost.apply(x, model[2].weight, model._leantune_session)
    result = fidelity(model, torch.randn(10, 6), 4)
    assert result.parameters[0].relative_variance == float("inf")
    assert result.parameters[0].bias_ratio == pytest.approx(2.0)
    assert json.loads(json.dumps(result.to_dict()))["parameters"][0]["relative_variance"] is None


def test_report_names_the_parameter_and_the_rest() -> None:
    result = fidelity(make_model(), torch.randn(10, 6), 4, batches=[torch.randn(10, 6)])
    text = result.table()
    assert "2.weight" in text and "all of the above" in text
    assert "4 draws" in text and "4 parameters have an exact gradient" in text
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["parameters"][0]["cosine"] == result.parameters[0].cosine
    assert plain["overall"]["batch_variance"] == plain["parameters"][0]["batch_variance"]


def test_bad_requests_name_themselves() -> None:
    with pytest.raises(ConfigError, match="num_draws must be at least 2, got 1"):
        fidelity(make_model(), torch.randn(10, 6), 1)
    with pytest.raises(ConfigError, match=r"model must be converted, got Linear .*apply"):
        fidelity(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ConfigError, match="batch must hold at least one non-empty tensor"):
        fidelity(make_model(), {})
