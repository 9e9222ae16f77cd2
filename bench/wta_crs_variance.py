"""Variance of WTA-CRS's estimators: on synthetic rows, and on MiniLM's real ones.

Legend: n rows, k kept rows, d_in, d_out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import rows
from bench.models import batches, glue, minilm
from leantune.core.batch import Batch
from leantune.core.session import Session
from leantune.core.sites import Site, find_sites
from leantune.methods.wta_crs import maths, norms, store
from leantune.ops.rows import row_norms, uniform
from leantune.ops.stores import grad_weight

NUM_DRAWS = 60
_SEED = 0


def main() -> None:
    """Measure on synthetic and on real rows, write both result files, print both tables."""
    made = synthetic()
    rows.write("wta_crs_variance_synthetic", made)
    heads = {"case": "case", "estimator": "estimator", "c_rule": "rule", "over_crs": "over CRS"}
    print(rows.table(made, heads | {"over_wta": "over WTA"}))
    try:
        real = list(minilm_rows())
    except FileNotFoundError as error:
        print(f"\nreal rows left out: {error}")
        return
    rows.write("wta_crs_variance_minilm", real)
    heads = {"estimator": "estimator", "probabilities": "probabilities from", "median": "median"}
    print("\n" + rows.table(real, heads | {"mean": "mean", "own_median": "the batch's own"}))


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
        h *= (lengths / row_norms(h))[:, None]
        g /= row_norms(g)[:, None]
        p = maths.probabilities(row_norms(h) * row_norms(g), None, 0.0)
        variance = {}
        for estimator, rule in _ESTIMATORS:
            variance[estimator, rule] = _relative_variance(
                h,
                g,
                lambda u, e=estimator, r=rule: store.gather(h, (), maths.select(p, k, e, r, u)),  # noqa: B023
                draws,
            )
        for (estimator, rule), value in variance.items():
            found.append(
                {
                    "case": f"log-std {log_std:g}, n = {n}, k = {k}",
                    "estimator": estimator,
                    "c_rule": rule,
                    "relative_variance": value,
                    "over_crs": value / variance["crs", "paper"],
                    "over_wta": value / variance["wta", "paper"],
                    "num_draws": draws,
                }
            )
    return found


_ESTIMATORS = (
    ("crs", "paper"),
    ("wta", "paper"),
    ("wta", "variance"),
    ("systematic", "paper"),
    ("systematic", "variance"),
)


def _relative_variance(
    h: Tensor, g: Tensor, make: Callable[[Tensor], store.Sample], num_draws: int
) -> float:
    """Return ``E||est - dW||^2 / ||dW||^2`` over draws; ``make`` gets the uniforms."""
    exact = g.t() @ h
    total = 0.0
    for number in range(num_draws):
        u = uniform(_SEED, 1, torch.tensor(number), 2 * len(h) + 1, device=h.device)
        total += float((grad_weight(store.factors_of(make(u), g)) - exact).square().sum())
    return total / num_draws / float(exact.square().sum())


@dataclass
class _Recorder:
    """Inputs and output gradients of linears, caught by hooks during one forward and backward."""

    sites: list[Site]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> "_Recorder":
        for site in self.sites:
            self.handles.append(site.module.register_forward_hook(self._hook(site.name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            output.register_hook(lambda grad: self.grads.__setitem__(name, grad.detach()))

        return hook


def minilm_rows(keep_ratio: float = 0.1, task: str = "rte", batch_size: int = 32) -> Iterator[dict]:
    """Measure estimators and norm sources on one batch of real text after 30 training steps.

    Every row of the table is unbiased. The relative variance is the median (and the mean) over
    the encoder's linears of ``E||est - dW||^2 / ||dW||^2``; ``own`` is the mini-batch's own
    gradient variance over other batches, on the same scale.
    """
    data = glue(task)
    model, tokenizer = minilm(seed=_SEED)
    sites = [s for s in find_sites(model) if s.role == "linear" and s.block is not None]
    names = [s.name for s in sites]
    session = SimpleNamespace(num_samples=len(data["train"]), loss_scale=1.0)
    running = norms.RunningNorms(names, 0.9)
    cached = norms.CachedNorms(names, 4.0, cast(Session, session))
    stream = batches(data, tokenizer, batch_size, seed=_SEED, max_length=256)
    target = next(stream)
    target_batch = Batch(target["sample_id"], {"attention_mask": target["attention_mask"] != 0})

    model.train()
    recorder = _backward(model, sites, target)  # the previous visit to these samples
    for column, name in enumerate(names):
        grad = recorder.grads[name]
        norm = row_norms(grad.reshape(-1, grad.shape[-1]))
        cached.observe(column, norm, None, recorder.inputs[name].shape, target_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for batch in islice(stream, 30):
        recorder = _backward(model, sites, batch)
        mask = (batch["attention_mask"] != 0).reshape(-1)
        for column, name in enumerate(names):
            grad = recorder.grads[name]
            norm = row_norms(grad.reshape(-1, grad.shape[-1]))
            shape = recorder.inputs[name].shape
            running.observe(column, norm, mask, shape, Batch())
        optimizer.step()
        optimizer.zero_grad()

    own = _own_variance(model, sites, list(islice(stream, 16)))
    recorder = _backward(model, sites, target)
    groups: dict[str, list[int]] = {}
    for column, site in enumerate(sites):
        groups.setdefault(site.reads or site.name, []).append(column)
    real = (target["attention_mask"] != 0).reshape(-1)
    for case in _cases(running, cached):
        values = []
        for site in sites:
            h, g = (
                t.reshape(-1, t.shape[-1])[real]
                for t in (recorder.inputs[site.name], recorder.grads[site.name])
            )
            shape = recorder.inputs[site.name].shape
            guess = None
            if case.source is not None:
                columns = groups[site.reads or site.name]
                guess = case.source.read(shape, columns, target_batch)
                guess = None if guess is None else guess[real]
            values.append(_case_variance(case, h, g, guess, keep_ratio))
        yield {
            "estimator": case.estimator,
            "probabilities": case.label,
            "keep_ratio": keep_ratio,
            "median": median(values),
            "mean": fmean(values),
            "own_median": median(own),
            "own_mean": fmean(own),
            "num_linears": len(sites),
            "num_rows": int(real.sum()),
            "num_draws": NUM_DRAWS,
            "task": task,
        }


@dataclass(frozen=True)
class _Case:
    label: str
    estimator: str = "systematic"
    c_rule: str = "paper"
    source: norms.NormSource | None = None
    is_exact: bool = True
    is_shuffled: bool = False
    residual: int | str = 0
    floor: float = 0.0


def _cases(running: norms.NormSource, cached: norms.NormSource) -> list[_Case]:
    return [
        _Case("exact norms (the paper's estimator)", estimator="wta"),
        _Case("exact norms", estimator="crs"),
        _Case("exact norms"),
        _Case("exact norms, rows in random order", is_shuffled=True),
        _Case("exact norms, rule 'variance'", c_rule="variance"),
        _Case("activation only", is_exact=False),
        _Case("activation only", is_exact=False, estimator="wta"),
        _Case("activation only, floor 0.05", is_exact=False, floor=0.05),
        _Case("running, floor 0.05", is_exact=False, source=running, floor=0.05),
        _Case(
            "cache (last visit, 30 steps ago), floor 0.05",
            is_exact=False,
            source=cached,
            floor=0.05,
        ),
        _Case("exact norms, centred", residual="mean"),
        _Case("exact norms, rank 4 exact, equal storage", residual=4),
        _Case("exact norms, rank 16 exact, equal storage", residual=16),
        _Case(
            "running, rank 4 exact, equal storage",
            is_exact=False,
            source=running,
            residual=4,
            floor=0.05,
        ),
    ]


def _case_variance(
    case: _Case, h: Tensor, g: Tensor, guess: Tensor | None, keep_ratio: float
) -> float:
    """Relative variance of one case on one linear, at the storage of plain ``keep_ratio``."""
    n, d_in = h.shape
    if case.is_shuffled:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))
        h, g = h[order], g[order]
    k = maths.budget(n, keep_ratio)
    basis = None
    if isinstance(case.residual, int) and case.residual:
        # A kept row costs d_in numbers and two words; the exact part (n + d_in) * rank numbers.
        k = max(1, k - round((n + d_in) * case.residual / (d_in + 2)))
        basis = torch.randn(d_in, case.residual, generator=torch.Generator().manual_seed(_SEED))
        for _ in range(3):
            basis = store.power_step(h, basis)
    left, kept = store.split_exact(h, case.residual == "mean", basis, None)
    if case.is_exact:
        guess = row_norms(g)
    scores = left if guess is None else left * guess
    p = maths.probabilities(scores, None, case.floor)
    estimator, rule = cast(Any, case.estimator), cast(Any, case.c_rule)
    return _relative_variance(
        h, g, lambda u: store.gather(h, kept, maths.select(p, k, estimator, rule, u)), NUM_DRAWS
    )


def _backward(model: nn.Module, sites: list[Site], batch: dict[str, Tensor]) -> _Recorder:
    inputs = {k: v for k, v in batch.items() if k != "sample_id"}
    with _Recorder(sites) as recorder:
        model(**inputs).loss.backward()
    return recorder


def _own_variance(
    model: nn.Module, sites: list[Site], others: Sequence[dict[str, Tensor]]
) -> list[float]:
    """Per linear: ``E||dW_b - mean||^2 / E||dW_b||^2`` over mini-batches b, exact gradients."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    for batch in others:
        model.zero_grad()
        _backward(model, sites, batch)
        for site in sites:
            grad = cast(Tensor, site.module.weight.grad)
            sums[site.name] = sums.get(site.name, torch.zeros_like(grad)) + grad
            squares[site.name] = squares.get(site.name, 0.0) + float(grad.square().sum())
    model.zero_grad()
    count = len(others)
    out = []
    for site in sites:
        mean_square = squares[site.name] / count
        of_mean = float((sums[site.name] / count).square().sum())
        out.append((mean_square - of_mean) * count / (count - 1) / mean_square)
    return out
