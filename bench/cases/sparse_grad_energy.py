"""Held-out gradient energy in the top 1 % of entries, by basis: MiniLM on real SST-2 text."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import leantune as lt
from bench import rows
from bench.models import batches, glue, minilm

RESULT = "sparse_grad_energy"
DENSITY = 0.01
BASES = (
    "original",
    "random",
    "one-sided",
    "transposed input",
    "right, shared",
    "right, per layer",
)
Pair = tuple[Tensor, Tensor]


def main(num_calibration: int = 30, num_held_out: int = 6, num_steps: int = 100) -> None:
    """Measure right after calibration and ``num_steps`` full fine-tuning steps later."""
    data = glue("sst2", max_train=32 * (num_calibration + num_held_out + num_steps))
    model, tokenizer = minilm()
    model.train()
    stream = batches(data, tokenizer, 32, seed=0)

    def take(n: int) -> list[dict[str, Tensor]]:
        return [{k: v for k, v in next(stream).items() if k != "sample_id"} for _ in range(n)]

    calibration, held_out = take(num_calibration), take(num_held_out)
    linears = {
        s.name: s for s in lt.find_sites(model) if s.part in ("mlp.up", "mlp.gate", "mlp.down")
    }
    bases = _bases(model, linears, calibration)
    found = [_row(0, _shares(model, linears, held_out, bases))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for batch in take(num_steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    found.append(_row(num_steps, _shares(model, linears, held_out, bases)))
    rows.write(RESULT, found)
    print(rows.table(found, {"step": "steps after calibration"} | {b: b for b in BASES}))


def _row(step: int, shares: dict[str, float]) -> dict[str, Any]:
    return {"step": step, "density": DENSITY, **{k: round(v, 4) for k, v in shares.items()}}


def _gradients(
    model: nn.Module, linears: dict[str, Any], shown: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer, weight gradient) for every batch, one at a time; no parameter moves."""
    for batch in shown:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, site in linears.items():
            yield name, site.module.weight.grad
    model.zero_grad()


def _bases(
    model: nn.Module, linears: dict[str, Any], shown: list[dict[str, Tensor]]
) -> dict[str, dict[str, Pair]]:
    """Return basis -> layer -> (q_out, q_in)."""
    grams: dict[str, Pair] = {}
    for name, grad in _gradients(model, linears, shown):
        for key in (name, linears[name].part):
            if key not in grams:
                d_out, d_in = grad.shape
                grams[key] = torch.zeros(d_out, d_out), torch.zeros(d_in, d_in)
            out, inn = grams[key]
            out.addmm_(grad, grad.mT)
            inn.addmm_(grad.mT, grad)
    found = {key: (_basis(out), _basis(inn)) for key, (out, inn) in grams.items()}
    random: dict[str, Pair] = {}
    for key, pair in found.items():
        first, second = (torch.linalg.qr(torch.randn_like(q))[0] for q in pair)
        random[key] = (first, second)
    of_type = {name: found[site.part] for name, site in linears.items()}
    eye = {name: tuple(torch.eye(len(q)) for q in pair) for name, pair in of_type.items()}
    return {
        "original": eye,  # type: ignore[dict-item]
        "random": {name: random[site.part] for name, site in linears.items()},
        "one-sided": {name: (pair[0], eye[name][1]) for name, pair in of_type.items()},
        "transposed input": {name: (pair[0], pair[1].t()) for name, pair in of_type.items()},
        "right, shared": of_type,
        "right, per layer": {name: found[name] for name in linears},
    }


def _shares(
    model: nn.Module,
    linears: dict[str, Any],
    shown: list[dict[str, Tensor]],
    bases: dict[str, dict[str, Pair]],
) -> dict[str, float]:
    """Return the mean share over layers and batches, for each basis."""
    sums: dict[str, list[float]] = {name: [] for name in bases}
    for layer, grad in _gradients(model, linears, shown):
        for name, pairs in bases.items():
            q_out, q_in = pairs[layer]
            share = _energy_share(q_out.mT @ grad @ q_in, DENSITY)
            sums[name].append(share.item())
    return {name: sum(values) / len(values) for name, values in sums.items()}


def _basis(gram: Tensor) -> Tensor:
    """Return the eigenvectors of a Gram matrix as columns, largest eigenvalue first."""
    return torch.linalg.eigh(gram / gram.diagonal().amax()).eigenvectors.flip(-1)


def _energy_share(matrix: Tensor, density: float) -> Tensor:
    """Return the share of the squared Frobenius norm that the largest entries hold, a () tensor."""
    # The ratio to the largest entry: squares neither overflow nor vanish.
    energy = (matrix / matrix.abs().amax()).square().flatten()
    k = max(1, round(density * energy.numel()))
    return energy.topk(k, sorted=False).values.sum() / energy.sum()
