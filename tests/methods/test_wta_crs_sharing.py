"""One sample for all who read one tensor: found by identity, dropped in time, noted, and saved."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import MODELS
from single import samples
from stats import mean_check
from torch import Tensor, nn

import leantune as lt
from leantune.errors import ConfigError

D, SHAPE = 6, (4, 10, 6)


class Parallel(nn.Module):
    """A block that no table names: attention and FFN read one normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.fc_in, self.other = (nn.Linear(D, D) for _ in range(3))
        self.branch = True

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0.0
        y = self.query(h) + self.fc_in(h)
        return y + self.other(h) if self.branch else y


def converted(**options) -> tuple[Parallel, lt.Session]:
    torch.manual_seed(1)
    model = Parallel()
    return model, lt.apply(model, lt.WTACRS(**{"min_rows": 2, **options}))


def data(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.3


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.ndim == 2 and p.grad is not None]


def readers(session: lt.Session) -> list[list[int]]:
    return session.state_dict()["0.wta_crs/readers"].tolist()


def test_readers_of_one_tensor_share_a_sample_without_being_named() -> None:
    model, session = converted()
    assert len(samples(lambda: model(data()))) == 1
    assert readers(session) == [[0, 0], [0, 1], [0, 2], [1, 1], [2, 2]]


def test_decoder_blocks_share_one_sample_of_the_encoders_output() -> None:
    model = MODELS["t5"].build()
    lt.apply(model, lt.WTACRS(min_rows=2, sites=["*EncDecAttention.k", "*EncDecAttention.v"]))
    assert len(samples(lambda: model(**MODELS["t5"].batch()))) == 1


def test_a_shared_sample_is_unbiased_for_each_reader_and_counts_all_their_norms() -> None:
    model, session = converted()
    x = data()
    grads = torch.stack([torch.stack(step(model, x)) for _ in range(150)]).double().numpy()
    with session.exact():
        wanted = torch.stack(step(model, x)).double().numpy()
    noise = 1e-4 * abs(wanted).max()
    assert mean_check(grads, wanted, resolution=noise).ok
    assert not mean_check(grads * 0.5, wanted, resolution=noise).ok


def test_branches_may_change_from_forward_to_forward() -> None:
    model, session = converted()
    x = data()
    for branch in (False, True, False, True):
        model.branch = branch
        assert all(torch.isfinite(grad).all() for grad in step(model, x))
    assert [0, 2] in readers(session)
    model.branch = False
    grads = torch.stack([torch.stack(step(model, x)) for _ in range(150)]).double().numpy()
    with session.exact():
        wanted = torch.stack(step(model, x)).double().numpy()
    assert mean_check(grads, wanted, resolution=1e-4 * abs(wanted).max()).ok


def test_configs_and_dtypes_never_share() -> None:
    torch.manual_seed(1)
    model = Parallel()
    lt.apply(
        model,
        lt.WTACRS(min_rows=2, sites=["query"]),
        lt.WTACRS(min_rows=2, keep_ratio=0.5, sites=["fc_in", "other"]),
    )
    assert sorted(len(rows) for rows, _ in samples(lambda: model(data()))) == [12, 20]
    model, _ = converted()

    def forward(x: Tensor) -> Tensor:
        h = x + 0.0
        y = model.query(h) + model.other(h)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return y + model.fc_in(h)

    model.forward = forward
    assert len(samples(lambda: model(data()))) == 2
    assert all(torch.isfinite(grad).all() for grad in step(model, data()))


def test_no_sample_outlives_its_tensor_or_the_forward() -> None:
    model, _ = converted()
    pool = model.query.rows._pool
    held: list[int] = []
    kept: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        held.append(len(pool._samples))
        kept.append(args[0])

    model.other.register_forward_hook(look)
    # The next forward draws anew, even from a tensor that lives on.
    assert len(samples(lambda: model(data()))) == 1
    assert held == [1] and not pool._samples
    # Outside the model's forward the tensor's own end is the sample's.
    h = data()
    model.query(h)
    rows = weakref.ref(pool.take(1, h, h.dtype).rows.rows)
    assert rows() is not None
    del h
    gc.collect()
    assert not pool._samples and rows() is None


def test_a_tensor_that_was_written_to_is_another_one() -> None:
    """Plain linears refuse this, for they hold the tensor; samples do not, and must be right."""
    model, session = converted()
    write = Tensor.mul_

    def forward(x: Tensor) -> Tensor:
        h = x + 0.0
        y = model.query(h)
        return y + model.fc_in(write(h, -2))

    model.forward = forward
    assert len(samples(lambda: model(data()))) == 2
    assert readers(session) == [[0, 0], [1, 1], [2, 2]]
    grads = torch.stack([torch.stack(step(model, data())) for _ in range(150)]).double().numpy()
    write = Tensor.mul
    with session.exact():
        wanted = torch.stack(step(model, data())).double().numpy()
    assert mean_check(grads, wanted, resolution=1e-4 * abs(wanted).max()).ok


def test_a_copy_of_the_model_shares_on_its_own() -> None:
    model, _ = converted()
    h = data()
    model.query(h)  # a sample lies in the pool
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        pool = twin.query.rows._pool
        assert pool is twin.fc_in.rows._pool and pool is not model.query.rows._pool
        assert not pool._samples and len(samples(lambda twin=twin: twin(data()))) == 1
    assert model.query.rows._pool._samples


def test_a_resumed_run_knows_who_reads_with_whom() -> None:
    runs = []
    for is_resumed in (False, True):
        model, session = converted()
        for seed in range(2):
            step(model, data(seed))
        if is_resumed:
            state = {k: v.clone() for k, v in session.state_dict().items()}
            model, session = converted()
            session.load_state_dict(state)
            known = readers(session)
            # The control: without the entry every linear reads alone.
            state.pop("0.wta_crs/readers")
            unknowing = converted()[1]
            unknowing.load_state_dict(state)
            assert len(readers(unknowing)) == 3 < len(known)
        runs.append([g for seed in range(2, 4) for g in step(model, data(seed))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("wrong", [torch.tensor([[0, 3]]), torch.tensor([0]), torch.zeros(1, 2)])
def test_readers_of_another_model_are_refused(wrong: Tensor) -> None:
    _, session = converted()
    with pytest.raises(ConfigError, match="readers must be pairs of this model's 3 linears, got"):
        session.load_state_dict({**session.state_dict(), "0.wta_crs/readers": wrong})


def test_a_sample_that_is_no_smaller_is_not_drawn() -> None:
    """Of narrow rows, numbers and weights take more than sampling spares."""
    for keep_ratio, is_sampled in ((0.7, True), (0.8, False)):
        model, _ = converted(keep_ratio=keep_ratio)
        assert bool(samples(lambda model=model: model(data()))) == is_sampled
        size = model.query.rows.nbytes(torch.Size(SHAPE), torch.float32)
        assert size == (int(40 * keep_ratio) * (24 + 8) if is_sampled else 40 * 24)
