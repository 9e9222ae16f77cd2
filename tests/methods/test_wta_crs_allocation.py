"""How kept rows are divided among linears: at the same bytes, unbiased, with less variance."""

from statistics import fmean
from typing import Any

import pytest
import torch
from models import MODELS
from torch import Tensor, nn

import leantune as lt
from leantune.methods.wta_crs.sharing import NUM_STEPS, Allocation, SamplePool

TINY = MODELS["llama"]


class Two(nn.Module):
    """Of two linears one has gradients of one size, the other some that are far larger."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.uneven = nn.Linear(24, 8), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        sizes = torch.linspace(0, 8, x.shape[1]).exp()[:, None]
        signs = torch.arange(x.shape[1])[:, None] % 2 * 2.0 - 1
        return (signs * self.even(x + 0.0)).sum() + (sizes * self.uneven(x + 1.0)).sum()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(2, 100, 24, generator=torch.Generator().manual_seed(seed))


def stepped(model: nn.Module, batches: Any, scale: float = 1.0, **options: Any) -> lt.Session:
    """Apply WTA-CRS with a measured allocation and let it see the batches; no weight moves."""
    given: dict[str, Any] = {"keep_ratio": 0.1, "min_rows": 2, "allocation": "measured"} | options
    session = lt.apply(model, lt.WTACRS(**given))
    see(session, batches, scale)
    return session


def see(session: lt.Session, batches: Any, scale: float = 1.0) -> None:
    for shown in batches:
        found = session.model(**shown) if isinstance(shown, dict) else session.model(shown)
        (scale * getattr(found, "loss", found)).backward()
        session.model.zero_grad()
        session.on_step()


def ratios(session: lt.Session) -> Tensor:
    return session.state_dict()["0.wta_crs/allocation/ratios"]


@pytest.mark.parametrize("options", [{}, {"draw_at": "backward"}, {"estimator": "wta"}])
def test_rows_go_where_they_lower_the_variance_at_the_same_bytes(options: dict[str, Any]) -> None:
    model = Two()
    session = stepped(model, map(batch, range(NUM_STEPS - 1)), **options)
    even = lt.fidelity(model, batch(99), 200)
    saved = lt.ledger(model, batch(99)).activations
    assert ratios(session).tolist() == [0.1, 0.1]
    see(session, [batch(98)])
    measured = lt.fidelity(model, batch(99), 200)
    assert ratios(session)[0] > 0.12
    assert lt.ledger(model, batch(99)).activations <= saved
    before, after = (
        fmean(p.relative_variance for p in found.parameters) for found in (even, measured)
    )
    assert after < 0.9 * before
    assert not any(p.looks_biased for p in measured.parameters)


def test_a_loss_scale_cancels_and_steps_that_overflow_do_not_count() -> None:
    plain = ratios(stepped(Two(), map(batch, range(NUM_STEPS))))
    scaled = ratios(stepped(Two(), map(batch, range(NUM_STEPS)), scale=2.0**10))
    assert torch.equal(plain, scaled)
    session = stepped(Two(), map(batch, range(NUM_STEPS - 1)))
    see(session, [batch(99)], scale=float("inf"))
    assert bool(ratios(session).isfinite().all()) and ratios(session)[0] > 0.12


def test_linears_of_one_input_still_share_one_sample() -> None:
    model = TINY.build()
    session = stepped(model, [TINY.batch(seed) for seed in range(NUM_STEPS)], keep_ratio=0.3)
    (conversion,) = session.conversions
    by_name = dict(zip((swap.name for swap in conversion.swaps), ratios(session), strict=True))  # type: ignore[attr-defined]
    assert len({float(ratio) for ratio in by_name.values()}) > 3
    for name, ratio in by_name.items():
        twin = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        assert ratio == by_name[twin.replace("up_proj", "gate_proj")]
    entries = [e for e in lt.ledger(model, TINY.batch()).entries if e.kind == "linear input"]
    assert entries and not any(e.module.endswith(("k_proj", "v_proj", "up_proj")) for e in entries)


@pytest.mark.parametrize("num_steps", [10, NUM_STEPS + 1])
def test_a_resumed_run_goes_on_to_the_bit(num_steps: int) -> None:
    whole = stepped(TINY.build(), map(TINY.batch, range(NUM_STEPS + 2)))
    cut_off = stepped(TINY.build(), map(TINY.batch, range(num_steps)))
    state = {name: value.clone() for name, value in cut_off.state_dict().items()}
    resumed = stepped(TINY.build(), [])
    resumed.load_state_dict(state)
    see(resumed, map(TINY.batch, range(num_steps, NUM_STEPS + 2)))
    assert torch.equal(ratios(whole), ratios(resumed))
    assert ratios(whole).unique().numel() > 1


def divided(costs: list[float], inputs: dict[int, tuple[int, int]]) -> list[float]:
    cpu = torch.device("cpu")
    allocation = Allocation(0.1, [cpu] * len(costs), [(c,) for c in inputs], SamplePool(len(costs)))
    for column, (n, width) in inputs.items():
        allocation.expect(column, column, torch.Size((n, width)), cpu)
    allocation._divide(costs)
    return allocation.ratios


def test_the_division_is_the_square_root_rule() -> None:
    found = divided([1.0, 4.0, 2.0], {0: (1000, 64), 1: (1000, 64), 2: (1000, 128)})
    # k ~ sqrt(S / w): 1 to 2 to 1, and the bytes of a tenth in all.
    torch.testing.assert_close(found, [0.08, 0.16, 0.08], rtol=1e-9, atol=0)
    # Nobody falls below half of an even share, nobody keeps more than there is.
    assert divided([1e-9, 1.0], {0: (1000, 64), 1: (100, 64)}) == [0.05, pytest.approx(0.6)]
    assert divided([1e-9, 1.0], {0: (9000, 64), 1: (100, 64)}) == [pytest.approx(0.09), 1.0]
    assert divided([0.0, 0.0], {0: (10, 4), 1: (10, 4)}) == [0.1, 0.1]


def test_what_has_no_variance_to_go_by_is_refused() -> None:
    estimator: Any
    for estimator in ("crs", "topk"):
        with pytest.raises(lt.ConfigError, match=rf"allocation must be 'even' .* '{estimator}'"):
            lt.WTACRS(allocation="measured", estimator=estimator)
    session = stepped(Two(), [])
    state = session.state_dict()
    for bad in (torch.full((2,), 2.0), torch.full((3,), 0.1)):
        key = "0.wta_crs/allocation/ratios"
        with pytest.raises(lt.ConfigError, match="allocation must hold a ratio in"):
            session.load_state_dict({**state, key: bad.double()})
