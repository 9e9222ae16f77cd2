"""The choice of keys is the stable sort's, and nothing invisible or later decides it."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from oracles import spt as oracle
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leantune.ops import choice
from leantune.ops.choice import (
    Place,
    Rule,
    TieRule,
    View,
    choose,
    choose_blocks,
    expand_blocks,
    query_block,
)
from leantune.ops.sparse_parts import unpack_bits

TIES = get_args(TieRule)
PLACES = get_args(Place)


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


def rule(num_keys: int | None = None, **how: Any) -> Rule:
    how = {"keep_ratio": 0.125, "min_keys": 1} | how
    return Rule(num_keys, **how)


def as_lists(picked: Tensor, num_keys: int) -> list[list[int]]:
    """Rows of a choice in either form; indices ascend, then -1."""
    if picked.dtype == torch.uint8:
        keep = unpack_bits(picked, num_keys).flatten(0, 2)
        return [row.nonzero()[:, 0].tolist() for row in keep]
    rows = []
    for row in picked.flatten(0, 2).tolist():
        kept = [j for j in row if j >= 0]
        assert row == kept + [-1] * (len(row) - len(kept))
        rows.append(kept)
    return rows


def pick(scores: Tensor, how: Rule, place: Place = "causal", mask: Tensor | None = None, **more):
    b, h, n, m = scores.shape
    q = torch.empty(b, h, n, 1)
    picked = choose(Given(scores), q, m, how, View(place, mask), **more)
    return as_lists(picked, m)


def wanted(scores: Tensor, how: Rule, place: Place, visible: Tensor) -> list[list[int]]:
    b, h, n, m = scores.shape
    out = []
    for i, j in np.ndindex(b, h):
        seen = visible.expand(b, h, n, m)[i, j].numpy()
        counts = [how.num_kept(torch.tensor(int(row.sum()))).item() for row in seen]
        args = (scores[i, j].numpy(), seen, counts, m - n, how.num_recent, how.num_sinks, how.ties)
        out += oracle.select(*args, place)
    return out


def causal(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]


SHAPES = [(37, 37, 5, 1, 0), (7, 23, 6, 2, 2), (23, 7, 64, 0, 1), (13, 13, 4, 0, 0)]


@pytest.mark.parametrize("in_bits", [False, True])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["random", "equal", "different"])
@pytest.mark.parametrize("top", [8, 10, 16, 20])
def test_the_choice_is_the_stable_sorts(
    top: int, kind: str, place: Place, ties: TieRule, in_bits: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(choice, "_PART_NUMBERS", 150)  # a few rows per part, the last one short
    for n, m, num_keys, recent, sinks in SHAPES:
        if place == "causal" and n > m:
            continue
        scores = torch.randint(0, top + 1, (1, 2, n, m))
        if kind == "equal":
            scores = torch.full_like(scores, 3)
        elif kind == "different":
            scores = torch.stack([torch.randperm(m) for _ in range(2 * n)]).view(1, 2, n, m)
        how = rule(num_keys, num_recent=recent, num_sinks=sinks, ties=ties)
        visible = causal(n, m) if place == "causal" else torch.ones(1, 1, n, m, dtype=torch.bool)
        mask = visible if place == "causal" and n != m else None
        got = pick(scores, how, place, mask, in_bits=in_bits)
        assert got == wanted(scores, how, place, visible)
        if kind == "equal" and n == m:
            other = how._replace(ties="lowest" if ties == "nearest" else "nearest")
            assert got != wanted(scores, other, place, visible)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("place", PLACES)
def test_masks_segments_and_windows(place: Place, ties: TieRule) -> None:
    b, h, n = 2, 3, 19
    scores = torch.randn(b, h, n, n).mul(2).round()  # ties, both signs
    position = torch.arange(n)
    segments = position.div(7, rounding_mode="floor")
    window = (position[:, None] - position).abs() < 6
    mask = (torch.rand(b, 1, n, n) > 0.3) & (segments[:, None] == segments) & window
    if place == "causal":
        mask = mask & causal(n, n)
    mask[0, 0, 7] = False
    for num_keys in (4, None):
        how = rule(num_keys, keep_ratio=0.5, min_keys=2, num_sinks=1, ties=ties)
        got = pick(scores, how, place, mask)
        assert got == wanted(scores, how, place, mask)
        assert got[7] == []


def test_indices_are_taken_where_they_are_smaller_and_say_the_same() -> None:
    scores = torch.randint(0, 9, (2, 2, 90, 90))
    q = torch.empty(2, 2, 90, 1)
    for num_keys, kind in ((2, torch.int16), (40, torch.uint8)):
        view = View("causal", None)
        small = choose(Given(scores), q, 90, rule(num_keys), view)
        bits = choose(Given(scores), q, 90, rule(num_keys), view, in_bits=True)
        assert small.dtype == kind and bits.dtype == torch.uint8
        assert as_lists(small, 90) == as_lists(bits, 90)


def test_a_causal_tie_goes_to_the_most_recent_key() -> None:
    scores = torch.zeros(1, 1, 6, 6)
    assert pick(scores, rule(2))[-1] == [4, 5]
    assert pick(scores, rule(2, ties="lowest"))[-1] == [0, 5]
    assert pick(scores, rule(2, ties="lowest", num_recent=0))[-1] == [0, 1]
    assert pick(scores, rule(3, num_sinks=1))[-1] == [0, 4, 5]
    assert pick(scores, rule(3), "self")[2] == [1, 2, 3]
    assert pick(scores, rule(2), "self")[2] == [1, 2]
    assert pick(scores, rule(2), "cross")[2] == [4, 5]


def test_a_ratio_counts_what_a_query_sees() -> None:
    how = rule(keep_ratio=0.1, min_keys=2)
    counts = how.num_kept(torch.tensor([1, 10, 20, 21, 30, 31, 100]))
    assert counts.tolist() == [2, 2, 2, 3, 3, 4, 10]
    lengths = [len(r) for r in pick(torch.rand(1, 1, 40, 40).mul(9).round(), how)]
    assert lengths == [1, *[2] * 19, *[3] * 10, *[4] * 10]


@pytest.mark.parametrize("how", [rule(3, num_sinks=1), rule(keep_ratio=0.3, min_keys=2)])
def test_decoding_chooses_what_the_full_pass_chose(how: Rule) -> None:
    scores = torch.randint(0, 4, (2, 2, 19, 19))
    full = pick(scores, how)
    for i in range(19):
        step = pick(scores[:, :, i : i + 1, : i + 1], how)
        assert step == full[i::19]
        # A cache with room behind the present token: what is hidden changes nothing.
        room = (torch.arange(19) <= i)[None, None, None]
        assert pick(scores[:, :, i : i + 1], how, mask=room) == full[i::19]


@pytest.mark.parametrize("how", [rule(4, num_sinks=1), rule(keep_ratio=0.25, min_keys=2)])
@pytest.mark.parametrize("place", ["causal", "self"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_choice(side: str, place: Place, how: Rule) -> None:
    n, pad = 21, 6
    scores = torch.randint(0, 4, (2, 2, n, n))
    plain = pick(scores, how, place)
    left = side == "left"
    padded = torch.randint(3, 9, (2, 2, n + pad, n + pad))
    real = slice(pad, None) if left else slice(0, n)
    padded[:, :, real, real] = scores
    is_real = torch.zeros(n + pad, dtype=torch.bool)
    is_real[real] = True
    visible = is_real[None, None, None] & (causal(n + pad, n + pad) if place == "causal" else True)
    visible = visible.expand(1, 1, n + pad, n + pad)
    shift = pad if left else 0

    def real_rows(rows: list[list[int]]) -> list[list[int]]:
        kept = [r for i, r in enumerate(rows) if is_real[i % (n + pad)]]
        return [[j - shift for j in r] for r in kept]

    assert real_rows(pick(padded, how, place, visible)) == plain
    if left or place == "self":
        assert real_rows(pick(padded, how, place)) != plain, "the control: padding is chosen"


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


@pytest.mark.parametrize("place", PLACES)
def test_no_tensor_of_queries_times_keys(place: Place, monkeypatch: Any) -> None:
    monkeypatch.setattr(choice, "_PART_NUMBERS", 2**12)
    n = 512
    q, k = torch.randint(0, 3, (2, 1, 1, n, 4)).float()
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    for visible in (None, mask):
        with _Largest() as seen:
            view = View(place, visible)
            choose(Few(q, k), q, n, rule(), view)
            blocks = choose_blocks(Few(q, k), q, n, rule(), view, 16)
            expand_blocks(blocks, q, n, view, 16)
        # Bits are an eighth of a byte for each pair; a part holds 2**12 numbers of 8 bytes.
        assert seen.num_bytes <= max(n * n // 8, 2**16) < n * n
    with _Largest() as whole:
        choose(Given(torch.zeros(1, 1, n, n)), q, n, rule(), View(place, None))
        q @ k.mT
    assert whole.num_bytes >= 4 * n * n


def block_lists(blocks: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in blocks.flatten(0, 2)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("n", "m"), [(37, 37), (23, 40), (1, 17)])
def test_blocks_are_voted_for_by_their_queries(n: int, m: int, place: Place) -> None:
    b, h, size = 2, 2, 8
    if place == "self":
        n = m
    q = torch.randint(-3, 4, (b, h, n, 5)).float()
    k = torch.randint(-3, 4, (b, 1, m, 5)).float()
    how = rule(keep_ratio=0.4, num_recent=1)
    view = View(place, None if place != "causal" or n == m else causal(n, m))
    blocks = choose_blocks(Few(q, k), q, m, how, view, size)
    group = query_block(view, n, m, size)
    assert group == (1 if place == "causal" and n != m else size)
    scores = (q.double() @ k.double().mT).numpy()
    args = (scores, group, size, m - n, 0.4, place)
    assert block_lists(blocks) == oracle.select_blocks(*args)


@pytest.mark.parametrize("place", ["causal", "cross"])
def test_later_queries_and_keys_change_no_earlier_choice_of_blocks(place: Place) -> None:
    n, t, size = 64, 37, 8
    q, k = torch.randint(-3, 4, (2, 1, 2, n, 5)).float()
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, :, t:] = torch.randint(-99, 99, (1, 2, n - t, 5)).float()
    if place == "causal":
        changed_k[:, :, t:] = torch.randint(-3, 4, (1, 2, n - t, 5)).float()
    view, how = View(place, None), rule(keep_ratio=0.3)
    keeps = []
    for x, y in ((q, k), (changed_q, changed_k)):
        blocks = choose_blocks(Few(x, y), x, n, how, view, size)
        keeps.append(unpack_bits(expand_blocks(blocks, x, n, view, size), n))
    assert torch.equal(keeps[0][:, :, :t], keeps[1][:, :, :t])
    assert not torch.equal(keeps[0], keeps[1])
    # The control: votes of the whole block look ahead.
    seen = View("self", causal(n, n) if place == "causal" else None)
    blind = [choose_blocks(Few(x, k), x, n, how, seen, size) for x in (q, changed_q)]
    assert not torch.equal(blind[0][:, :, : t // size + 1], blind[1][:, :, : t // size + 1])


def test_blocks_expand_to_the_visible_pairs_in_them() -> None:
    n, size = 21, 8
    blocks = torch.rand(2, 3, 3, 3) > 0.5
    mask = torch.rand(2, 1, n, n) > 0.3
    q = torch.empty(2, 3, n, 1)
    keep = unpack_bits(expand_blocks(blocks, q, n, View("self", mask), size), n)
    for b, h, i, j in np.ndindex(2, 3, n, n):
        assert keep[b, h, i, j] == (blocks[b, h, i // size, j // size] & mask[b, 0, i, j])


def test_invisible_tokens_do_not_vote() -> None:
    n, size = 32, 8
    q, k = torch.randint(-3, 4, (2, 1, 1, n, 5)).float()
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool)
    mask[..., 20:] = False
    how = rule(keep_ratio=0.5, num_recent=0)
    changed = (q.clone(), k.clone())
    for x in changed:
        x[:, :, 20:] = 50.0
    a, b = (
        choose_blocks(Few(x, y), x, n, how, View("self", mask), size) for x, y in ((q, k), changed)
    )
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    assert not bool(a[..., 3].any())
