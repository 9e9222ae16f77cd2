"""Bases, rotations and selections against float64 oracles, with controls that must fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sparse_grad as oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leantune.ops.entries import (
    accumulate_grams,
    basis,
    block_shape,
    num_entries,
    rotate,
    top_entries,
)

Array = oracle.Array
D_OUT, D_IN = 24, 16
SHAPE = (D_OUT, D_IN)
EXACT = 1e-12


def make_orthogonal(d: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def make_planted(num_steps: int = 40, d_out: int = 48, d_in: int = 32) -> Array:
    """(num_steps, d_out, d_in): ``A R_s B^T``, both spectra decaying along known directions."""
    rng = np.random.default_rng(5)
    a = make_orthogonal(d_out, 1) * np.exp(-np.arange(d_out) / 2.0)
    b = make_orthogonal(d_in, 2) * np.exp(-np.arange(d_in) / 2.0)
    return np.stack([a @ rng.normal(size=(d_out, d_in)) @ b.T for _ in range(num_steps)])


def make_grams(stack: Array, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    gram_out, gram_in = (torch.zeros(d, d, dtype=dtype) for d in stack.shape[1:])
    for grad in torch.from_numpy(stack):
        accumulate_grams(gram_out, gram_in, grad)
    return gram_out, gram_in


def make_bases(d_out: int = D_OUT, d_in: int = D_IN) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(make_orthogonal(d_out, 3)), torch.from_numpy(make_orthogonal(d_in, 4))


def relative_error(actual: Tensor, expected: Array) -> float:
    assert tuple(actual.shape) == expected.shape
    return float(np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected))


def orthogonality_error(q: Tensor) -> float:
    return float((q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max())


# Bases


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("num_steps", [1, 12])
def test_bases_are_complete_and_orthonormal(
    dtype: torch.dtype, bound: float, num_steps: int
) -> None:
    # One (128, 16) gradient has rank 16: the other 112 directions complete the basis.
    stack = np.random.default_rng(0).normal(size=(num_steps, 128, 16))
    for gram in make_grams(stack, dtype=dtype):
        q = basis(gram)
        assert q.dtype == dtype and q.shape == gram.shape
        assert orthogonality_error(q) < bound
        eigenvalues = torch.linalg.vecdot(q, gram @ q, dim=0)
        assert (eigenvalues.diff() <= 1e-5 * eigenvalues[0]).all(), "largest first"
        q[:, 0] *= 1.01
        assert orthogonality_error(q) > bound, "the control"


def test_grams_give_the_leading_subspaces_of_the_unfoldings() -> None:
    stack = make_planted(6) * np.exp(np.arange(6))[:, None, None]
    scale = np.linalg.norm(stack, axis=(1, 2), keepdims=True)
    bases = [basis(gram).numpy() for gram in make_grams(stack)]
    expected, control = oracle.unfolding_bases(stack), oracle.unfolding_bases(stack / scale)
    for q, u, other in zip(bases, expected, control, strict=True):
        for rank in (1, 3, 6):
            projector = q[:, :rank] @ q[:, :rank].T
            assert np.abs(projector - u[:, :rank] @ u[:, :rank].T).max() < 1e-9
            assert np.abs(projector - other[:, :rank] @ other[:, :rank].T).max() > 1e-4


def test_a_zero_gradient_adds_nothing_and_half_precision_is_widened() -> None:
    assert not any(gram.any() for gram in make_grams(np.zeros((1, *SHAPE))))
    gram_out, gram_in = torch.zeros(1, 1), torch.zeros(1, 1)
    accumulate_grams(gram_out, gram_in, torch.tensor([[300.0]], dtype=torch.float16))
    assert gram_out.item() == gram_in.item() == 90000.0  # beyond float16


def orientation_shares(stack: Array, q_out: Tensor, q_in: Tensor) -> dict[str, float]:
    """Mean energy of the top 1 %, by where the bases are put."""
    eye_out, eye_in = (torch.eye(d, dtype=torch.float64) for d in stack.shape[1:])
    sides = {
        "correct": (q_out, q_in),
        "transposed": (q_out, q_in.mT),
        "one-sided": (q_out, eye_in),
        "original": (eye_out, eye_in),
    }
    k = round(0.01 * stack[0].size)
    grads = torch.from_numpy(stack)
    return {
        name: sum(oracle.energy_share(rotate(g, *pair).numpy(), k) for g in grads) / len(grads)
        for name, pair in sides.items()
    }


def is_right_order(shares: dict[str, float]) -> bool:
    return (
        shares["correct"] > 1.1 * shares["transposed"]
        and abs(shares["transposed"] - shares["one-sided"]) < 0.1 * shares["correct"]
        and min(shares["transposed"], shares["one-sided"]) > 1.5 * shares["original"]
    )


def test_only_the_right_orientation_gathers_the_energy() -> None:
    """Released code transposes the input side, which leaves about the one-sided effect."""
    stack = make_planted()
    q_out, q_in = (basis(gram) for gram in make_grams(stack[:30]))
    shares = orientation_shares(stack[30:], q_out, q_in)
    assert is_right_order(shares), shares
    assert not is_right_order(orientation_shares(stack[30:], q_out, q_in.mT)), "the control"


# Rotations


@pytest.mark.parametrize(("r_out", "r_in"), [(D_OUT, D_IN), (5, D_IN), (D_OUT, 3), (1, 1)])
def test_rotate_is_the_oracles(r_out: int, r_in: int) -> None:
    q_out, q_in = (q[:, :r] for q, r in zip(make_bases(), (r_out, r_in), strict=True))
    grad = torch.from_numpy(np.random.default_rng(7).normal(size=SHAPE))
    expected = oracle.rotate(grad.numpy(), q_out.numpy(), q_in.numpy())
    assert relative_error(rotate(grad, q_out, q_in), expected) < EXACT
    assert relative_error(rotate(grad * 1.01, q_out, q_in), expected) > EXACT


def test_rotate_takes_half_precision_to_the_bases() -> None:
    q_out, q_in = (q.float() for q in make_bases())
    grad = torch.randn(SHAPE, dtype=torch.bfloat16)
    rotated = rotate(grad, q_out, q_in)
    expected = oracle.rotate(grad.double().numpy(), q_out.double().numpy(), q_in.double().numpy())
    assert rotated.dtype == torch.float32 and relative_error(rotated, expected) < 1e-6


# Selections

# Few distinct values: ties everywhere, both signs, zeros.
SCORES = st.lists(st.sampled_from([-3.0, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0]), min_size=1)


@settings(deadline=None, max_examples=150)
@given(SCORES, st.data())
def test_top_entries_are_the_oracles(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    indices = top_entries(torch.tensor(scores), k)
    assert indices.dtype == torch.int32
    assert indices.tolist() == oracle.top_entries(np.array(scores), k)


def test_top_entries_go_by_magnitude_and_not_by_sign() -> None:
    scores = torch.from_numpy(np.random.default_rng(9).normal(size=SHAPE)) - 1.0
    expected = oracle.top_entries(scores.numpy(), 30)
    assert (scores.flatten()[expected] < 0).all()
    assert top_entries(scores, 30).tolist() == expected
    signed = scores.flatten().topk(30).indices.sort().values
    assert signed.tolist() != expected, "the control: the released code's signed top-k"


def test_equal_entries_are_taken_from_the_front() -> None:
    assert top_entries(torch.zeros(SHAPE), 5).tolist() == [0, 1, 2, 3, 4]
    tied = torch.tensor([1.0, -2.0, 2.0, 1.0, -2.0, 2.0])
    assert top_entries(tied, 3).tolist() == [1, 2, 4]
    assert top_entries(tied, 5).tolist() == [0, 1, 2, 4, 5]


def test_top_entries_keep_what_is_not_finite() -> None:
    scores = torch.tensor([5.0, torch.nan, -torch.inf, 1.0, torch.nan])
    assert top_entries(scores, 4).tolist() == [0, 1, 2, 4]
    assert top_entries(torch.full((3,), torch.nan), 2).tolist() == [0, 1]


def test_the_whole_matrix_may_be_selected() -> None:
    scores = torch.randn(3, 4, dtype=torch.bfloat16)
    assert top_entries(scores, 12).tolist() == list(range(12))


@pytest.mark.parametrize(
    "shape", [(3072, 768), (768, 3072), (24, 16), (7, 7), (1000, 2), (2, 1000)]
)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.3, 1.0])
def test_the_block_has_nearly_as_many_entries_as_it_may(
    shape: tuple[int, int], density: float
) -> None:
    most = max(1, num_entries(shape, density))
    sides = block_shape(shape, most)
    assert all(1 <= r <= d for r, d in zip(sides, shape, strict=True))
    assert 0.83 * most <= sides[0] * sides[1] <= most
    if density == 1:
        assert sides == shape
    if most > 1000 and density < 0.3:
        assert 0.4 < (shape[0] * sides[0]) / (shape[1] * sides[1]) < 2.4


@pytest.mark.parametrize(
    ("shape", "unit", "sides"),
    [
        ((3072, 768), 16, (64, 368)),
        ((768, 3072), 16, (368, 64)),
        ((8192, 2048), 64, (256, 640)),
        ((2048, 8192), 64, (832, 192)),
        ((24, 16), 1, (1, 4)),
    ],
)
def test_sides_are_what_tensor_cores_like(
    shape: tuple[int, int], unit: int, sides: tuple[int, int]
) -> None:
    assert block_shape(shape, num_entries(shape, 0.01)) == sides
    assert not any(side % unit for side in sides)


def test_nothing_but_bases_waits_for_the_device() -> None:
    """Fake tensors have no values, so that whatever reads one on the host fails."""
    with FakeTensorMode():
        grad, q_out, q_in = torch.empty(SHAPE), torch.empty(D_OUT, D_OUT), torch.empty(D_IN, D_IN)
        accumulate_grams(torch.empty(D_OUT, D_OUT), torch.empty(D_IN, D_IN), grad)
        assert top_entries(rotate(grad, q_out, q_in), 20).shape == (20,)
