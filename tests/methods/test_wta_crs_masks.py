"""Row masks: trusted where gradients showed that they hold, checked ever after, never assumed."""

from typing import Any

import pytest
import torch
from models import MODELS
from stats import mean_check
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import leantune as lt
from leantune.errors import ConfigError, UnsupportedError

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
    """Return one verdict for each linear and mask field."""
    return session.state_dict()["0.wta_crs/masks"].tolist()


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


def test_a_mask_of_zeros_alone_is_refused() -> None:
    model, _ = converted()
    match = "attention_mask must mark at least one row as real, got zeros alone"
    with pytest.raises(ConfigError, match=match):
        step(model, WHOLE, WHOLE, attention_mask=PADDED * 0)
    assert is_unbiased(model, WHOLE, WHOLE, attention_mask=PADDED)
    # Rows that are drawn in backward ask for no mask.
    step(converted(draw_at="backward")[0], WHOLE, WHOLE, attention_mask=PADDED * 0)


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
    rolled = PADDED.roll(1, 0)
    x = torch.randn(SHAPE) + 0.3
    grads = []
    for _ in range(150):
        model.zero_grad()
        sum(model(x, m, attention_mask=m) for m in (PADDED, rolled)).backward()
        grads.append(model.first.weight.grad.clone())
    with session.exact():
        model.zero_grad()
        sum(model(x, m, attention_mask=m) for m in (PADDED, rolled)).backward()
    wanted = model.first.weight.grad.double().numpy()
    drawn = torch.stack(grads).double().numpy()
    assert mean_check(drawn, wanted, resolution=1e-4 * abs(wanted).max()).ok


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


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2, 2), torch.full((2, 2), 2).char()]
)
def test_verdicts_of_another_model_are_refused(wrong: Tensor) -> None:
    _, session = converted()
    with pytest.raises(ConfigError, match=r"masks must be verdicts .* of shape \(2, 2\), got"):
        session.load_state_dict({**session.state_dict(), "0.wta_crs/masks": wrong})


def test_two_configs_learn_apart() -> None:
    torch.manual_seed(1)
    model = Net()
    session = lt.apply(
        model, lt.WTACRS(min_rows=2, sites=["first"]), lt.WTACRS(min_rows=2, sites=["second"])
    )
    step(model, PADDED, WHOLE, attention_mask=PADDED)
    found = session.state_dict()
    assert found["0.wta_crs/masks"].tolist() == [[1, 0]]
    assert found["1.wta_crs/masks"].tolist() == [[-1, 0]]
    assert found["0.wta_crs/readers"].tolist() == found["1.wta_crs/readers"].tolist() == [[0, 0]]
