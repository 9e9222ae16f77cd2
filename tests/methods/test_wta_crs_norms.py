"""Sources of gradient norms: what they remember, what they refuse, and that nothing is biased."""

from typing import Any

import pytest
import torch
from models import MODELS, NUM_SAMPLES, NUM_TOKENS
from stats import mean_check
from torch import Tensor, nn

import leantune as lt
from leantune.core.swap import StoredLinear
from leantune.errors import ConfigError, LeantuneError
from leantune.methods.wta_crs.norms import RunningNorms

TINY = MODELS["bert"]


def converted(**options: Any) -> tuple[nn.Module, lt.Session]:
    model = TINY.build()
    return model, lt.apply(model, lt.WTACRS(**{"min_rows": 2, "norms": "cache", **options}))


def cache(session: lt.Session) -> Tensor:
    """Return the host's norms, (samples, linears, tokens)."""
    return next(v for k, v in session.state_dict().items() if k.endswith("/norms")).float()


def linears(model: nn.Module) -> dict[str, StoredLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, StoredLinear)}


def true_norms(model: nn.Module, batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Run a step and return (b, t) norms of each linear's output gradient."""
    norms: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(
            lambda module, args, out, n=n: (
                out.register_hook(lambda g: norms.__setitem__(n, g.norm(dim=-1))) and None
            )
        )
        for n, m in linears(model).items()
    ]
    model.zero_grad()
    model(**batch, sample_id=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return norms


def check_rows(model: nn.Module, held: Tensor, ids: Tensor, norms: dict[str, Tensor]) -> None:
    for name, module in linears(model).items():
        rows = held[ids, module.store._column]
        t = norms[name].shape[1]
        torch.testing.assert_close(rows[:, :t], norms[name], rtol=0.01, atol=1e-30)
        assert not rows[:, t:].any()


def test_cache_holds_exactly_the_norms_of_the_batch() -> None:
    model, session = converted()
    session.num_samples = 20
    ids = torch.tensor([7, 2, 19, 0])
    norms = true_norms(model, TINY.batch(), ids)
    held = cache(session)
    assert held.shape == (20, 12, NUM_TOKENS)
    check_rows(model, held, ids, norms)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[ids] = False
    assert not held[untouched].any()
    # A second batch leaves the first alone; its own rows change on the next visit.
    other = torch.tensor([1, 3, 4, 5])
    check_rows(model, _after(model, session, TINY.batch(1), other), other, _last)
    assert torch.equal(cache(session)[ids], held[ids])
    later = _after(model, session, TINY.batch(2), ids)
    check_rows(model, later, ids, _last)
    assert not torch.equal(later[ids], held[ids])


_last: dict[str, Tensor] = {}


def _after(model: nn.Module, session: lt.Session, batch, ids: Tensor) -> Tensor:
    _last.clear()
    _last.update(true_norms(model, batch, ids))
    return cache(session)


def test_short_last_batch_and_changed_padding() -> None:
    model, session = converted()
    full = TINY.batch()
    true_norms(model, full, torch.arange(NUM_SAMPLES))
    before = cache(session)
    short = {k: v[:2] if k == "labels" else v[:2, :5] for k, v in full.items()}
    ids = torch.tensor([1, 3])
    held = _after(model, session, short, ids)
    check_rows(model, held, ids, _last)
    assert torch.equal(held[0], before[0]) and torch.equal(held[2], before[2])
    # And longer again than what is known.
    long = {
        "input_ids": torch.randint(3, 60, (2, 12)),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "labels": torch.tensor([0, 1]),
    }
    held = _after(model, session, long, ids)
    assert held.shape[-1] == 12
    check_rows(model, held, ids, _last)


def test_cache_survives_a_checkpoint() -> None:
    model, session = converted()
    true_norms(model, TINY.batch(), torch.arange(NUM_SAMPLES))
    state = {k: v.clone() for k, v in session.state_dict().items()}
    _, other = converted()
    other.load_state_dict(state)
    assert torch.equal(cache(other), cache(session))


def test_gradient_accumulation_and_loss_scaling_cancel() -> None:
    ids = torch.arange(NUM_SAMPLES)
    held = []
    for scale in (1.0, 1024.0, 0.25):
        model, session = converted()
        (model(**TINY.batch(), sample_id=ids).loss * scale).backward()
        held.append(cache(session))
    assert torch.equal(held[0], held[1]) and torch.equal(held[0], held[2])
    assert held[0].any()


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def classifier_like() -> tuple[Tensor, Tensor]:
    """Inputs (b, t, d), and a gradient that only the first token has much of."""
    x = torch.randn(4, 10, 6) + 0.3
    grad_output = torch.randn(4, 10, 5)
    grad_output[:, 1:] *= 0.05
    return x, grad_output


@pytest.mark.parametrize("seen", [(), (0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("norms", ["cache", "running"])
def test_fallback_for_samples_not_seen_stays_unbiased(seen: tuple[int, ...], norms: str) -> None:
    x, grad_output = classifier_like()
    model = Single()
    session = lt.apply(model, lt.WTACRS(norms=norms, min_rows=2))
    if seen:
        # What was met then is not what is met now: stale norms leave no bias either.
        some = list(seen)
        model(x[some], sample_id=torch.tensor(some)).backward(grad_output[some].flip(1) + 0.01)
    state = {k: v.clone() for k, v in session.state_dict().items()}
    draws = []
    for number in range(300):
        session.load_state_dict({**state, "draw": torch.tensor(100 + number)})
        model.zero_grad()
        model(x, sample_id=torch.arange(4)).backward(grad_output)
        draws.append(model.layer.weight.grad.clone())
    wanted = (grad_output.double().view(-1, 5).t() @ x.double().view(-1, 6)).numpy()
    samples = torch.stack(draws).double().numpy()
    assert mean_check(samples, wanted, resolution=1e-5).ok
    assert not mean_check(samples * 0.5, wanted, resolution=1e-5).ok


def test_known_norms_lower_the_variance() -> None:
    x, grad_output = classifier_like()
    variance = {}
    for norms in ("activation", "running", "cache"):
        model = Single()
        lt.apply(model, lt.WTACRS(norms=norms, min_rows=2))
        draws = []
        for _ in range(200):
            model.zero_grad()
            model(x, sample_id=torch.arange(4)).backward(grad_output)
            draws.append(model.layer.weight.grad.clone())
        variance[norms] = float(torch.stack(draws[40:]).var(0).sum())
    assert variance["cache"] < 0.3 * variance["activation"]
    assert variance["running"] < 0.3 * variance["activation"]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_nan_in_the_norms_names_linear_and_sample(scale: float) -> None:
    model, session = converted()
    ids = torch.tensor([4, 9, 6, 2])
    loss = model(**TINY.batch(), sample_id=ids).loss * scale

    module = model.bert.encoder.layer[1].output.dense
    model.zero_grad()
    loss.backward()
    output_grad = torch.zeros(NUM_SAMPLES, NUM_TOKENS, 16)
    output_grad[2, 0, 0] = float("nan")
    handle = module.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: output_grad) and None
    )
    (model(**TINY.batch(), sample_id=ids).loss * scale).backward()
    handle.remove()
    match = r"layer\.\d\.\S+ must be finite, got nan or inf for sample_id 6; .*lower the learning"
    with pytest.raises(LeantuneError, match=match):
        session.state_dict()
    # Said once: the run may go on from there.
    assert torch.isfinite(cache(session)).all()


def test_overflow_of_a_loss_scaler_keeps_the_old_norms() -> None:
    model, session = converted()
    ids = torch.arange(NUM_SAMPLES)
    model(**TINY.batch(), sample_id=ids).loss.backward()
    before = cache(session)
    (model(**TINY.batch(), sample_id=ids).loss * 2.0**127 * 2.0).backward()
    assert torch.equal(cache(session), before)


def test_cache_that_would_not_fit_is_refused_with_a_way_out() -> None:
    model, session = converted(cache_gib=1e-4)
    session.num_samples = 1_000_000
    with pytest.raises(ConfigError, match=r"cache_gib must be at least 0\.18 for 1000000 samples"):
        model(**TINY.batch(), sample_id=torch.arange(NUM_SAMPLES))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norms", ["cache", "running"])
def test_state_that_is_not_finite_is_refused(norms: str, bad: float) -> None:
    model, session = converted(norms=norms)
    model(**TINY.batch(), sample_id=torch.arange(NUM_SAMPLES)).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    key = next(k for k in state if "/" in k)
    state[key].view(-1)[0] = bad
    _, other = converted(norms=norms)
    with pytest.raises(ConfigError, match=r"norms.* must be finite, got nan or inf"):
        other.load_state_dict(state)


def test_state_of_another_model_is_refused() -> None:
    model, session = converted(norms="running")
    model(**TINY.batch()).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    first = next(k for k in state if "/" in k)
    state[first.rpartition("/")[0] + "/nonsense"] = state.pop(first)
    with pytest.raises(ConfigError, match="must belong to this model's linears, got 'nonsense'"):
        session.load_state_dict(state)
    _, cached = converted()
    state = cached.state_dict()
    key = next(k for k in state if k.endswith("/norms"))
    with pytest.raises(
        ConfigError, match=r"must have shape \(samples, 12, tokens\), got \(3, 5, 2\)"
    ):
        cached.load_state_dict({**state, key: torch.zeros(3, 5, 2, dtype=torch.bfloat16)})


def observe(norms: RunningNorms, squares: Tensor, mask: Tensor | None = None) -> None:
    shape = torch.Size((*squares.shape, 3))
    norms.observe(
        0, squares.sqrt().flatten(), None if mask is None else mask.flatten(), shape, None
    )


def test_running_mean_is_relative_and_by_position() -> None:
    norms = RunningNorms(["a"], decay=0.5)
    observe(norms, torch.tensor([[4.0, 0.0], [12.0, 0.0]]))
    # The batch's mean square is 4: relative squares (2, 0), half way from (1, 1).
    torch.testing.assert_close(norms.state_dict()["a"], torch.tensor([1.5, 0.5]))
    read = norms.read(torch.Size((3, 2, 9)), [0], None)  # type: ignore[arg-type]
    torch.testing.assert_close(read, torch.tensor([1.5, 0.5] * 3).sqrt())


def test_running_mean_skips_padding_overflow_and_silence() -> None:
    norms = RunningNorms(["a"], decay=0.5)
    mask = torch.tensor([[True, False], [True, False]])
    observe(norms, torch.tensor([[4.0, 100.0], [4.0, 100.0]]), mask)
    torch.testing.assert_close(norms.state_dict()["a"], torch.ones(2))
    for bad in (float("nan"), float("inf")):
        observe(norms, torch.tensor([[bad, 1.0]]))
    observe(norms, torch.zeros(1, 2))
    torch.testing.assert_close(norms.state_dict()["a"], torch.ones(2))


def test_positions_not_met_yet_count_as_average() -> None:
    norms = RunningNorms(["a", "b"], decay=0.5)
    observe(norms, torch.tensor([[8.0, 0.0]]))
    read = norms.read(torch.Size((1, 4, 9)), [0, 1], None)  # type: ignore[arg-type]
    torch.testing.assert_close(read, torch.tensor([1.5, 0.5, 1.0, 1.0]).sqrt())
    assert norms.read(torch.Size((4, 9)), [0], None) is None  # type: ignore[arg-type]
    assert norms.read(torch.Size((1, 4, 9)), [1], None) is None  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("norms", ["running", "cache", "activation"])
@pytest.mark.parametrize("residual_rank", [0, 2])
def test_resumed_state_follows_the_model_to_the_gpu(norms: str, residual_rank: int) -> None:
    ids = torch.arange(NUM_SAMPLES)
    model, session = converted(norms=norms, residual_rank=residual_rank)
    model(**TINY.batch(), sample_id=ids).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    other = TINY.build().cuda()
    resumed = lt.apply(other, lt.WTACRS(min_rows=2, norms=norms, residual_rank=residual_rank))
    resumed.load_state_dict(state)
    batch = {k: v.cuda() for k, v in TINY.batch().items()}
    for _ in range(3):
        other(**batch, sample_id=ids.cuda()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters() if p.grad is not None)
