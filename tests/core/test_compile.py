"""torch.compile meets no graph break in a converted model, and computes the same."""

from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torch._dynamo.utils import counters

import leantune as lt

pytestmark = [
    pytest.mark.slow,
    # Warnings of torch's own compiler about itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden *= 0.5  # an output may be written to
        return self.down(torch.relu(hidden))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norms": "activation"},
    {"draw_at": "backward"},
]


def compiled_pair(make, *methods: lt.WTACRS) -> tuple[nn.Module, nn.Module, Any]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make()
        lt.apply(model, *methods)
        models.append(model)
    return *models, torch.compile(models[1], backend="aot_eager", fullgraph=True)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("options", "is_autocast"), [({}, True), *((options, False) for options in OPTIONS)], ids=str
)
def test_wta_crs_compiles_from_the_first_step_without_a_graph_break(options, is_autocast) -> None:
    eager, model, compiled = compiled_pair(Small, lt.WTACRS(min_rows=2, **options))
    for num_tokens in (8, 8, 12):
        x = torch.randn(4, num_tokens, 8)
        for run, m in ((eager, eager), (compiled, model)):
            m.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                output = run(x)
            output.float().square().sum().backward()
        tolerance = {"rtol": 2e-2, "atol": 1e-2} if is_autocast else {}
        torch.testing.assert_close(gradients(model), gradients(eager), **tolerance)
    assert not counters["graph_break"]


def test_longer_inputs_than_there_is_room_for_compile_again(monkeypatch) -> None:
    from leantune.methods.wta_crs import norms

    monkeypatch.setattr(norms, "_NUM_POSITIONS", 8)
    eager, model, _ = compiled_pair(Small, lt.WTACRS(min_rows=2))
    compiled = torch.compile(model, backend="aot_eager")
    for num_tokens in (8, 12, 12):
        x = torch.randn(4, num_tokens, 8)
        for run, m in ((eager, eager), (compiled, model)):
            m.zero_grad()
            run(x).square().sum().backward()
        torch.testing.assert_close(gradients(model), gradients(eager))


@pytest.mark.parametrize("name", ["bert"])
def test_a_transformers_model_compiles_without_a_graph_break_of_ours(name: str) -> None:
    eager, model, _ = compiled_pair(MODELS[name].build, lt.WTACRS(min_rows=2))
    plain = MODELS[name].build()
    torch.compile(plain, backend="aot_eager")(**MODELS[name].batch()).loss.backward()
    wanted = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        for run, m in ((eager, eager), (compiled, model)):
            m.zero_grad()
            run(**MODELS[name].batch(seed)).loss.backward()
            # Where the whole model is compiled, row masks are learned here.
            m._leantune_session.on_step()
        torch.testing.assert_close(gradients(model), gradients(eager), rtol=1e-3, atol=1e-6)
    assert sum(counters["graph_break"].values()) <= wanted, counters["graph_break"]
