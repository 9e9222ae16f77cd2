"""Fill the tables of the pages from the committed rows, between markers."""

import io
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import zoo

from bench import rows
from bench.cases import models, sparse_grad_quality, spt_language, spt_quality, wta_crs_quality
from leantune.cli.sites import print_survey
from leantune.core.disk import write_atomic
from leantune.core.survey import survey
from leantune.training.models import build_model

ROOT = Path(__file__).parents[1]

RETIRED = frozenset(
    {
        "LoRA 16 + routed 2 of 4, prototype's gate",
        "LoRA 16 + routed 2 of 4, grouped",
        "LoRA 16 + routed 2 of 4, loop",
        "SPT 128 keys",
        "exact norms, rows in random order",
        "exact norms, rule 'variance'",
        "exact norms, centred",
        "exact norms, rank 4 exact, equal storage",
        "exact norms, rank 16 exact, equal storage",
        "running, rank 4 exact, equal storage",
    }
)
"""Variants whose option is gone: their rows stay as the reason why, and no table shows them."""


def main() -> None:
    """Rewrite every ``<!-- NAME -->`` ... ``<!-- /NAME -->`` block of the pages."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text("utf-8") for page in pages}
    for name, make in _TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        holders = [page for page, text in texts.items() if block.search(text)]
        if not holders:
            raise ValueError(f"readme: a page must have markers of {name!r}, got none; add them")
        table = make()
        for page in holders:
            texts[page] = block.sub(lambda m, t=table: m[1] + t + "\n" + m[2], texts[page])
    for page, text in texts.items():
        write_atomic(page, text)


def _read(name: str, key: str = "variant") -> list[dict[str, Any]]:
    """Return the rows of what can be chosen today."""
    return [row for row in rows.read(name) if row[key] not in RETIRED]


def speed() -> str:
    """Return one table per measured case: time, saved bytes and, on a GPU, the peak."""
    found = rows.read("wta_crs_speed")
    parts = []
    for case in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == case]
        heads = {"variant": "", "time": "step time", "saved": "saved for backward"}
        if of_case[0]["peak_mib"] is not None:
            heads["peak"] = "peak above weights"
        lines = [
            {
                "variant": r["variant"],
                "time": _spread(r),
                "saved": f"{r['saved_mib']:.0f} MiB ({r['saved_ratio']:.2f})",
                "peak": f"{r['peak_mib']} MiB",
            }
            for r in of_case
        ]
        device = of_case[0]["device"]
        parts.append(f"{case} tokens, forward + backward, {device}:\n\n{rows.table(lines, heads)}")
    return "\n\n".join(parts)


def _spread(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})"


def sparse_grad() -> str:
    """Return one table per case: step time and bytes of SparseGrad and its rivals."""
    found = rows.read("sparse_grad_speed")
    parts = []
    for case in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == case]
        num_layers, device = of_case[0]["num_layers"], of_case[0]["device"]
        heads = {
            "variant": "",
            "time": "step time",
            "bytes": f"gradients, state, bases, indices: MLP weights of {num_layers} layers",
            "fewer": "times fewer than AdamW",
            "saved": "saved for backward",
        }
        lines = [
            {
                "variant": r["variant"],
                "time": _spread(r),
                "bytes": f"{r['mlp_bytes'] / 2**20:.1f} MiB",
                "fewer": f"{r['fewer']:.1f}",
                "saved": f"{r['saved_mib']:.0f} MiB",
            }
            for r in of_case
        ]
        title = f"{case} tokens, forward + backward + optimiser, {device}"
        parts.append(f"{title}:\n\n{rows.table(lines, heads)}")
    return "\n\n".join(parts)


def energy() -> str:
    """Return the share of held-out gradient energy in the top 1 % of entries, by basis."""
    found = rows.read("sparse_grad_energy")
    bases = [k for k in found[0] if isinstance(found[0][k], float) and k != "density"]
    lines = [{"step": r["step"], **{b: f"{r[b]:.2f}" for b in bases}} for r in found]
    return rows.table(lines, {"step": "steps after calibration"} | {b: b for b in bases})


def routed_ffn() -> str:
    """Return the routed FFNs' step time, relative to the dense FFN under the same LoRA."""
    return _by_case("routed_ffn_speed", _spread)


def attention() -> str:
    """Return time and bytes of sparse attention relative to SDPA, by length."""
    return _by_case(
        "spt_attention_speed", lambda r: f"{r['ratio']:.2f}, {r['attention_mib']:.0f} MiB"
    )


def _by_case(name: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table for each device, with a line for each variant and a column for each case."""
    parts = []
    for device, found in rows.by_device(_read(name)).items():
        cases = dict.fromkeys(r["case"] for r in found)
        cells = {(r["variant"], r["case"]): cell(r) for r in found}
        variants = dict.fromkeys(r["variant"] for r in found)
        lines = [{"variant": v, **{c: cells.get((v, c)) for c in cases}} for v in variants]
        table = rows.table(lines, {"variant": ""} | {c: c for c in cases})
        parts.append(f"{device}:\n\n{table}")
    return "\n\n".join(parts)


def recall() -> str:
    """Return the share of the dense attention mass that the kept keys hold."""
    lines = [
        {"choice": r["choice"], "mass": f"{r['mass']:.2f}", "min": f"{r['mass_min']:.2f}"}
        for r in rows.read("spt_attention_recall")
        if "l1" not in r["choice"] or "w 8, e 16" in r["choice"]
    ]
    return rows.table(lines, {"choice": "choice", "mass": "mean", "min": "worst layer"})


def variance() -> str:
    """Return the estimators on MiniLM's real rows."""
    found = _read("wta_crs_variance_minilm", "probabilities")
    lines = [
        {
            "estimator": r["estimator"],
            "norms": r["probabilities"],
            "variance": f"{r['median']:.2f} ({r['mean']:.2f})",
        }
        for r in found
    ]
    heads = {
        "estimator": "estimator",
        "norms": "probabilities from",
        "variance": "relative variance, median (mean)",
    }
    own = fmean(r["own_median"] for r in found)
    return (
        rows.table(lines, heads)
        + f"\n\nThe mini-batch's own gradient variance on the same scale: {own:.2f}."
    )


def hostile() -> str:
    """Return how many cases of each area ended how, and what was said in each."""
    found = rows.read("hostile")
    areas = dict.fromkeys(r["area"] for r in found)
    outcomes = ("refused", "works", *sorted({r["outcome"] for r in found} - {"refused", "works"}))
    counts = Counter((r["area"], r["outcome"]) for r in found)
    counts += Counter(("all", r["outcome"]) for r in found)
    lines = [{"area": a, **{o: counts[a, o] for o in outcomes}} for a in (*areas, "all")]
    parts = [rows.table(lines, {"area": "area"} | {o: o for o in outcomes})]
    for area in areas:
        keys = ("tried", "outcome", "said")
        lines = [{k: _escape(r[k]) for k in keys} for r in found if r["area"] == area]
        table = rows.table(lines, {k: k for k in keys})
        parts.append(f"## {area.capitalize()}: {len(lines)} cases\n\n{table}")
    return "\n\n".join(parts)


def _escape(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]\\{}])", r"\\\1", text)


def sites(name: str) -> str:
    """Return what ``leantune sites`` prints of the demo model, or of a tiny one of a model type."""
    os.environ["COLUMNS"] = "80"
    with redirect_stdout(io.StringIO()) as printed:
        print_survey(survey(build_model(name) if name == "demo" else zoo.build(name)[0]))
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    return "\n".join(["```text", *lines, "```"])


SURVEYED = ("demo", "llama", "gpt2", "t5", "mixtral")
_TABLES: dict[str, Callable[[], Any]] = {
    "speed": speed,
    "variance": variance,
    "quality": wta_crs_quality.summary,
    "cached-norms": wta_crs_quality.cached,
    "sparse-grad": sparse_grad,
    "sparse-grad-quality": sparse_grad_quality.summary,
    "spt-quality": spt_quality.summary,
    "spt-language": spt_language.summary,
    "energy": energy,
    "routed-ffn": routed_ffn,
    "attention": attention,
    "recall": recall,
    "hostile": hostile,
    **{f"sites-{name}": partial(sites, name) for name in SURVEYED},
    "models": models.summary,
    "model-types": models.types,
}
