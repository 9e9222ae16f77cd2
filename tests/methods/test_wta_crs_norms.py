"""Running norms: what they remember, what they refuse, and that no guess biases a gradient."""

from typing import Any

import pytest
import torch
from models import MODELS
from single import Single, classifier_like
from stats import mean_check
from torch import Tensor, nn

import leantune as lt
from leantune.errors import ConfigError
from leantune.methods.wta_crs.norms import RunningNorms

TINY = MODELS["bert"]


def converted(**options: Any) -> tuple[nn.Module, lt.Session]:
    model = TINY.build()
    return model, lt.apply(model, lt.WTACRS(min_rows=2, **options))


def draws(model: Single, x: Tensor, grad_output: Tensor, num_draws: int) -> Tensor:
    out = []
    for _ in range(num_draws):
        model.zero_grad()
        model(x).backward(grad_output)
        assert model.layer.weight.grad is not None
        out.append(model.layer.weight.grad.clone())
    return torch.stack(out).double()


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_guess_leaves_no_bias(is_stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad_output = classifier_like()
    model = Single()
    # All of the past and nothing of the present: the guess stays what it was.
    monkeypatch.setattr("leantune.methods.wta_crs.conversion._DECAY", 0.99)
    lt.apply(model, lt.WTACRS(min_rows=2))
    if is_stale:
        draws(model, x, grad_output.flip(1) + 0.01, 5)
    got = draws(model, x, grad_output, 300).numpy()
    wanted = (grad_output.double().view(-1, 5).t() @ x.double().view(-1, 6)).numpy()
    assert mean_check(got, wanted, resolution=1e-5).ok
    assert not mean_check(got * 0.5, wanted, resolution=1e-5).ok


def test_known_norms_lower_the_variance() -> None:
    x, grad_output = classifier_like()
    variance = {}
    for norms in ("activation", "running"):
        model = Single()
        lt.apply(model, lt.WTACRS(norms=norms, min_rows=2))
        variance[norms] = float(draws(model, x, grad_output, 200)[40:].var(0).sum())
    assert variance["running"] < 0.3 * variance["activation"]


def test_state_makes_the_round_trip_and_the_run_goes_on() -> None:
    runs = []
    for is_resumed in (False, True):
        model, session = converted()
        model(**TINY.batch()).loss.backward()
        if is_resumed:
            state = {k: v.clone() for k, v in session.state_dict().items()}
            # Of two blocks the linears that draw, by name: key and value read the query's sample.
            assert sum(k.startswith("0.wta_crs/norms/bert.encoder.layer.") for k in state) == 8
            model, session = converted()
            session.load_state_dict(state)
        model.zero_grad()
        model(**TINY.batch(1)).loss.backward()
        runs.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    # The control: without the state the second step draws otherwise.
    model, session = converted()
    model(**TINY.batch(1)).loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], grads, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_state_that_is_not_finite_is_refused(bad: float) -> None:
    model, session = converted()
    model(**TINY.batch()).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    state[next(k for k in state if "norms/" in k)].view(-1)[0] = bad
    with pytest.raises(ConfigError, match=r"norms.* must be a row of finite .* nan or inf"):
        converted()[1].load_state_dict(state)


def test_state_of_another_model_is_refused() -> None:
    model, session = converted()
    model(**TINY.batch()).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    first = next(k for k in state if "norms/" in k)
    state[first.rpartition("/")[0] + "/nonsense"] = state.pop(first)
    with pytest.raises(ConfigError, match="must belong to this model's linears, got 'nonsense'"):
        session.load_state_dict(state)
    # Nor does a session without running norms take any.
    with pytest.raises(ConfigError, match="state must hold what this recipe keeps"):
        converted(norms="activation")[1].load_state_dict(state)


CPU = torch.device("cpu")


def running(*names: str, decay: float = 0.5) -> RunningNorms:
    return RunningNorms(names, decay, [CPU] * len(names))


def update(norms: RunningNorms, squares: Tensor, mask: Tensor | None = None) -> None:
    shape = torch.Size((*squares.shape, 3))
    norms.expect(0, shape, CPU)
    real = None if mask is None else mask.flatten()
    norms.update(0, squares.sqrt().flatten(), real, shape, None)


def guess(norms: RunningNorms, shape: tuple[int, ...]) -> Tensor:
    found = norms.predict(torch.Size((*shape, 9)), [0])
    assert found is not None
    return found.square()


def test_running_mean_is_relative_and_by_position() -> None:
    norms = running("a")
    update(norms, torch.tensor([[4.0, 0.0], [12.0, 0.0]]))
    # The batch's mean square is 4: relative squares (2, 0), half way from (1, 1).
    torch.testing.assert_close(norms.state_dict()["a"].square(), torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(guess(norms, (3, 2)), torch.tensor([1.5, 0.5]))


def test_running_mean_skips_padding_overflow_and_silence() -> None:
    norms = running("a")
    mask = torch.tensor([[True, False], [True, False]])
    update(norms, torch.tensor([[4.0, 100.0], [4.0, 100.0]]), mask)
    torch.testing.assert_close(guess(norms, (1, 2)), torch.ones(2))
    for bad in (float("nan"), float("inf")):
        update(norms, torch.tensor([[bad, 1.0]]))
    update(norms, torch.zeros(1, 2))
    torch.testing.assert_close(guess(norms, (1, 2)), torch.ones(2))


def test_positions_not_met_yet_count_as_average() -> None:
    norms = running("a", "b")
    update(norms, torch.tensor([[8.0, 0.0]]))
    torch.testing.assert_close(guess(norms, (1, 4)), torch.tensor([1.5, 0.5, 1.0, 1.0]))
    # Also beyond the room that there is.
    torch.testing.assert_close(guess(norms, (1, 5000))[2:], torch.ones(4998))
    # Without positions, or without a step yet, there is no guess.
    assert norms.predict(torch.Size((4, 9)), [0]) is None
    assert norms.predict(torch.Size((1, 4, 9)), [1]) is None


def test_readers_of_one_sample_add_to_one_guess() -> None:
    norms = running("a", decay=0.5)
    update(norms, torch.tensor([[4.0, 0.0]]))
    update(norms, torch.tensor([[1.0, 3.0]]) * 1e6)
    # Each relative to its own mean, (2, 0) and (0.5, 1.5), so that none drowns the others.
    torch.testing.assert_close(guess(norms, (1, 2)), torch.tensor([1.0, 1.0]))


def test_few_steps_are_looked_at_after_the_first() -> None:
    model, session = converted()
    seen = []
    for step in range(40):
        before = {k: v.clone() for k, v in session.state_dict().items() if "norms/" in k}
        model(**TINY.batch(step)).loss.backward()
        after = {k: v for k, v in session.state_dict().items() if "norms/" in k}
        seen.append(any(not torch.equal(after[k], before.get(k, after[k][:0])) for k in after))
        session.on_step()
    assert seen == [step < 16 or step % 8 == 0 for step in range(40)]


@pytest.mark.gpu
@pytest.mark.parametrize("norms", ["running", "activation"])
def test_resumed_state_follows_the_model_to_the_gpu(norms: str) -> None:
    model, session = converted(norms=norms)
    model(**TINY.batch()).loss.backward()
    other = TINY.build().cuda()
    resumed = lt.apply(other, lt.WTACRS(min_rows=2, norms=norms))
    resumed.load_state_dict({k: v.clone() for k, v in session.state_dict().items()})
    batch = {k: v.cuda() for k, v in TINY.batch().items()}
    for _ in range(3):
        other(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters() if p.grad is not None)


@pytest.mark.gpu
def test_norms_follow_a_model_that_moves_after_its_first_steps() -> None:
    model, _ = converted()
    model(**TINY.batch()).loss.backward()
    model.zero_grad()
    model.cuda()
    model(**{k: v.cuda() for k, v in TINY.batch().items()}).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
