"""Variance of WTA-CRS's estimators: on synthetic rows, and on MiniLM's real ones.

Legend: n rows, k kept rows.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import rows
from bench.models import batches, glue, minilm

SYNTHETIC, REAL = "wta_crs_variance_synthetic", "wta_crs_variance_minilm"
NUM_BATCHES, NUM_DRAWS = 4, 4
_SEED = 0
_EXACT_NORMS: dict[str, Any] = {"draw_at": "backward"}


def main() -> None:
    """Measure on synthetic and on real rows, write both result files, print both tables."""
    made = synthetic()
    rows.replace(SYNTHETIC, ("case", "estimator", "c_rule"), made)
    heads = {"case": "case", "estimator": "estimator", "over_crs": "over CRS"}
    print(rows.table(made, heads | {"over_wta": "over WTA"}))
    try:
        real = list(minilm_rows())
    except FileNotFoundError as error:
        print(f"\nreal rows left out: {error}")
        return
    rows.replace(REAL, ("estimator", "probabilities"), real)
    heads = {"estimator": "estimator", "probabilities": "probabilities from", "median": "median"}
    print("\n" + rows.table(real, heads | {"mean": "mean", "own_median": "the batch's own"}))


class _Rows(nn.Module):
    """A linear whose input rows are given and whose output's gradient is given, too."""

    def __init__(self, grad_output: Tensor, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, grad_output.shape[1], bias=False)
        self.grad_output = grad_output

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.grad_output).sum()


def synthetic() -> list[dict[str, Any]]:
    """Measure each estimator on Gaussian rows with log-normal norms, relative to CRS's variance."""
    n, width, draws = 1024, 8, 2000
    found = []
    for log_std, k in ((0.0, 307), (1.0, 102), (1.0, 307), (2.0, 102), (2.0, 307), (3.0, 102)):
        generator = torch.Generator().manual_seed(_SEED)
        h = torch.randn(n, width, generator=generator)
        g = torch.randn(n, width, generator=generator)
        # The distribution's own quantiles: a random draw of norms moves the ratios by half.
        normal = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n) + 0.5) / n)
        lengths = torch.exp(log_std * normal[torch.randperm(n, generator=generator)])
        h *= (lengths / h.norm(dim=1))[:, None]
        g /= g.norm(dim=1, keepdim=True)
        variance = {}
        for estimator in ("crs", "wta", "systematic"):
            model = _Rows(g, width)
            options = {"keep_ratio": k / n, "min_rows": 1, **_EXACT_NORMS}
            lt.apply(model, lt.WTACRS(estimator=estimator, **options), seed=_SEED)  # type: ignore[arg-type]
            (weight,) = lt.fidelity(model, (h,), draws).parameters
            variance[estimator] = weight.relative_variance
        for estimator, value in variance.items():
            found.append(
                {
                    "case": f"log-std {log_std:g}, n = {n}, k = {k}",
                    "estimator": estimator,
                    "c_rule": "paper",
                    "relative_variance": value,
                    "over_crs": value / variance["crs"],
                    "over_wta": value / variance["wta"],
                    "num_draws": draws,
                }
            )
    return found


@dataclass(frozen=True)
class _Case:
    estimator: str
    label: str
    options: dict[str, Any]
    looks_always: bool = False
    """Running norms see every gradient, not those of some steps."""


_CASES = (
    _Case("wta", "exact norms (the paper's estimator)", _EXACT_NORMS),
    _Case("crs", "exact norms", _EXACT_NORMS),
    _Case("systematic", "exact norms", _EXACT_NORMS),
    _Case("systematic", "activation only", {"norms": "activation", "probability_floor": 0.0}),
    _Case("wta", "activation only", {"norms": "activation", "probability_floor": 0.0}),
    _Case("systematic", "activation only, floor 0.05", {"norms": "activation"}),
    _Case("systematic", "running, floor 0.05", {}),
    _Case("systematic", "running, seen in every step, floor 0.05", {}, looks_always=True),
    _Case("systematic", "running, floor 0.05, allocation measured", {"allocation": "measured"}),
    _Case(
        "systematic",
        "exact norms, allocation measured",
        {"allocation": "measured", **_EXACT_NORMS},
    ),
    _Case("systematic", "cache (last visit, 30 steps ago), floor 0.05", {"norms": "cache"}),
)
"""Every one is unbiased."""


def minilm_rows(keep_ratio: float = 0.1, task: str = "rte", batch_size: int = 16) -> Iterator[dict]:
    """Measure estimators and norm sources on batches of real text after 30 training steps.

    The relative variance is the median (and the mean) over the encoder's linears of
    ``E||est - dW||^2 / E||dW||^2``, both averaged over batches: how far the gradients of one
    batch's rows cancel out differs from batch to batch by a half. ``own`` is the mini-batch's own
    gradient variance on the same scale. The number of kept rows is ``keep_ratio`` of the real ones.
    """
    _, tokenizer = minilm(seed=_SEED)
    stream = batches(glue(task), tokenizer, batch_size, seed=_SEED)
    targets, shown, others = (list(islice(stream, n)) for n in (NUM_BATCHES, 30, 12))
    trained = _trained(shown)
    own = _own_variance(trained, [*targets, *others])
    num_rows = sum(int((t["attention_mask"] != 0).sum()) for t in targets)
    share = num_rows / sum(t["attention_mask"].numel() for t in targets)
    for case in _CASES:
        model, _ = minilm(seed=_SEED)
        model.train()
        config = lt.WTACRS(
            estimator=case.estimator,  # type: ignore[arg-type]
            keep_ratio=keep_ratio * share,
            **case.options,
        )
        session = lt.apply(model, config, seed=_SEED)
        for batch in targets if config.norms == "cache" else ():
            _visit(session, batch)
        model.load_state_dict(trained)
        learns = config.draw_at == "auto" or config.allocation == "measured"
        for batch in shown if config.norms == "running" and learns else ():
            _visit(session, batch, is_step=not case.looks_always)
        values = _relative_variances(session, targets)
        yield {
            "estimator": case.estimator,
            "probabilities": case.label,
            "keep_ratio": keep_ratio,
            "median": median(values),
            "mean": fmean(values),
            "own_median": median(own),
            "own_mean": fmean(own),
            "num_linears": len(values),
            "num_rows": num_rows,
            "num_batches": NUM_BATCHES,
            "num_draws": NUM_DRAWS,
            "task": task,
        }


def _usable(session: lt.Session, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    keeps_ids = any(c.needs_sample_ids for c in session.conversions)
    return {k: v for k, v in batch.items() if k != "sample_id" or keeps_ids}


def _visit(session: lt.Session, batch: dict[str, Tensor], is_step: bool = True) -> None:
    session.model(**_usable(session, batch)).loss.backward()
    if is_step:
        session.on_step()
    session.model.zero_grad()


def _relative_variances(session: lt.Session, targets: list[dict[str, Tensor]]) -> list[float]:
    """Return ``E||est - dW||^2 / E||dW||^2`` of each linear, over draws and batches."""
    errors: dict[str, float] = defaultdict(float)
    squares: dict[str, float] = defaultdict(float)
    for target in targets:
        found = lt.fidelity(session.model, _usable(session, target), NUM_DRAWS)
        for p in found.parameters:
            errors[p.name] += p.relative_variance * p.exact_norm**2
            squares[p.name] += p.exact_norm**2
    return [errors[name] / squares[name] for name in squares]


def _trained(shown: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the weights after one exact step on each batch."""
    model, _ = minilm(seed=_SEED)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in shown:
        model(**{k: v for k, v in batch.items() if k != "sample_id"}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _own_variance(trained: dict[str, Tensor], several: list[dict[str, Tensor]]) -> list[float]:
    """Per linear: ``E||dW_b - mean||^2 / E||dW_b||^2`` over mini-batches b, exact gradients."""
    model, _ = minilm(seed=_SEED)
    model.load_state_dict(trained)
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.1, **_EXACT_NORMS), seed=_SEED)
    first, *others = (_usable(session, batch) for batch in several)
    found = lt.fidelity(model, first, 2, batches=others).parameters
    noises = [p.batch_variance for p in found if p.batch_variance is not None]
    n = len(several)
    return [noise / (1 + noise * (n - 1) / n) for noise in noises]
