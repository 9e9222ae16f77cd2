"""A session in a plain PyTorch loop: how well it learns, loss scales, autocast."""

from collections.abc import Callable
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
        torch.randn(NUM_SAMPLES, NUM_TOKENS, 1, generator=generator)
    )
    lengths = torch.randint(2, NUM_TOKENS + 1, (NUM_SAMPLES, 1), generator=generator)
    mask = (torch.arange(NUM_TOKENS) < lengths).long()
    return {"x": x * mask[..., None], "labels": labels, "attention_mask": mask}


def fit(
    *methods: Any,
    num_steps: int = 96,
    scale: Callable[[int], float] = lambda step: 1.0,
    autocast: bool = False,
    seed: int = 0,
) -> tuple[Weights, float]:
    """Train with SGD and return the weights and the loss over the whole set.

    The loss is multiplied by ``scale(step)`` and the gradients are divided by it, as mixed
    precision does.
    """
    torch.manual_seed(1)
    model = Classifier().train()
    session = lt.apply(model, *methods, seed=seed) if methods else None
    rows = toy_task()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    needs_ids = session is not None and session.needs_sample_ids
    for step in range(num_steps):
        first = step * BATCH_SIZE % NUM_SAMPLES
        batch = {name: value[first : first + BATCH_SIZE] for name, value in rows.items()}
        if needs_ids:
            batch["sample_id"] = torch.arange(first, first + BATCH_SIZE)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch)["loss"]
        (loss * scale(step)).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale(step)
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.on_step()
    if session is not None:
        assert (session.draw, session.step) == (num_steps, num_steps)
    model.eval()
    with torch.no_grad():
        return weights(model), float(model(**rows)["loss"])


def sampled(keep_ratio: float = 0.3, **options: Any) -> lt.WTACRS:
    return lt.WTACRS(keep_ratio=keep_ratio, **options)


@pytest.mark.parametrize("norms", ["activation", "running", "cache"])
def test_sampling_ends_near_the_exact_loss(norms: str) -> None:
    start = fit(num_steps=0)[1]
    exact = fit()[1]
    got = [fit(sampled(norms=norms), seed=seed)[1] for seed in range(3)]
    assert exact < 0.5 * start
    # Of the fall of the loss under exact training, at least nine tenths.
    assert all(start - loss > 0.9 * (start - exact) for loss in got)


def test_keeping_the_largest_rows_only_is_worse_than_sampling() -> None:
    options: dict[str, Any] = {"norms": "activation", "min_rows": 1, "num_steps": 96}
    num_steps = options.pop("num_steps")

    def losses(estimator: str) -> list[float]:
        method = sampled(0.1, estimator=estimator, **options)
        return [fit(method, num_steps=num_steps, seed=seed)[1] for seed in range(3)]

    # The biased estimator has no luck in it: its loss is the same for every seed.
    topk = losses("topk")
    assert topk[0] == topk[1] == topk[2]
    assert min(topk) > max(losses("systematic"))


@pytest.mark.parametrize("norms", ["running", "cache"])
def test_a_loss_scale_changes_nothing(norms: str) -> None:
    expected, _ = fit(sampled(norms=norms))
    # A power of two is exact in floating point: the weights agree to the bit.
    constant, _ = fit(sampled(norms=norms), scale=lambda step: 1024.0)
    assert same(constant, expected)
    changing, _ = fit(sampled(norms=norms), scale=lambda step: 1024.0 if step < 40 else 64.0)
    assert same(changing, expected)
    other_draws, _ = fit(sampled(norms=norms), seed=1)
    assert not same(other_draws, expected)


def test_autocast_learns_as_well() -> None:
    start = fit(num_steps=0)[1]
    exact = fit(autocast=True)[1]
    got, loss = fit(sampled(), autocast=True)
    assert all(value.dtype == torch.float32 for value in got.values())
    assert start - loss > 0.9 * (start - exact)
    assert not same(got, fit(sampled())[0])


def test_an_overflow_under_a_loss_scale_leaves_the_norms() -> None:
    def scale(step: int) -> float:
        return 1e38 if step == 20 else 1024.0

    with pytest.raises(AssertionError):
        # The weights of the overflowed step itself are lost where no scaler skips it.
        weights_after, _ = fit(sampled(norms="cache"), scale=scale, num_steps=24)
        assert all(value.isfinite().all() for value in weights_after.values())
