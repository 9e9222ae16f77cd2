"""Codes are nearest, the choice of keys is the stable sort's, and nothing invisible decides it."""

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leantune.errors import ConfigError
from leantune.methods.spt import pq
from leantune.methods.spt.pq import (
    Metric,
    TieRule,
    adc_scores,
    assign,
    kmeans,
    match_scores,
    quantisation_loss,
    select_keys,
)
from leantune.ops.sparse import sparse_attention

METRICS = get_args(Metric)
TIES = get_args(TieRule)


def choose(scores: Tensor, num_keys: int, **how: Any) -> pq.Choice:
    """Choice by scores (b, h, n, m) that are all there."""
    shape = tuple(scores.shape)
    assert len(shape) == 4
    how = {"is_causal": True, "device": scores.device} | how
    return select_keys(lambda rows: scores[:, :, rows], shape, num_keys, **how)


def as_lists(choice: pq.Choice) -> list[list[int]]:
    """Rows without their empty slots, which must come last and be -1."""
    assert choice.indices.dtype == torch.int32
    assert torch.equal(choice.is_valid, choice.indices >= 0)
    rows = []
    for row in choice.indices.flatten(0, 2).tolist():
        kept = [j for j in row if j >= 0]
        assert row == kept + [-1] * (len(row) - len(kept))
        rows.append(kept)
    return rows


def make_codes(kind: str, n: int, num_subspaces: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    if kind == "equal":
        codes = np.full((n, num_subspaces), 3)
    elif kind == "different":
        codes = np.repeat(rng.permutation(256)[:n, None], num_subspaces, 1)
    else:
        codes = rng.integers(0, 4, (n, num_subspaces))
    return torch.from_numpy(codes.astype(np.uint8))[None, None]


@pytest.mark.parametrize("metric", METRICS)
def test_codes_are_the_nearest_codewords_lowest_first(metric: Metric, monkeypatch: Any) -> None:
    monkeypatch.setattr(pq, "_CHUNK_NUMBERS", 100)
    # Small integers: plenty of exact ties.
    z = torch.randint(-2, 3, (3, 2, 7, 12)).double()
    codebook = torch.randint(-2, 3, (4, 9, 3)).double()
    codes = assign(z, codebook, metric)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 2, 7, 4)
    wanted = oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.numpy(), metric)
    assert np.array_equal(codes.view(-1, 4).numpy(), wanted)
    highest = 8 - oracle.nearest_codeword(z.view(-1, 12).numpy(), codebook.flip(1).numpy(), metric)
    assert not np.array_equal(wanted, highest)
    other = "l2" if metric == "l1" else "l1"
    assert not torch.equal(codes, assign(z, codebook, other))


def test_a_vectors_code_does_not_depend_on_its_company() -> None:
    z, codebook = torch.randn(100, 16).bfloat16(), torch.randn(2, 16, 8)
    codes = assign(z, codebook)
    assert torch.equal(codes[13:14], assign(z[13:14], codebook))
    assert torch.equal(codes, assign(z.float(), codebook))


def test_kmeans_finds_separated_blobs_in_every_subspace_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    centres = rng.permutation(16)[:, None] * 10.0 + np.zeros((16, 4))
    labels = np.stack([rng.permutation(320) % 16 for _ in range(2)], 1)
    points = centres[labels] + 0.1 * rng.normal(size=(320, 2, 4))
    vectors = torch.from_numpy(points.reshape(320, 8)).float()
    codebook = kmeans(vectors, 2, 16, 20, seed=1)
    assert torch.equal(codebook, kmeans(vectors, 2, 16, 20, seed=1))
    start = kmeans(vectors, 2, 16, 0, seed=1)
    assert not torch.equal(start, kmeans(vectors, 2, 16, 0, seed=1, stream=1))

    def distortion(book: Tensor) -> float:
        codes = assign(vectors, book, "l2").long()
        hard = torch.stack([book[s][codes[:, s]] for s in range(2)], 1)
        return float((hard - vectors.view(320, 2, 4)).square().mean())

    # What is left is the noise, 0.1 squared; a blob without a codeword of its own would leave 3.
    assert distortion(codebook) < 0.0101 < distortion(start) < 0.03
    assert distortion(vectors[:16].view(16, 2, 4).transpose(0, 1)) > 3


def test_an_empty_codeword_moves_to_the_farthest_piece() -> None:
    vectors = torch.tensor([[0.0], [0.0], [2.0], [9.0], [4.0]])
    start = torch.tensor([[[0.0], [99.0], [-99.0], [0.5]]])
    after = pq._lloyd_step(vectors, vectors[None], start)
    assert after.flatten().tolist() == [0.0, 9.0, 4.0, 5.0]
    # Fewer distinct vectors than codewords: copies stay, nothing is NaN.
    same = kmeans(torch.ones(5, 4), 2, 4, 3, seed=0)
    assert torch.equal(same, torch.ones(2, 4, 2))


def test_one_step_is_the_mean_of_what_is_nearest() -> None:
    vectors = torch.randn(50, 6, dtype=torch.float64)
    start, after = (kmeans(vectors, 2, 4, i, seed=3) for i in (0, 1))
    codes = oracle.nearest_codeword(vectors.numpy(), start.numpy(), "l2")
    for s, e in np.ndindex(2, 4):
        mean = vectors.view(50, 2, 3)[codes[:, s] == e, s].mean(0)
        assert torch.allclose(after[s, e], mean, rtol=0, atol=1e-12)


def test_bad_calibration_names_field_and_way_out() -> None:
    with pytest.raises(ConfigError, match="vectors must be >= num_codewords = 16, got 15; calib"):
        kmeans(torch.randn(15, 8), 2, 16, 1, seed=0)
    with pytest.raises(ConfigError, match="num_subspaces must divide the width 8, got 3"):
        kmeans(torch.randn(20, 8), 3, 16, 1, seed=0)
    with pytest.raises(ConfigError, match="width of the vectors must be 2"):
        assign(torch.randn(4, 9), torch.randn(2, 16, 4))
    with pytest.raises(ConfigError, match="codewords must be <= 256"):
        assign(torch.randn(4, 8), torch.randn(2, 257, 4))


def test_loss_equals_the_formula_and_its_gradient_finite_differences() -> None:
    z = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    loss = quantisation_loss(z, codebook)
    wanted = oracle.quantisation_loss(z.detach().numpy(), codebook.detach().numpy())
    assert abs(float(loss.detach()) - wanted) < 1e-12
    assert torch.autograd.gradcheck(quantisation_loss, (z, codebook))
    grads = torch.autograd.grad(
        quantisation_loss(z.detach(), codebook), (z, codebook), allow_unused=True
    )
    assert grads[0] is None and bool(grads[1].any())


def test_loss_learns_separable_blobs() -> None:
    labels = torch.arange(200) % 4
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    z = centres[labels] + 0.2 * torch.randn(200, 2)
    codebook = torch.nn.Parameter(0.5 * centres[None] + 0.3 * torch.randn(1, 4, 2))
    optimizer = torch.optim.Adam([codebook], lr=0.05)
    losses = []
    for _ in range(60):
        loss = quantisation_loss(z, codebook)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert float((assign(z, codebook)[:, 0] == labels).float().mean()) > 0.75


def test_scores_equal_the_oracles_with_grouped_heads() -> None:
    codes_q, codes_k = (torch.randint(0, 4, (2, h, n, 5)).byte() for h, n in ((4, 6), (2, 9)))
    codebook = torch.randn(5, 4, 3)
    q = torch.randn(2, 4, 6, 15)
    match, adc = match_scores(codes_q, codes_k), adc_scores(q, codebook, codes_k)
    for b, h in np.ndindex(2, 4):
        own, others = codes_q[b, h].numpy(), codes_k[b, h // 2].numpy()
        assert np.array_equal(match[b, h].numpy(), oracle.match_scores(own, others))
        wanted = oracle.adc_scores(q[b, h].double().numpy(), codebook.double().numpy(), others)
        assert np.allclose(adc[b, h].numpy(), wanted, rtol=0, atol=1e-5)
    # Keys of equal codes tie to the bit, wherever they stand.
    far = codes_k[:, :, :1].repeat(1, 1, 37, 1)
    scores = adc_scores(q, codebook, far)
    assert torch.equal(scores, scores[..., :1].expand_as(scores))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["random", "equal", "different"])
@pytest.mark.parametrize("num_subspaces", [8, 10, 16, 20])
def test_choice_by_matches_is_the_stable_sorts(
    num_subspaces: int, kind: str, is_causal: bool, ties: TieRule, monkeypatch: Any
) -> None:
    monkeypatch.setattr(pq, "_CHUNK_NUMBERS", 150)  # a few rows per chunk, the last one short
    for n, m, num_keys, recent, sinks in (
        (37, 37, 5, 1, 0),
        (7, 23, 6, 2, 2),
        (23, 7, 64, 0, 1),
        (13, 13, 4, 0, 0),
    ):
        codes_q, codes_k = (make_codes(kind, x, num_subspaces, s) for s, x in enumerate((n, m)))
        choice = select_keys(
            lambda rows, q=codes_q, k=codes_k: match_scores(q[:, :, rows], k),
            (1, 1, n, m),
            num_keys,
            is_causal=is_causal,
            num_recent=recent,
            num_sinks=sinks,
            ties=ties,
            device="cpu",
        )
        assert choice.indices.shape == (1, 1, n, min(num_keys, m))
        visible = np.ones((n, m), dtype=bool)
        if is_causal:
            visible = np.tril(visible, m - n)
        counts = oracle.match_scores(codes_q[0, 0].numpy(), codes_k[0, 0].numpy())
        args = (counts, visible, num_keys, m - n, recent, sinks)
        assert as_lists(choice) == oracle.select(*args, ties)
        if kind == "equal" and n == m:
            wrong = "lowest" if ties == "nearest" else "nearest"
            assert as_lists(choice) != oracle.select(*args, wrong)


@pytest.mark.parametrize("ties", TIES)
def test_choice_by_floating_scores_masks_and_segments_is_the_stable_sorts(ties: TieRule) -> None:
    b, h, n = 2, 3, 19
    scores = torch.randn(b, h, n, n).mul(2).round().div(2)  # ties, both zeros, both signs
    scores[0, 0, 4, :3] = torch.tensor([float("-inf"), 0.0, -0.0])
    mask = torch.rand(b, 1, n, n) > 0.3
    mask[0, 0, 7] = False
    segments = torch.arange(n).div(7, rounding_mode="floor").expand(b, n)
    choice = choose(scores, 4, mask=mask, segments=segments, num_sinks=1, ties=ties)
    seen = mask.expand(b, h, n, n) & (segments[:, :, None] == segments[:, None])[:, None]
    seen = (seen & torch.ones(n, n, dtype=torch.bool).tril()).numpy()
    wanted = []
    for i, j in np.ndindex(b, h):
        wanted += oracle.select(scores[i, j].numpy(), seen[i, j], 4, 0, 1, 1, ties)
    assert as_lists(choice) == wanted
    assert wanted[7] == []


def test_a_causal_tie_goes_to_the_most_recent_key() -> None:
    scores = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    assert as_lists(choose(scores, 2))[-1] == [4, 5]
    assert as_lists(choose(scores, 2, ties="lowest"))[-1] == [0, 5]
    assert as_lists(choose(scores, 2, ties="lowest", num_recent=0))[-1] == [0, 1]
    assert as_lists(choose(scores, 3, num_sinks=1))[-1] == [0, 4, 5]
    assert as_lists(choose(scores, 3, is_causal=False))[2] == [1, 2, 3]
    assert as_lists(choose(scores, 2, is_causal=False))[2] == [1, 2]


def test_decoding_chooses_what_the_full_pass_chose() -> None:
    scores = torch.randint(0, 4, (2, 2, 9, 9)).byte()
    full = choose(scores, 3, num_sinks=1)
    for i in range(9):
        step = choose(scores[:, :, i : i + 1, : i + 1], 3, num_sinks=1)
        assert as_lists(step) == as_lists(
            pq.Choice(full.indices[:, :, i : i + 1], full.is_valid[:, :, i : i + 1])
        )
    # A cache with room behind the present token: positions given, the rest is hidden.
    late = choose(scores[:, :, 4:5], 3, num_sinks=1, first_position=4)
    assert torch.equal(late.indices, full.indices[:, :, 4:5])


@pytest.mark.parametrize("scorer", ["match", "adc"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_choice_and_no_output(side: str, is_causal: bool, scorer: str) -> None:
    layer = make_layer(scorer, is_causal=is_causal)
    x = torch.randn(2, 3, 2, 21, 16)  # q, k, v
    wanted, chosen = layer(x, None)
    pad = torch.randn(2, 3, 2, 6, 16)
    left = side == "left"
    padded = torch.cat([pad, x] if left else [x, pad], 3)
    is_real = torch.ones(27, dtype=torch.bool)
    is_real[slice(0, 6) if left else slice(21, 27)] = False
    out, other = layer(padded, is_real[None, None, None])
    shift = 6 if left else 0
    real = other[:, :, is_real]
    assert torch.equal(torch.where(real >= 0, real - shift, -1), chosen)
    assert torch.allclose(out[:, :, is_real], wanted, rtol=0, atol=1e-6)
    # The control: without the mask, padding is chosen.
    if left or not is_causal:
        unmasked = layer(padded, None)[1][:, :, is_real]
        assert not torch.equal(torch.where(unmasked >= 0, unmasked - shift, -1), chosen)


Layer = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def make_layer(scorer: str, *, is_causal: bool, num_keys: int = 6) -> Layer:
    """(b, 3, h, n, 16) holding q, k, v and a mask to the output and the chosen keys."""
    codebook = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(9))

    def layer(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = x.unbind(1)
        codes_q, codes_k = assign(q, codebook), assign(k, codebook)

        def score(rows: slice) -> Tensor:
            if scorer == "match":
                return match_scores(codes_q[:, :, rows], codes_k)
            return adc_scores(q[:, :, rows], codebook, codes_k)

        shape = (*q.shape[:3], k.shape[2])
        choice = select_keys(
            score, shape, num_keys, is_causal=is_causal, mask=mask, num_sinks=1, device="cpu"
        )
        return sparse_attention(q, k, v, choice.indices, scale=0.25), choice.indices

    return layer


@pytest.mark.parametrize("scorer", ["match", "adc"])
def test_later_tokens_change_no_earlier_bit_with_the_choice_on(scorer: str) -> None:
    x = torch.randn(2, 3, 2, 50, 16)
    changed = x.clone()
    changed[:, :, :, 31:] = torch.randn(2, 3, 2, 19, 16)
    layer = make_layer(scorer, is_causal=True)
    (out, chosen), (other, also) = layer(x, None), layer(changed, None)
    assert torch.equal(chosen[:, :, :31], also[:, :, :31])
    assert torch.equal(out[:, :, :31], other[:, :, :31])
    assert not torch.equal(out[:, :, 31:], other[:, :, 31:])
    # Controls: the prototype's layout, and a choice that sees later keys.
    a, b = (oracle.scramble(t.numpy()) for t in (out, other))
    assert not np.array_equal(a[:, :, :31], b[:, :, :31])
    blind = make_layer(scorer, is_causal=False)
    assert not torch.equal(blind(x, None)[0][:, :, :31], blind(changed, None)[0][:, :, :31])


def test_every_key_kept_is_dense_attention() -> None:
    q, k, v = torch.randn(3, 2, 2, 12, 16, dtype=torch.float64)
    scores = torch.zeros(2, 2, 12, 12, dtype=torch.uint8)
    out = sparse_attention(q, k, v, choose(scores, 99).indices, scale=0.25)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    assert torch.allclose(out, dense, rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max(
            self.numel, *(t.untyped_storage().nbytes() // t.itemsize for t in tensors), 0
        )
        return result


def test_no_tensor_of_queries_times_keys(monkeypatch: Any) -> None:
    monkeypatch.setattr(pq, "_CHUNK_NUMBERS", 2**12)
    n = 512
    x = torch.randn(1, 3, 1, n, 16)
    with _Largest() as seen:
        make_layer("adc", is_causal=True)(x, torch.ones(1, 1, 1, n, dtype=torch.bool))
        make_layer("match", is_causal=True)(x, None)
    assert n < seen.numel < n * n // 4
    with _Largest() as whole:
        choose(torch.zeros(1, 1, n, n), 6)
    assert whole.numel >= n * n


def test_too_few_keys_for_what_is_always_kept_is_an_error() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"num_keys must be >= 3, the sinks and recent .* got 2"):
        choose(scores, 2, num_recent=2, num_sinks=1)
    with pytest.raises(ConfigError, match="num_keys must be >= 4"):
        choose(scores, 3, num_recent=2, num_sinks=1, is_causal=False)
    with pytest.raises(ConfigError, match="num_keys must be >= 1"):
        choose(scores, 0, num_recent=0)
