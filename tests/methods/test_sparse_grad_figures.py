"""The share of gradient energy by basis, on planted gradients, against the oracle."""

import numpy as np
import pytest
import torch
from oracles import sparse_grad as oracle
from torch import Tensor, nn

import leantune as lt
from leantune.core.registry import Figure
from leantune.errors import ConfigError
from leantune.methods.sparse_grad.conversion import conversions
from leantune.methods.sparse_grad.figures import figures

# torch's own warning about its own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

NUM_LAYERS, D_OUT, D_IN = 5, 24, 16
NUM_CALIBRATION, NUM_HELD_OUT = 12, 3
MIDDLE = NUM_LAYERS // 2
# 3 x 4 of 24 x 16: about 3 %, and a whole block.
NUM_ENTRIES = 12
LABELS = ["original", "one-sided", "right, shared", "right, per layer"]


class Planted(nn.Module):
    """Linears whose weight gradients are the batch, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(D_IN, D_OUT, bias=False) for _ in range(NUM_LAYERS))
        self.double()

    def forward(self, grads: Tensor) -> Tensor:
        eye = torch.eye(D_IN, dtype=torch.float64)
        terms = [m(eye).mul(g.mT).sum() for m, g in zip(self.up, grads, strict=True)]
        return torch.stack(terms).sum()


def planted() -> list[Tensor]:
    """Batches of (layer, d_out, d_in) float64: both spectra decay, along directions that the
    layers have in common up to a small turn of their own."""
    rng = np.random.default_rng(7)

    def directions(d: int) -> np.ndarray:
        common = np.linalg.qr(rng.normal(size=(d, d)))[0]
        turns = [np.linalg.qr(np.eye(d) + 0.05 * rng.normal(size=(d, d)))[0] for _ in range(5)]
        return np.stack([common @ turn for turn in turns])

    a, b = directions(D_OUT), directions(D_IN)
    out, inn = np.exp(-np.arange(D_OUT) / 3), np.exp(-np.arange(D_IN) / 3)
    shape = (NUM_CALIBRATION + NUM_HELD_OUT, NUM_LAYERS, D_OUT, D_IN)
    core = rng.normal(size=shape) * out[:, None] * inn
    return list(torch.from_numpy(a @ core @ b.transpose(0, 2, 1)))


def convert(**options) -> lt.Session:
    options = {"sites": "up.*", "num_entries": NUM_ENTRIES, **options}
    session = lt.apply(Planted(), lt.SparseGrad(**options))
    session.calibrate(planted()[:NUM_CALIBRATION])
    return session


def measure(session: lt.Session) -> Figure:
    batches = planted()
    (found,) = figures(session, batches[:NUM_CALIBRATION], batches[NUM_CALIBRATION:])
    return found


def expected() -> dict[str, float]:
    """The same from the formulas: singular vectors of stacks, full sorts."""
    grads = torch.stack(planted()).numpy()
    seen, held_out = grads[:NUM_CALIBRATION], grads[NUM_CALIBRATION:, MIDDLE]
    eye_out, eye_in = np.eye(D_OUT), np.eye(D_IN)
    shared = oracle.unfolding_bases(seen.reshape(-1, D_OUT, D_IN))
    pairs = (
        (eye_out, eye_in),
        (shared[0], eye_in),
        shared,
        oracle.unfolding_bases(seen[:, MIDDLE]),
    )
    return {
        label: float(
            np.mean([oracle.energy_share(oracle.rotate(g, *pair), NUM_ENTRIES) for g in held_out])
        )
        for label, pair in zip(LABELS, pairs, strict=True)
    }


def is_right_order(values: dict[str, float]) -> bool:
    original, one_sided, shared, own = (values[label] for label in LABELS)
    return 2 * original < one_sided and 1.2 * one_sided < shared and 1.02 * shared < own


def test_shares_of_the_middle_layer_are_the_oracles_and_in_the_right_order() -> None:
    found = measure(convert())
    wanted = expected()
    assert list(found.values) == LABELS
    assert found.values == pytest.approx(wanted, rel=1e-9)
    assert is_right_order(wanted), wanted
    assert "(3.1 %)" in found.note and "measured: 1," in found.note
    assert found.note.endswith("not seen in calibration: 3.")


@pytest.mark.parametrize("wrong", ["transposed", "random"])
def test_a_wrong_basis_on_the_input_side_shows(wrong: str) -> None:
    session = convert()
    right = measure(session).values
    random = torch.linalg.qr(torch.randn(D_IN, D_IN, dtype=torch.float64))[0]
    (change,) = conversions(session)
    for bases in {id(layer.bases): layer.bases for layer in change.layers}.values():
        assert bases is not None
        bases.q_in = bases.q_in.mT.contiguous() if wrong == "transposed" else random
    found = measure(session).values
    assert found["right, shared"] < 0.9 * right["right, shared"]
    assert not is_right_order(found)
    others = [label for label in LABELS if label != "right, shared"]
    assert [found[label] for label in others] == [right[label] for label in others]


@pytest.mark.parametrize(
    "options",
    [{"selection": "block"}, {"selection": "block", "num_outliers": 6}, {"selection": "step"}],
    ids=str,
)
def test_what_a_selection_keeps_of_the_bases_makes_no_difference(options: dict) -> None:
    wanted = measure(convert()).values
    assert measure(convert(**options)).values == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("selection", ["fixed", "block"])
def test_bases_of_each_layer_have_no_shared_bar(selection: str) -> None:
    found = measure(convert(basis="layer", selection=selection)).values
    shared = measure(convert()).values
    assert list(found) == [label for label in LABELS if label != "right, shared"]
    assert found["right, per layer"] == pytest.approx(shared["right, per layer"], rel=1e-9)
    # One-sided is by the layer's own basis, too.
    assert shared["one-sided"] < found["one-sided"] < found["right, per layer"]


@pytest.mark.parametrize("selection", ["fixed", "refreshed", "block", "step"])
def test_measuring_leaves_no_trace(selection: str) -> None:
    session, other = convert(selection=selection), convert(selection=selection)
    batches = planted()
    for one in (session, other):
        one.model.load_state_dict(other.model.state_dict())
        one.model(batches[0]).backward()
    grads = [p.grad for p in session.model.parameters()]
    stream = torch.random.get_rng_state()
    measure(session)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(p.grad is g for p, g in zip(session.model.parameters(), grads, strict=True))
    states = zip(session.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)
    for one in (session, other):
        optimizer = one.optimizer(torch.optim.AdamW, lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
        one.model(batches[1]).backward()
        optimizer.step()
    weights = (one.model.state_dict() for one in (session, other))
    for (name, x), (_, y) in zip(*(w.items() for w in weights), strict=True):
        assert torch.equal(x, y), name


def test_gradients_without_a_share_count_for_nothing() -> None:
    session, batches = convert(), planted()
    seen, held_out = batches[:NUM_CALIBRATION], batches[NUM_CALIBRATION:]
    (found,) = figures(session, seen, [*held_out, torch.zeros_like(held_out[0])])
    assert found.values == measure(session).values
    assert not figures(session, seen, [torch.zeros_like(held_out[0])])


def test_two_configs_are_one_figure() -> None:
    parts = [{"sites": "up.[0-2]"}, {"sites": "up.[34]", "num_entries": 2 * NUM_ENTRIES}]
    configs = [lt.SparseGrad(**{"num_entries": NUM_ENTRIES, **part}) for part in parts]
    session = lt.apply(Planted(), *configs)
    session.calibrate(planted()[:NUM_CALIBRATION])
    found = measure(session)
    alone = [measure(convert(**part)).values for part in parts]
    assert found.values == pytest.approx({k: (alone[0][k] + alone[1][k]) / 2 for k in LABELS})
    assert "measured: 2," in found.note and "(3.1 to 6.2 %)" in found.note


def test_without_calibration_there_are_no_bases_to_show() -> None:
    session = lt.apply(Planted(), lt.SparseGrad(sites="up.*"))
    with pytest.raises(ConfigError, match="bases must be calibrated"):
        figures(session, planted(), planted())
