"""The choice of keys is the stable sort's, and nothing invisible or later decides it."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leantune.ops.sparse_attention import tiles
from leantune.ops.sparse_attention.tiles import unpack_bits
from leantune.ops.sparse_attention.top_keys import (
    AttentionKind,
    KeyBudget,
    Visibility,
    top_keys,
)

KINDS = get_args(AttentionKind)


class Given:
    """Features whose scores are a table (b, h, n, m) of whole numbers: one-hot queries."""

    def __init__(self, scores: Tensor) -> None:
        self.table = scores.float()
        self.num_keys = scores.shape[-1]

    def queries(self, batch: slice, rows: slice) -> Tensor:
        return self.table[batch, :, rows]

    def keys(self, batch: slice) -> Tensor:
        b = len(self.table[batch])
        return torch.eye(self.num_keys).expand(b, 1, -1, -1)


def fixed(num_keys: int) -> KeyBudget:
    """A budget of so many keys, whatever a query sees."""
    return KeyBudget(1e-6, num_keys)


def as_lists(bits: Tensor, num_keys: int) -> list[list[int]]:
    keep = unpack_bits(bits, num_keys).flatten(0, 2)
    return [row.nonzero()[:, 0].tolist() for row in keep]


def pick(
    scores: Tensor, budget: KeyBudget, kind: AttentionKind = "causal", mask: Tensor | None = None
) -> list[list[int]]:
    b, h, n, m = scores.shape
    q = torch.empty(b, h, n, 1)
    return as_lists(top_keys(Given(scores), q, m, budget, Visibility(kind, mask)), m)


def wanted(
    scores: Tensor, budget: KeyBudget, kind: AttentionKind, visible: Tensor
) -> list[list[int]]:
    b, h, n, m = scores.shape
    out = []
    for i, j in np.ndindex(b, h):
        seen = visible.expand(b, h, n, m)[i, j].numpy()
        counts = [int(budget.num_kept(torch.tensor(int(row.sum())))) for row in seen]
        out += oracle.select(scores[i, j].numpy(), seen, counts, m - n, kind)
    return out


def causal(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]


SHAPES = [(37, 37, 5), (7, 23, 6), (23, 7, 64), (13, 13, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", ["random", "equal", "different"])
@pytest.mark.parametrize("top", [8, 20])
def test_the_choice_is_the_stable_sorts(
    top: int, made: str, kind: AttentionKind, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 150)  # a few rows per part, the last one short
    for n, m, num_keys in SHAPES:
        if kind == "causal" and n > m:
            continue
        scores = torch.randint(0, top + 1, (1, 2, n, m))
        if made == "equal":
            scores = torch.full_like(scores, 3)
        elif made == "different":
            scores = torch.stack([torch.randperm(m) for _ in range(2 * n)]).view(1, 2, n, m)
        visible = causal(n, m) if kind == "causal" else torch.ones(1, 1, n, m, dtype=torch.bool)
        mask = visible if kind == "causal" and n != m else None
        got = pick(scores, fixed(num_keys), kind, mask)
        assert got == wanted(scores, fixed(num_keys), kind, visible)
        if kind != "cross" and n == m:
            assert got != wanted(scores, fixed(num_keys), "cross", visible) or kind == "causal"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_segments_and_windows(kind: AttentionKind) -> None:
    b, h, n = 2, 3, 19
    scores = torch.randn(b, h, n, n).mul(2).round()  # ties, both signs
    position = torch.arange(n)
    segments = position.div(7, rounding_mode="floor")
    window = (position[:, None] - position).abs() < 6
    mask = (torch.rand(b, 1, n, n) > 0.3) & (segments[:, None] == segments) & window
    if kind == "causal":
        mask = mask & causal(n, n)
    mask[0, 0, 7] = False
    for budget in (fixed(4), KeyBudget(0.5, 2)):
        got = pick(scores, budget, kind, mask)
        assert got == wanted(scores, budget, kind, mask)
        assert got[7] == []


def test_a_tie_goes_to_the_nearest_key_and_the_own_key_is_kept() -> None:
    scores = torch.zeros(1, 1, 6, 6)
    assert pick(scores, fixed(2))[-1] == [4, 5]
    assert pick(scores, fixed(3), "self")[2] == [1, 2, 3]
    assert pick(scores, fixed(2), "self")[2] == [1, 2]
    assert pick(scores, fixed(2), "cross")[2] == [4, 5]
    scores[..., 2, 2] = -9
    assert pick(scores, fixed(1), "self")[2] == pick(scores, fixed(1))[2] == [2]
    assert pick(scores, fixed(1), "cross")[2] == [5]


def test_a_ratio_counts_what_a_query_sees() -> None:
    how = KeyBudget(0.1, 2)
    counts = how.num_kept(torch.tensor([1, 10, 20, 21, 30, 31, 100]))
    assert counts.tolist() == [2, 2, 2, 3, 3, 4, 10]
    assert [how.limit(m) for m in (1, 10, 20, 21, 30, 31, 100)] == [1, 2, 2, 3, 3, 4, 10]
    lengths = [len(r) for r in pick(torch.rand(1, 1, 40, 40).mul(9).round(), how)]
    assert lengths == [1, *[2] * 19, *[3] * 10, *[4] * 10]


@pytest.mark.parametrize("how", [fixed(3), KeyBudget(0.3, 2)])
def test_decoding_chooses_what_the_full_pass_chose(how: KeyBudget) -> None:
    scores = torch.randint(0, 4, (2, 2, 19, 19))
    full = pick(scores, how)
    for i in range(19):
        step = pick(scores[:, :, i : i + 1, : i + 1], how)
        assert step == full[i::19]
        # A cache with room behind the present token: what is hidden changes nothing.
        room = (torch.arange(19) <= i)[None, None, None]
        assert pick(scores[:, :, i : i + 1], how, mask=room) == full[i::19]


@pytest.mark.parametrize("how", [fixed(4), KeyBudget(0.25, 2)])
@pytest.mark.parametrize("kind", ["causal", "self"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_choice(side: str, kind: AttentionKind, how: KeyBudget) -> None:
    n, pad = 21, 6
    scores = torch.randint(0, 4, (2, 2, n, n))
    plain = pick(scores, how, kind)
    left = side == "left"
    padded = torch.randint(3, 9, (2, 2, n + pad, n + pad))
    real = slice(pad, None) if left else slice(0, n)
    padded[:, :, real, real] = scores
    is_real = torch.zeros(n + pad, dtype=torch.bool)
    is_real[real] = True
    visible = is_real[None, None, None] & (causal(n + pad, n + pad) if kind == "causal" else True)
    visible = visible.expand(1, 1, n + pad, n + pad)
    shift = pad if left else 0

    def real_rows(rows: list[list[int]]) -> list[list[int]]:
        kept = [r for i, r in enumerate(rows) if is_real[i % (n + pad)]]
        return [[j - shift for j in r] for r in kept]

    assert real_rows(pick(padded, how, kind, visible)) == plain
    if left or kind == "self":
        assert real_rows(pick(padded, how, kind)) != plain, "the control: padding is chosen"


class _Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.num_bytes = max(self.num_bytes, *(t.untyped_storage().nbytes() for t in tensors), 0)
        return result


class Few:
    """Features of one width, so that no table of scores exists beforehand."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.q, self.k = q, k

    def queries(self, batch: slice, rows: slice) -> Tensor:
        return self.q[batch, :, rows]

    def keys(self, batch: slice) -> Tensor:
        return self.k[batch]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_queries_times_keys(kind: AttentionKind, monkeypatch: Any) -> None:
    monkeypatch.setattr(tiles, "_TILE_NUMBERS", 2**12)
    n = 512
    q, k = torch.randint(0, 3, (2, 1, 1, n, 4)).float()
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    for visible in (None, mask):
        with _Largest() as seen:
            top_keys(Few(q, k), q, n, KeyBudget(0.125), Visibility(kind, visible))
        # Bits are an eighth of a byte for each pair; a part holds 2**12 numbers of 8 bytes.
        assert seen.num_bytes <= max(n * n // 8, 2**16) < n * n
    with _Largest() as whole:
        top_keys(Given(torch.zeros(1, 1, n, n)), q, n, KeyBudget(0.125), Visibility(kind, None))
        q @ k.mT
    assert whole.num_bytes >= 4 * n * n


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_recent_keys_are_always_kept_and_counted(kind: AttentionKind) -> None:
    n, keep = 20, 3
    scores = torch.zeros(1, 1, n, n)
    scores[..., 8:12] = 9.0  # others that every query likes best
    real = torch.ones(n, dtype=torch.bool)
    real[:2] = False
    mask = real[None, None, None] & (causal(n, n) if kind == "causal" else torch.tensor(True))
    rows = pick(scores, KeyBudget(0.4, 1, keep), kind, mask.expand(1, 1, n, n))
    plain = pick(scores, KeyBudget(0.4, 6), kind, mask.expand(1, 1, n, n))
    for i in range(2, n):
        wanted = {j for j in range(2, 2 + keep) if kind != "causal" or j <= i}
        if kind != "cross":
            wanted |= {j for j in range(i - keep + 1, i + 1) if j >= 2}
        assert wanted <= set(rows[i]) and len(rows[i]) == len(plain[i])
    assert rows != plain
