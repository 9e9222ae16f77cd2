"""Cached norms: each sample's last visit guesses its next one, and no guess biases a gradient."""

from typing import Any

import pytest
import torch
from models import MODELS, NUM_SAMPLES
from single import Single, classifier_like
from stats import mean_check
from torch import Tensor, nn

import leantune as lt
from leantune.core.linear import ConvertedLinear
from leantune.errors import ConfigError, LeantuneError
from leantune.methods.wta_crs.cache import CachedNorms

TINY = MODELS["bert"]
IDS = torch.arange(NUM_SAMPLES)
BYTES = 2.0**-30


def converted(kind: str = "bert", **options: Any) -> tuple[nn.Module, lt.Session]:
    model = MODELS[kind].build()
    return model, lt.apply(model, lt.WTACRS(**{"min_rows": 2, "norms": "cache", **options}))


def cache(session: lt.Session) -> Tensor:
    """Return a copy of the norms on the host, (samples, linears, tokens)."""
    return session.state_dict()["0.wta_crs/norms/cache"].float().clone()


def linears(model: nn.Module) -> dict[str, ConvertedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ConvertedLinear)}


def true_norms(model: nn.Module, batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Run a step and return (b, t) norms of each linear's output gradient."""
    norms: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            out.register_hook(lambda g: norms.__setitem__(name, g.norm(dim=-1)))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in linears(model).items()]
    model.zero_grad()
    model(**batch, sample_id=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return norms


def check_rows(model: nn.Module, held: Tensor, ids: Tensor, norms: dict[str, Tensor]) -> None:
    for name, module in linears(model).items():
        rows = held[ids, module.rows._column]
        t = norms[name].shape[1]
        torch.testing.assert_close(rows[:, :t], norms[name], rtol=0.01, atol=1e-30)
        assert not rows[:, t:].any()


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_cache_holds_the_norms_of_the_last_visit(kind: str) -> None:
    model, session = converted(kind)
    ids = torch.tensor([7, 2, 19, 0])
    batch = MODELS[kind].batch
    norms = true_norms(model, batch(), ids)
    held = cache(session)
    assert held.shape == (20, len(linears(model)), 8)
    check_rows(model, held, ids, norms)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[ids] = False
    assert not held[untouched].any()
    # A second batch leaves the first alone; its own rows change on the next visit.
    other = torch.tensor([1, 3, 4, 5])
    norms = true_norms(model, batch(1), other)
    check_rows(model, cache(session), other, norms)
    assert torch.equal(cache(session)[ids], held[ids])
    norms = true_norms(model, batch(2), ids)
    check_rows(model, cache(session), ids, norms)
    assert not torch.equal(cache(session)[ids], held[ids])


def test_short_last_batch_and_changed_padding() -> None:
    model, session = converted()
    full = TINY.batch()
    true_norms(model, full, IDS)
    before = cache(session)
    short = {k: v[:2] if k == "labels" else v[:2, :5] for k, v in full.items()}
    ids = torch.tensor([1, 3])
    norms = true_norms(model, short, ids)
    held = cache(session)
    check_rows(model, held, ids, norms)
    assert torch.equal(held[[0, 2]], before[[0, 2]])
    # And longer again than what is known.
    long = {"input_ids": torch.randint(3, 60, (2, 12)), "labels": torch.tensor([0, 1])}
    norms = true_norms(model, long, ids)
    assert cache(session).shape[-1] == 12
    check_rows(model, cache(session), ids, norms)


class Reader(nn.Module):
    """Cached norms of linears "a" and "b", and a model that they read ids from."""

    def __init__(self, limit_gib: float = 1.0) -> None:
        super().__init__()
        self.norms = CachedNorms(["a", "b"], limit_gib)
        self.norms.install(self)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def visit(self, ids: Any, a: Tensor, b: Tensor) -> None:
        """Meet norms (samples, t) of both linears."""
        self(a, sample_id=torch.as_tensor(ids))
        for column, norms in enumerate((a, b)):
            shape = torch.Size((*norms.shape, 3))
            self.norms.update(column, norms.flatten(), None, shape, self.norms.ids)

    def guess(self, ids: Any, num_positions: int, columns: tuple[int, ...] = (0,)) -> Tensor:
        self(torch.zeros(len(ids), num_positions), sample_id=torch.as_tensor(ids))
        shape = torch.Size((len(ids), num_positions, 3))
        guess = self.norms.predict(shape, columns)
        assert guess is not None
        return guess.view(len(ids), num_positions)


def relative(norms: Tensor) -> Tensor:
    return norms / norms.square().mean().sqrt()


def test_norms_are_read_for_the_right_sample_in_any_order_and_length() -> None:
    reader = Reader()
    a, b = torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 0.5
    a, b = a.bfloat16().float(), b.bfloat16().float()
    reader.visit([5, 0, 2], a, b)
    torch.testing.assert_close(reader.guess([5, 0, 2], 4), relative(a))
    torch.testing.assert_close(reader.guess([2, 5, 0], 4), relative(a[[2, 0, 1]]))
    assert not torch.allclose(reader.guess([2, 5, 0], 4), relative(a)), "the control"
    torch.testing.assert_close(reader.guess([0, 2], 3), relative(a[1:, :3]))
    torch.testing.assert_close(reader.guess([0, 2], 3, (1,)), relative(b[1:, :3]))
    # Linears of one input add up, each relative to its own mean.
    both = (relative(a).square() + relative(b).square()).sqrt()
    torch.testing.assert_close(reader.guess([5, 0, 2], 4, (0, 1)), both)
    # What is longer than the last visit is known to have had no gradient there.
    longer = reader.guess([5, 0, 2], 6)
    assert not longer[:, 4:].any()
    torch.testing.assert_close(relative(longer[:, :4]), relative(a))


def test_a_later_visit_replaces_the_earlier_one() -> None:
    reader = Reader()
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 1.0]])
    reader.visit([0, 1], first, first)
    reader.visit([1], second, second)
    torch.testing.assert_close(
        reader.guess([0, 1], 2), relative(torch.tensor([[1.0, 2], [4.0, 1]]))
    )


def test_samples_not_seen_count_as_average() -> None:
    reader = Reader()
    assert torch.equal(reader.guess([3, 1], 4), torch.ones(2, 4))
    a = torch.tensor([[1.0, 3.0]])
    reader.visit([1], a, a)
    # The mean square is that of what is known: 5.
    wanted = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    wanted[1] /= 5**0.5
    torch.testing.assert_close(reader.guess([3, 1], 2), wanted)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_scale_of_the_loss_cancels(scale: float) -> None:
    """Squares of such norms are out of float32's range."""
    a = torch.tensor([[1.0, 3.0], [2.0, 0.5]])
    guesses = []
    for factor in (1.0, scale):
        reader = Reader()
        reader.visit([0, 1], a * factor, a * factor)
        guesses.append(reader.guess([0, 1], 2))
    assert torch.equal(*guesses)


def test_one_tensor_filled_anew_for_every_batch() -> None:
    """As a loader with pinned buffers does; and the same tensor again is another visit."""
    reader = Reader()
    ids = torch.tensor([0, 1])
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 1.0], [1.0, 1.0]])
    reader.visit(ids, first, first)
    reader.visit(ids, second, second)
    ids.fill_(9)
    torch.testing.assert_close(reader.guess([0, 1], 2), relative(second))


def test_a_batch_reads_the_host_once_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder and a decoder take turns, and what backward writes waits for the next batch."""
    reads: list[int] = []
    real = CachedNorms._reserve
    monkeypatch.setattr(
        CachedNorms, "_reserve", lambda self, n, t: (reads.append(t), real(self, n, t))[1]
    )
    reader = Reader()
    before = reader.guess([0, 1], 4)
    for t in (6, 4, 6):
        assert reader.norms.predict(torch.Size((2, t, 3)), [0]) is not None
    assert reads == [4, 6]
    reader.norms.update(0, torch.rand(8), None, torch.Size((2, 4, 3)), reader.norms.ids)
    again = reader.norms.predict(torch.Size((2, 4, 3)), [0])
    assert again is not None and torch.equal(again.view(2, 4), before)
    assert not torch.equal(reader.guess([0, 1], 4), before)


def test_inputs_without_a_row_for_each_sample_have_no_guess() -> None:
    reader = Reader()
    reader.guess([0, 1], 4)
    assert reader.norms.predict(torch.Size((2, 3)), [0]) is None
    assert reader.norms.predict(torch.Size((4, 2, 3)), [0]) is None
    reader.norms.update(0, torch.rand(2), None, torch.Size((2, 3)), reader.norms.ids)
    assert not reader.norms.state_dict()["cache"].any()


@pytest.mark.parametrize("seen", [(), (0, 1), (0, 1, 2, 3)])
def test_no_guess_biases_the_gradient(seen: tuple[int, ...]) -> None:
    x, grad_output = classifier_like()
    wanted = (grad_output.double().view(-1, 5).t() @ x.double().view(-1, 6)).numpy()
    is_unbiased = {}
    # The control: the largest rows alone.
    for estimator in ("systematic", "topk"):
        model = Single()
        session = lt.apply(model, lt.WTACRS(norms="cache", min_rows=2, estimator=estimator))
        if seen:
            # What was met then is not what is met now: stale norms leave no bias either.
            some = list(seen)
            old = grad_output[some].flip(1) + 0.01
            model(x[some], sample_id=torch.tensor(some)).backward(old)
        state = {k: v.clone() for k, v in session.state_dict().items()}
        draws = []
        for number in range(300):
            session.load_state_dict({**state, "counter": torch.tensor(100 + number)})
            model.zero_grad()
            model(x, sample_id=IDS).backward(grad_output)
            draws.append(model.layer.weight.grad.clone())
        samples = torch.stack(draws).double().numpy()
        is_unbiased[estimator] = mean_check(samples, wanted, resolution=1e-5).ok
    assert is_unbiased == {"systematic": True, "topk": False}


def test_known_norms_lower_the_variance() -> None:
    x, grad_output = classifier_like()
    variance = {}
    for norms in ("activation", "cache"):
        model = Single()
        session = lt.apply(model, lt.WTACRS(norms=norms, min_rows=2))
        ids = {"sample_id": IDS} if session.conversions[0].needs_sample_ids else {}
        draws = []
        for _ in range(200):
            model.zero_grad()
            model(x, **ids).backward(grad_output)
            draws.append(model.layer.weight.grad.clone())
        variance[norms] = float(torch.stack(draws[40:]).var(0).sum())
    assert variance["cache"] < 0.3 * variance["activation"]


def test_the_cache_grows_to_its_limit_and_keeps_what_it_holds() -> None:
    # 100 samples of 2 linears and 4 tokens.
    reader = Reader(100 * 16 * BYTES)
    values = torch.rand(4, 4)
    for start in (0, 40, 76):
        # The last step asks for a little more than there is: no room beyond the limit.
        reader.visit(torch.arange(start, start + 4), values + start, values)
    reader.visit([99], values[:1], values[:1])
    held = reader.norms.state_dict()["cache"].float()
    assert held.shape == (100, 2, 4)
    for start in (0, 40, 76):
        torch.testing.assert_close(
            held[start : start + 4, 0], values + start, rtol=0.01, atol=1e-30
        )
    assert not held[4:40].any() and not held[80:99].any()
    match = r"cache_gib must be at least 1\.5e-06 for 101 samples x 2 linears x 4 tokens .*running"
    with pytest.raises(ConfigError, match=match):
        reader.guess([100], 4)
    with pytest.raises(ConfigError, match="for 100 samples x 2 linears x 5 tokens"):
        reader.guess([0], 5)
    # Nothing is lost, and what fits goes on.
    assert torch.equal(reader.norms.state_dict()["cache"].float(), held)
    assert reader.guess([99], 4).shape == (1, 4)


def test_room_for_more_makes_way_for_longer_samples() -> None:
    reader = Reader(100 * 16 * BYTES)
    reader.visit(torch.arange(60), torch.ones(60, 4), torch.ones(60, 4))
    # There was room for 90; 60 of 6 tokens fit.
    reader.visit([0], torch.ones(1, 6), torch.ones(1, 6))
    held = reader.norms.state_dict()["cache"]
    assert held.shape == (60, 2, 6) and held[:, :, :4].all() and held[0].all()


def test_a_model_that_does_not_fit_is_told_so() -> None:
    model, _ = converted(cache_gib=1e-4)
    with pytest.raises(ConfigError, match=r"cache_gib must be at least 0\.18 for 1000000 samples"):
        model(**TINY.batch(), sample_id=torch.tensor([999_999, 1, 2, 3]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, r"an integer for each sample .*got None; .*add_column.*remove_unused_columns=False"),
        ([0, 1, 2, 3], "an integer for each sample"),
        (torch.arange(4.0), r"an integer for each sample .*got torch.float32 of shape \(4,\)"),
        (torch.ones(4, dtype=torch.bool), "an integer for each sample .*got torch.bool"),
        (torch.empty(0, dtype=torch.long), r"an integer .*got torch.int64 of shape \(0,\)"),
        (torch.tensor([0, -1, 2, 3]), "at least 0, got -1"),
        (torch.tensor([0, 1, 2, 1]), "distinct within a batch, got 1 repeats; drop the repeats"),
        (torch.arange(3), "one integer for each sample, got 3 for a batch of 4"),
    ],
)
def test_bad_sample_ids_are_refused(ids: Any, message: str) -> None:
    model, session = converted()
    given = {} if ids is None else {"sample_id": ids}
    with pytest.raises(ConfigError, match=f"WTACRS: sample_id must be {message}"):
        model(**TINY.batch(), **given)
    # The run may go on.
    model(**TINY.batch(), sample_id=IDS.int()[:, None]).loss.backward()
    assert cache(session).any()


def test_a_batch_that_is_not_trained_on_may_carry_ids_or_not() -> None:
    model, session = converted()
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    before = cache(session)
    bad = torch.tensor([5.0, -1.0])
    with torch.no_grad():
        wanted = model(**TINY.batch()).logits
        assert torch.equal(model(**TINY.batch(), sample_id=bad).logits, wanted)
    model.eval()
    assert torch.equal(model(**TINY.batch(), sample_id=bad).logits, wanted)
    assert torch.equal(model(**TINY.batch()).logits, wanted)
    assert torch.equal(cache(session), before)


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    def run(model: nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            order = torch.arange(8).roll(3 * step)[:NUM_SAMPLES]
            model(**TINY.batch(step), sample_id=order).loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
            model.zero_grad()

    whole, _ = converted()
    run(whole, 0, 6)
    ends = []
    for keeps_cache in (True, False):
        model, session = converted()
        run(model, 0, 3)
        state = {k: v.clone() for k, v in session.state_dict().items()}
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        model, session = converted()
        model.load_state_dict(weights)
        if not keeps_cache:
            state["0.wta_crs/norms/cache"].zero_()
        session.load_state_dict(state)
        run(model, 3, 6)
        ends.append(list(model.parameters()))
    wanted = list(whole.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ends[0], wanted, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ends[1], wanted, strict=True))


def test_a_session_that_has_seen_nothing_makes_the_round_trip() -> None:
    _, session = converted()
    assert cache(session).shape == (0, 12, 0)
    model, other = converted()
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    other.load_state_dict(session.state_dict())
    assert not cache(other).any()


@pytest.mark.parametrize("end", ["remove", "merge"])
def test_the_end_leaves_no_hook(end: str) -> None:
    model, session = converted()
    assert session.conversions[0].needs_sample_ids and model._forward_pre_hooks
    model(**TINY.batch(), sample_id=IDS)
    getattr(session, end)()
    assert not model._forward_pre_hooks and not linears(model)
    # What a batch carries reaches the model again.
    seen: list[dict[str, Any]] = []
    watch = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(**TINY.batch(), sample_id=IDS)
    watch.remove()
    assert "sample_id" in seen[0]


@pytest.mark.parametrize("options", [{"norms": "running"}, {"draw_at": "backward"}])
def test_no_ids_are_needed_where_no_norms_are_cached(options: dict[str, Any]) -> None:
    model, session = converted(**options)
    assert not session.conversions[0].needs_sample_ids
    model(**TINY.batch()).loss.backward()


def test_two_configs_read_one_batch() -> None:
    model = TINY.build()
    methods = [
        lt.WTACRS(sites=[f"*layer.{i}.*dense"], norms="cache", min_rows=2, keep_ratio=ratio)
        for i, ratio in enumerate((0.3, 0.5))
    ]
    session = lt.apply(model, *methods)
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    state = session.state_dict()
    assert state["0.wta_crs/norms/cache"].any() and state["1.wta_crs/norms/cache"].any()
    session.remove()
    assert not model._forward_pre_hooks


def test_checkpointed_blocks_draw_in_backward_and_need_no_norms() -> None:
    model, session = converted()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not cache(session).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_name_linear_and_sample(value: float) -> None:
    model, session = converted()
    ids = torch.tensor([4, 9, 6, 2])
    grad = torch.zeros(NUM_SAMPLES, 8, 16)
    grad[2, 0, 0] = value
    module = model.get_submodule("bert.encoder.layer.1.output.dense")
    handle = module.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: grad) and None
    )
    model(**TINY.batch(), sample_id=ids).loss.backward()
    handle.remove()
    match = r"layer\.\d\.\S+ must be finite, got nan or inf for sample_id 6; .*lower the learning"
    with pytest.raises(LeantuneError, match=match):
        model(**TINY.batch(1), sample_id=IDS)
    # Said once: the run may go on from there.
    model(**TINY.batch(1), sample_id=IDS).loss.backward()
    assert torch.isfinite(cache(session)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_that_is_not_finite_is_refused(value: float) -> None:
    model, session = converted()
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    state = {k: v.clone() for k, v in session.state_dict().items()}
    state["0.wta_crs/norms/cache"].view(-1)[0] = value
    with pytest.raises(ConfigError, match="cached norms must be finite, got nan or inf"):
        converted()[1].load_state_dict(state)


def test_state_of_another_model_or_recipe_is_refused() -> None:
    _, session = converted()
    state = session.state_dict()
    wrong = {**state, "0.wta_crs/norms/cache": torch.zeros(3, 5, 2, dtype=torch.bfloat16)}
    match = r"cached norms must have shape \(samples, 12, tokens\), got \(3, 5, 2\)"
    with pytest.raises(ConfigError, match=match):
        session.load_state_dict(wrong)
    model, running = converted(norms="running")
    model(**TINY.batch()).loss.backward()
    with pytest.raises(ConfigError, match=r"cached norms must have shape .* got \["):
        session.load_state_dict(running.state_dict())
    with pytest.raises(ConfigError, match="must belong to this model's linears, got 'cache'"):
        running.load_state_dict(state)


@pytest.mark.gpu
def test_resumed_state_follows_the_model_to_the_gpu() -> None:
    model, session = converted()
    model(**TINY.batch(), sample_id=IDS).loss.backward()
    other = TINY.build().cuda()
    resumed = lt.apply(other, lt.WTACRS(min_rows=2, norms="cache"))
    resumed.load_state_dict({k: v.clone() for k, v in session.state_dict().items()})
    batch = {k: v.cuda() for k, v in TINY.batch().items()}
    for ids in (IDS.cuda(), IDS):
        other(**batch, sample_id=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters() if p.grad is not None)
    assert cache(resumed).any()
