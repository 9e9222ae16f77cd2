"""Row masks: trusted where gradients showed that they hold, checked ever after, never assumed."""

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from models import MODELS
from single import samples
from stats import mean_check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import leantune as lt
from leantune.errors import ConfigError, UnsupportedError
from leantune.ops.backend import LateCopy

D, SHAPE = 6, (4, 10, 6)
LENGTHS = (10, 6, 4, 8)
PADDED = (torch.arange(10) < torch.tensor(LENGTHS)[:, None]).long()
WHOLE = torch.ones_like(PADDED)
NAMES = "attention_mask", "decoder_attention_mask"


class Net(nn.Module):
    """Two linears that read one tensor; a row of their output counts where its flag is set."""

    def __init__(self, reads_apart: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 5), nn.Linear(D, 5)
        self.reads_apart = reads_apart

    def forward(
        self, x: Tensor, first: Tensor, second: Tensor | None = None, **masks: Tensor
    ) -> Tensor:
        h = x + 0.0
        y = self.first(h) * first[..., None]
        if second is not None:
            y = y + self.second(h + 0.0 if self.reads_apart else h) * second[..., None]
        return y.square().sum()


def converted(reads_apart: bool = False, **options: Any) -> tuple[Net, lt.Session]:
    torch.manual_seed(1)
    model = Net(reads_apart)
    return model, lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}))


def step(model: nn.Module, *flags: Tensor, **masks: Tensor) -> list[Tensor]:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 0.3
    model.zero_grad()
    model(x, *flags, **masks).backward()
    return [p.grad.clone() for p in model.parameters() if p.ndim == 2 and p.grad is not None]


def verdicts(session: lt.Session) -> list[list[int]]:
    """Return for each linear and mask field 1 where it is trusted, -1 where it never will be."""
    return of_known(session.state_dict()["0.wta_crs/masks"])


def of_known(known: Tensor) -> list[list[int]]:
    is_broken, holds = known.any(2).unbind(-1)
    return torch.where(is_broken, -1, holds.int()).tolist()


def is_unbiased(model: nn.Module, *flags: Tensor, **masks: Tensor) -> bool:
    """Tell whether the weight gradients are the exact ones in the mean, and that this can fail."""
    with model._leantune_session.exact():
        wanted = torch.stack(step(model, *flags, **masks)).double().numpy()
    grads = [torch.stack(step(model, *flags, **masks)) for _ in range(150)]
    drawn = torch.stack(grads).double().numpy()
    noise = 1e-4 * abs(wanted).max()
    assert not mean_check(drawn * 0.5, wanted, resolution=noise).ok
    return mean_check(drawn, wanted, resolution=noise).ok


@pytest.mark.parametrize("options", [{}, {"norms": "activation"}], ids=str)
@pytest.mark.parametrize("field", NAMES)
def test_a_mask_that_held_is_trusted(options: dict[str, Any], field: str) -> None:
    model, session = converted(**options)
    assert verdicts(session) == [[0, 0], [0, 0]]
    step(model, PADDED, PADDED, **{field: PADDED})
    assert verdicts(session) == [[int(name == field) for name in NAMES]] * 2
    assert is_unbiased(model, PADDED, PADDED, **{field: PADDED})


def test_trust_lowers_the_variance() -> None:
    variance = []
    for mask in ({}, {"attention_mask": PADDED}):
        model, _ = converted(norms="activation")
        grads = [step(model, PADDED, PADDED, **mask)[0] for _ in range(100)]
        variance.append(float(torch.stack(grads[1:]).var(0).sum()))
    assert variance[1] < 0.8 * variance[0]


@pytest.mark.parametrize(
    ("flags", "mask"),
    [
        (WHOLE, WHOLE),  # nothing is masked
        (WHOLE * 0, PADDED),  # nothing has a gradient, as before LoRA's second factor has moved
        (WHOLE, PADDED),  # padding counts
        (WHOLE, 1 - PADDED),  # 1 means padding
    ],
)
def test_what_shows_nothing_confers_no_trust(flags: Tensor, mask: Tensor) -> None:
    model, session = converted()
    step(model, flags, flags, attention_mask=mask)
    assert all(verdict[0] <= 0 for verdict in verdicts(session))
    # So that a loss which counts padding stays unbiased, and is no error.
    assert is_unbiased(model, WHOLE, WHOLE, attention_mask=PADDED)
    assert all(verdict[0] == -1 for verdict in verdicts(session))


@pytest.mark.parametrize("reads_apart", [False, True])
def test_a_sample_is_masked_only_if_every_reader_allows_it(reads_apart: bool) -> None:
    """A query has no gradient on padding, a key that reads the same tensor has."""
    model, session = converted(reads_apart)
    step(model, PADDED, WHOLE, attention_mask=PADDED)
    assert [verdict[0] for verdict in verdicts(session)] == [1, -1]
    drawn = samples(lambda: model(torch.randn(SHAPE), PADDED, WHOLE, attention_mask=PADDED))
    assert len(drawn) == 1 + reads_apart
    assert is_unbiased(model, PADDED, WHOLE, attention_mask=PADDED)


def test_a_reader_that_comes_later_draws_for_itself() -> None:
    model, session = converted()
    for _ in range(3):
        step(model, PADDED, attention_mask=PADDED)
    assert [verdict[0] for verdict in verdicts(session)] == [1, 0]
    # The second linear, seen for the first time, has a gradient on padding: no bias, no error.
    first = step(model, PADDED, WHOLE, attention_mask=PADDED)
    assert len(first) == 2
    assert is_unbiased(model, PADDED, WHOLE, attention_mask=PADDED)
    assert is_unbiased(model, PADDED, attention_mask=PADDED)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Mock]:
    """Read a CPU as if it were a GPU, and return the events that are recorded."""
    events: list[Mock] = []

    def record() -> Mock:
        events.append(Mock())
        return events[-1]

    monkeypatch.setattr(LateCopy, "lags", staticmethod(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock(record_event=record))
    return events


def next_forward(model: nn.Module, session: lt.Session) -> None:
    model(torch.zeros(SHAPE), WHOLE)


def on_step(model: nn.Module, session: lt.Session) -> None:
    session.on_step()


def state(model: nn.Module, session: lt.Session) -> None:
    session.state_dict()


@pytest.mark.parametrize("norms", ["running", "activation"])
@pytest.mark.parametrize("notice", [next_forward, on_step, state])
def test_a_loss_that_counts_what_was_left_out_is_refused(notice, norms: str) -> None:
    model, session = converted(norms=norms)
    for _ in range(2):
        step(model, PADDED, PADDED, attention_mask=PADDED)
    step(model, WHOLE, PADDED, attention_mask=PADDED)
    match = r"attention_mask must be 0 only on rows .* at first, which .* -100 .* draw_at='backward"
    with pytest.raises(UnsupportedError, match=match):
        notice(model, session)
    # Said once; from here on the mask is not trusted, and nothing is biased.
    assert is_unbiased(model, WHOLE, PADDED, attention_mask=PADDED)


@pytest.mark.parametrize("has_on_step", [False, True])
def test_a_gpu_is_read_one_step_later(has_on_step: bool, late: list[Mock]) -> None:
    """So that nobody waits for it: trust and refusal come one forward later than on a CPU."""
    model, session = converted(norms="activation")
    trusted = model.first.rows._masks._trusted

    def train(*flags: Tensor) -> bool:
        step(model, *flags, attention_mask=PADDED)
        if has_on_step:
            session.on_step()
        return model.first.rows._masks._trusted[0][0]

    # Shown by the first backward, read by the third forward.
    assert [train(PADDED, PADDED) for _ in range(3)] == [False, has_on_step, True]
    assert trusted == [[False, False]] * 2
    train(WHOLE, PADDED)
    if not has_on_step:
        train(PADDED, PADDED)
    with pytest.raises(UnsupportedError, match="at first, which biased"):
        train(PADDED, PADDED)
    assert not train(PADDED, PADDED)
    # Only what an earlier call began was waited for.
    waited = [event.synchronize.call_count for event in late]
    assert waited == sorted(waited, reverse=True) and 0 < sum(waited) < len(waited)


@pytest.mark.gpu
def test_no_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().cuda()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    mask = PADDED.cuda()
    x = torch.randn(SHAPE).cuda()
    for _ in range(2):
        model(x, mask, mask, attention_mask=mask).backward()
        session.on_step()
    masks = model.first.rows._masks
    monkeypatch.setattr(masks._runtime, "is_in_forward", True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks.begin()
        session.on_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert masks._trusted == [[True, False]] * 2


def test_what_is_saved_is_exact_where_reading_lags(late: list[Mock]) -> None:
    model, session = converted()
    for _ in range(2):
        step(model, PADDED, PADDED, attention_mask=PADDED)
    assert verdicts(session) == [[1, 0]] * 2
    fresh = lt.apply(Net(), lt.WTACRS(min_rows=2)).state_dict()
    # What was begun before a load is of the run before it.
    session.load_state_dict(fresh)
    step(model, 0 * PADDED, 0 * PADDED, attention_mask=PADDED)
    assert verdicts(session) == [[0, 0]] * 2
    step(model, PADDED, WHOLE, attention_mask=PADDED)
    model(torch.zeros(SHAPE), PADDED, attention_mask=PADDED)
    twin = copy.deepcopy(model)
    assert model.first.rows._masks._late["begin"]._begun is not None
    assert twin.first.rows._masks._late["begin"]._begun is None  # an event has no copy
    assert verdicts(twin._leantune_session) == [[1, 0], [-1, 0]]


def test_the_loss_that_counts_padding_is_named_in_a_transformer() -> None:
    model = MODELS["bert"].build()
    session = lt.apply(model, lt.WTACRS(min_rows=2))
    batch = MODELS["bert"].batch()
    for _ in range(2):
        model(**batch).loss.backward()
    session.on_step()
    batch.pop("labels")
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    hidden.square().sum().backward()
    with pytest.raises(UnsupportedError, match=r"layer\.\d\.\S+, \S+, \S+ and \d+ more, which"):
        session.on_step()


def test_what_overflowed_says_nothing() -> None:
    model, session = converted()
    for bad in (float("inf"), float("nan")):
        step(model, PADDED * torch.tensor(bad).nan_to_num(posinf=1e30), attention_mask=PADDED)
        flags = PADDED.float()
        flags[0, 0] = bad
        step(model, flags + (1 - PADDED) * bad, attention_mask=PADDED)
    assert all(verdict[0] >= 0 for verdict in verdicts(session))
    step(model, PADDED, PADDED, attention_mask=PADDED)
    assert [verdict[0] for verdict in verdicts(session)] == [1, 1]


@pytest.mark.parametrize("estimator", ["systematic", "wta", "crs", "topk"])
def test_a_mask_of_zeros_alone_is_no_case_of_its_own(estimator: str) -> None:
    """Without a gradient it is right; with one it shows that it cannot be trusted, as any other."""
    model, session = converted(estimator=estimator)
    for flags in (PADDED, WHOLE * 0):
        step(model, PADDED, PADDED, attention_mask=PADDED)
        grads = step(model, flags * 0, flags * 0, attention_mask=WHOLE * 0)
        assert not any(grad.any() for grad in grads)
    assert [verdict[0] for verdict in verdicts(session)] == [1, 1]
    step(model, WHOLE, WHOLE, attention_mask=WHOLE * 0)
    with pytest.raises(UnsupportedError, match="attention_mask must be 0 only on rows without"):
        session.on_step()


def test_masks_of_one_shape_are_judged_apart() -> None:
    model, session = converted(reads_apart=True)
    other = PADDED.flip(1)
    masks = {"attention_mask": PADDED, "decoder_attention_mask": other}
    step(model, PADDED, other, **masks)
    assert verdicts(session) == [[1, -1], [-1, 1]]
    assert is_unbiased(model, PADDED, other, **masks)


def test_masks_of_four_dimensions_and_of_other_shapes_are_no_candidates() -> None:
    model, session = converted()
    step(model, PADDED, PADDED, attention_mask=PADDED[:, None, None], other=PADDED)
    step(model, PADDED, PADDED, decoder_attention_mask=PADDED[:, :-1])
    assert verdicts(session) == [[0, 0], [0, 0]]


def test_gradients_may_accumulate_over_forwards_and_evaluations_in_between() -> None:
    model, session = converted()
    x = torch.randn(SHAPE)
    losses = [model(x, PADDED, PADDED, attention_mask=m) for m in (PADDED, WHOLE, PADDED)]
    model.eval()
    model(x, WHOLE, WHOLE, attention_mask=WHOLE)
    model.train()
    sum(losses).backward()
    assert [verdict[0] for verdict in verdicts(session)] == [1, 1]
    # Two batches of other padding before one backward: each is checked by its own.
    rolled = PADDED.roll(1, 0)
    masks = (PADDED, rolled)
    sum(model(x, m, m, attention_mask=m) for m in masks).backward()
    session.on_step()
    assert [verdict[0] for verdict in verdicts(session)] == [1, 1]


class Recomputed(Net):
    def forward(self, x: Tensor, first: Tensor, **masks: Tensor) -> Tensor:
        y = checkpoint(self.first, x + 0.0, use_reentrant=False)
        return (y * first[..., None]).square().sum()


def test_a_recomputed_block_uses_no_mask_of_a_later_batch() -> None:
    torch.manual_seed(1)
    model = Recomputed()
    session = lt.apply(model, lt.WTACRS(min_rows=2, draw_at="forward"))
    x = torch.randn(SHAPE)
    left = (torch.arange(10) < 5).long().expand(4, 10)
    model(x, left, attention_mask=left).backward()
    assert verdicts(session) == [[1, 0], [0, 0]]
    model.zero_grad()
    # The second batch has no gradient, and its mask leaves out all rows of the first that have one.
    right = 1 - left
    losses = [model(x, f, attention_mask=m) for f, m in ((left, left), (right * 0, right))]
    sum(losses).backward()
    assert model.first.weight.grad.any()


def test_trust_is_part_of_the_state() -> None:
    runs = []
    for kind in ("whole", "resumed", "without masks"):
        model, session = converted(reads_apart=True, norms="activation")
        step(model, PADDED, WHOLE, attention_mask=PADDED)
        if kind != "whole":
            state = {k: v.clone() for k, v in session.state_dict().items()}
            if kind == "without masks":
                state.pop("0.wta_crs/masks")
            model, session = converted(reads_apart=True, norms="activation")
            session.load_state_dict(state)
        runs.append(
            [g for _ in range(2) for g in step(model, PADDED, WHOLE, attention_mask=PADDED)]
        )
    whole, resumed, without = runs
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, without, strict=True))


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2, 2, 2).bool(), torch.zeros(2, 2, 2, 2)])
def test_trust_of_another_model_is_refused(wrong: Tensor) -> None:
    _, session = converted()
    with pytest.raises(ConfigError, match=r"masks must be bool of shape \(2, 2, 2, 2\), got"):
        session.load_state_dict({**session.state_dict(), "0.wta_crs/masks": wrong})


def test_two_configs_learn_apart() -> None:
    torch.manual_seed(1)
    model = Net()
    session = lt.apply(
        model, lt.WTACRS(min_rows=2, sites=["first"]), lt.WTACRS(min_rows=2, sites=["second"])
    )
    step(model, PADDED, WHOLE, attention_mask=PADDED)
    found = session.state_dict()
    assert of_known(found["0.wta_crs/masks"]) == [[1, 0]]
    assert of_known(found["1.wta_crs/masks"]) == [[-1, 0]]
    assert found["0.wta_crs/readers"].tolist() == found["1.wta_crs/readers"].tolist() == [[0, 0]]
