"""A session in a plain PyTorch loop: how well it learns, loss scales, autocast."""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from integration.tiny import same, weights
from torch import Tensor, nn
from torch.nn import functional as F

import leantune as lt

NUM_SAMPLES, NUM_TOKENS, D_MODEL = 256, 8, 16
BATCH_SIZE = 16
Weights = dict[str, Tensor]


class Classifier(nn.Module):
    """Two layers on each token, mean over the tokens, a class of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D_MODEL, 32)
        self.second = nn.Linear(32, 32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.second(F.gelu(self.first(x)))
        mask = attention_mask[..., None].to(hidden)
        logits = self.out((F.gelu(hidden) * mask).sum(1) / mask.sum(1))
        return {"loss": F.cross_entropy(logits.float(), labels)}


def toy_task() -> dict[str, Tensor]:
    """Samples whose tokens come from four centres, at lengths and scales that differ."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (NUM_SAMPLES,), generator=generator)
    centres = torch.randn(4, D_MODEL, generator=generator)
    x = torch.randn(NUM_SAMPLES, NUM_TOKENS, D_MODEL, generator=generator)
    x = (x + 0.7 * centres[labels][:, None]) * torch.exp(
        0.7 * torch.randn(NUM_SAMPLES, NUM_TOKENS, 1, generator=generator)
    )
    lengths = torch.randint(2, NUM_TOKENS + 1, (NUM_SAMPLES, 1), generator=generator)
    mask = (torch.arange(NUM_TOKENS) < lengths).long()
    return {"x": x * mask[..., None], "labels": labels, "attention_mask": mask}


def fit(
    *methods: Any,
    num_steps: int = 64,
    scale: Callable[[int], float] = lambda step: 1.0,
    autocast: bool = False,
    seed: int = 0,
) -> tuple[Weights, float]:
    """Train with AdamW and return the weights and the loss over the whole set.

    As mixed precision does, the loss is multiplied by ``scale(step)``, the gradients are divided by
    it, and a step whose gradients overflow is left out.
    """
    torch.manual_seed(1)
    model = Classifier().train()
    session = lt.apply(model, *methods, seed=seed) if methods else None
    rows = toy_task()
    order = torch.cat([torch.randperm(NUM_SAMPLES) for _ in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        ids = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        batch = {name: value[ids] for name, value in rows.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch)["loss"]
        (loss * scale(step)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if all(gradient.isfinite().all() for gradient in gradients):
            for gradient in gradients:
                gradient /= scale(step)
            optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.on_step()
    if session is not None:
        state = session.state_dict()
        assert int(state["counter"]) == int(state["step"]) == session.step == num_steps
    model.eval()
    with torch.no_grad():
        return weights(model), float(model(**rows)["loss"])


def sampled(keep_ratio: float = 0.3, **options: Any) -> lt.WTACRS:
    return lt.WTACRS(keep_ratio=keep_ratio, **options)


@pytest.mark.parametrize("norms", ["activation", "running"])
def test_sampling_ends_near_the_exact_loss(norms: str) -> None:
    start = fit(num_steps=0)[1]
    exact = fit()[1]
    assert exact < 0.1 * start
    # Three tenths of the rows: at least 97 % of the fall of the loss.
    for seed in range(3):
        assert start - fit(sampled(norms=norms), seed=seed)[1] > 0.97 * (start - exact)


@pytest.mark.slow
def test_keeping_the_largest_rows_only_is_worse_than_sampling() -> None:
    def losses(estimator: str, num_seeds: int) -> list[float]:
        method = sampled(0.1, estimator=estimator, norms="activation", min_rows=1)
        return [fit(method, seed=seed)[1] for seed in range(num_seeds)]

    # The biased estimator has no luck in it: its loss is the same for every seed.
    topk = losses("topk", 2)
    assert topk[0] == topk[1]
    assert topk[0] > 1.5 * fmean(losses("systematic", 10))


@pytest.mark.slow
def test_a_loss_scale_changes_nothing() -> None:
    def changing(step: int) -> float:
        return 1024.0 if step < 40 else 64.0

    method = sampled()
    expected, _ = fit(method)
    # A power of two is exact in floating point: the weights agree to the bit.
    assert same(fit(method, scale=lambda step: 1024.0)[0], expected)
    assert same(fit(method, scale=changing)[0], expected)
    assert not same(fit(method, seed=1)[0], expected)


def test_an_overflow_under_a_loss_scale_is_survived() -> None:
    start = fit(num_steps=0)[1]

    def overflowing(step: int) -> float:
        return math.inf if step in (0, 20) else 1024.0

    got, loss = fit(sampled(), scale=overflowing)
    assert all(value.isfinite().all() for value in got.values())
    assert loss < 0.1 * start


def test_autocast_learns_as_well() -> None:
    start = fit(num_steps=0)[1]
    exact = fit(autocast=True)[1]
    got, loss = fit(sampled(), autocast=True)
    assert all(value.dtype == torch.float32 for value in got.values())
    assert start - loss > 0.97 * (start - exact)
    assert not same(got, fit(sampled())[0])
