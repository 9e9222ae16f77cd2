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

from bench import host, pareto, rows
from bench.cases import launches as block_launches
from bench.cases import (
    llm_quality,
    models,
    quantised_bytes,
    routed_ffn_error,
    sparse_grad_quality,
    spt_language,
    spt_quality,
    spt_smollm,
    spt_smollm_recall,
    wta_crs_quality,
)
from bench.quality import NO_ROWS
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
    """Rewrite every ``<!-- NAME -->`` ... ``<!-- /NAME -->`` block of the pages, and the plots."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text("utf-8") for page in pages}
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        holders = [page for page, text in texts.items() if block.search(text)]
        if not holders:
            raise ValueError(f"readme: a page must have markers of {name!r}, got none; add them")
        table = make()
        for page in holders:
            texts[page] = block.sub(lambda m, t=table: m[1] + t + "\n" + m[2], texts[page])
    for kind in filter(pareto.cases, pareto.KINDS):
        write_atomic(ROOT / "docs" / pareto.file_name(kind), pareto.draw(kind))
    for page, text in texts.items():
        write_atomic(page, text)


def _read(name: str, key: str = "variant") -> list[dict[str, Any]]:
    """Return the rows of what can be chosen today."""
    return [row for row in rows.read(name) if row[key] not in RETIRED]


def headlines(kind: str) -> str:
    """Return what the rows of a kind of device say first, and nothing where there are none."""
    found: list[dict[str, Any]] = []
    for title, result, case, variants in _HEADLINES:
        of_case = [r for r in rows.read(result) if r["case"] == case and rows.kind(r) == kind]
        # The reference is the first of a run.
        saved = {r["device"]: r["saved_bytes"] for r in reversed(of_case)}
        for row in of_case:
            if row["variant"] in variants:
                share = f"{row['saved_bytes'] / saved[row['device']]:.2f}"
                found.append(
                    row | {"work": title or case, "time": rows.spread(row), "saved": share}
                )

    def lay_out(lines: list[dict[str, Any]]) -> str:
        heads = {"work": "work", "variant": "method", "time": "step time"}
        return rows.table(lines, heads | {"saved": "saved bytes"})

    return rows.by_device(found, lay_out)


_OURS = ("checkpointing", "WTA-CRS 0.1", "checkpointing + WTA-CRS 0.1")
_RIVALS = ("Liger", "Liger + checkpointing", "torch.compile", "torch.compile, memory budget 0.1")
_PARTS = ("MLP recomputed + WTA-CRS 0.1",)
_ON_LIGER = tuple(f"Liger + {name}" for name in (*_OURS[1:], *_PARTS))
_BLOCKS = ("SPT 1/8, blocks",)
_HEADLINES = (
    ("", "wta_crs_speed", "GPT-2 block x 4, 16 x 128", _OURS),
    ("", "wta_crs_speed", "BERT-base block x 4, 16 x 128", _OURS),
    (
        "",
        "wta_crs_speed",
        "Llama-1B x 16, 8 x 2048, bf16",
        (*_OURS, *_PARTS, *_RIVALS, *_ON_LIGER),
    ),
    ("", "wta_crs_speed", "BERT-base x 12, 64 x 512, bf16", (*_OURS, *_RIVALS)),
    (
        "Llama-1B x 16, 4 x 2048, bf16, with AdamW",
        "sparse_grad_speed",
        "Llama-1B x 16, 4 x 2048, bf16",
        ("LoRA 16 on the MLP", "SparseGrad, block"),
    ),
    *(
        (f"attention, {case}", "spt_attention_speed", case, _BLOCKS)
        for case in (f"16 heads of 64, n = {n}" for n in (8192, 32768, 131072))
    ),
    ("", "routed_ffn_speed", "Llama FFN 4096, 16384 tokens, bf16", ("LoRA 16 + routed 2 of 4",)),
)
"""Work (the case, if empty), result file, case, variants: the rows of the first page."""


def _of_cases(name: str, lay_out: Callable[[list[dict[str, Any]]], str], what: str) -> str:
    """Return a table for each case, device and commit: what ran together stands together."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _read(name):
        runs.setdefault((row["case"], row["commit"]), []).append(row)
    return "\n\n".join(
        rows.by_device(run, lay_out, f"{case}, {what}, commit {commit}")
        for (case, commit), run in runs.items()
    )


def speed() -> str:
    """Return one table per measured case: time, saved bytes and, on a GPU, the peak."""

    def lay_out(of_case: list[dict[str, Any]]) -> str:
        heads = {"variant": "", "time": "step time", "saved": "saved for backward"}
        if of_case[0]["peak_mib"] is not None:
            heads["peak"] = "peak above weights and gradients"
        lines = [
            {
                "variant": r["variant"],
                "time": rows.spread(r),
                "saved": f"{r['saved_mib']:.0f} MiB ({r['saved_ratio']:.2f})",
                "peak": f"{r['peak_mib']} MiB",
            }
            for r in of_case
        ]
        return rows.table(lines, heads)

    return _of_cases("wta_crs_speed", lay_out, "forward + backward")


def sparse_grad() -> str:
    """Return one table per case: step time and bytes of SparseGrad and its rivals."""

    def lay_out(of_case: list[dict[str, Any]]) -> str:
        num_layers = of_case[0]["num_layers"]
        heads = {
            "variant": "",
            "time": "step time",
            "bytes": f"gradients, state, bases: MLP weights of {num_layers} layers",
            "fewer": "times fewer than AdamW",
            "saved": "saved for backward",
        }
        lines = [
            {
                "variant": r["variant"],
                "time": rows.spread(r),
                "bytes": f"{r['mlp_bytes'] / 2**20:.1f} MiB",
                "fewer": f"{r['fewer']:.1f}",
                "saved": f"{r['saved_mib']:.0f} MiB",
            }
            for r in of_case
        ]
        return rows.table(lines, heads)

    return _of_cases("sparse_grad_speed", lay_out, "forward + backward + optimiser")


def whole_step() -> str:
    """Return one table per model: the peak and the time of whole training steps."""

    def lay_out(of_case: list[dict[str, Any]]) -> str:
        heads = {"variant": "", "time": "step time", "whole_gib": "peak, GiB"}
        lines = [r | {"time": rows.spread(r)} for r in of_case]
        return rows.table(lines, heads | {"fewer": "times fewer than full"})

    return _of_cases("whole_step", lay_out, "forward + backward + AdamW") or NO_ROWS


def planned() -> str:
    """Return one table per model: peak and time as planned, and as its steps then took."""

    def lay_out(of_case: list[dict[str, Any]]) -> str:
        heads = {"variant": "", "methods": "methods", "batch": "batch"}
        heads |= {"planned_peak_mib": "peak planned, MiB", "peak_mib": "measured"}
        heads |= {"planned_time": "step time planned", "time": "measured"}
        lines = [
            r | {"planned_time": f"{r['planned_ratio']:.2f}", "time": rows.spread(r)}
            for r in of_case
        ]
        return rows.table(lines, heads)

    return _of_cases("planned", lay_out, "forward + backward + AdamW") or NO_ROWS


def launches() -> str:
    """Return what a block launches, and how long host and GPU need."""
    lay_out = partial(rows.table, columns=block_launches.COLUMNS)
    return _of_cases("launches", lay_out, "forward + backward") or NO_ROWS


def host_costs() -> str:
    """Return operations, launches and host time of a linear and a block, before and now."""
    lines = []
    for row in (found := rows.read(host.RESULT)):
        same = [r for r in found if all(r[k] == row[k] for k in ("case", "variant"))]
        before, now = (next(r for r in same if (r["source"] == "now") is n) for n in (False, True))
        if row is now:
            pairs = {k: f"{before[k]:.0f} -> {now[k]:.0f}" for k in host.COUNTED}
            lines.append(row | pairs)
    return rows.by_device(lines, partial(rows.table, columns=host.COLUMNS))


def energy() -> str:
    """Return the share of held-out gradient energy in the top 1 % of entries, by basis."""
    found = rows.read("sparse_grad_energy")
    bases = [k for k in found[0] if isinstance(found[0][k], float) and k != "density"]
    heads = {"step": "steps after calibration"} | {b: b for b in bases}
    lines = [r | {b: f"{r[b]:.2f}" for b in bases} for r in found]
    return rows.by_device(lines, partial(rows.table, columns=heads))


def routed_ffn() -> str:
    """Return the routed FFNs' step time, relative to the dense FFN under the same LoRA."""
    return _by_case("routed_ffn_speed", rows.spread)


def attention() -> str:
    """Return time and bytes of sparse attention relative to SDPA, by length."""
    return _by_case(
        "spt_attention_speed", lambda r: f"{r['ratio']:.2f}, {r['attention_mib']:.0f} MiB"
    )


def _by_case(name: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table for each device, with a line for each case and a column for each variant."""

    def lay_out(found: list[dict[str, Any]]) -> str:
        lines: dict[str, dict[str, str]] = {}
        for row in found:
            line = lines.setdefault(row["case"], {"case": row["case"]})
            line[row["variant"]] = cell(row)
        heads = {"case": ""} | {r["variant"]: r["variant"] for r in found}
        return rows.table(list(lines.values()), heads)

    return rows.by_device(_read(name), lay_out)


def recall() -> str:
    """Return the share of the dense attention mass that the kept keys hold."""
    lines = [
        r | {"mass": f"{r['mass']:.2f}", "min": f"{r['mass_min']:.2f}"}
        for r in rows.read("spt_attention_recall")
        if "l1" not in r["choice"] or "w 8, e 16" in r["choice"]
    ]
    heads = {"choice": "choice", "mass": "mean", "min": "worst layer"}
    return rows.by_device(lines, partial(rows.table, columns=heads))


def variance() -> str:
    """Return the estimators on MiniLM's real rows."""
    heads = {
        "estimator": "estimator",
        "probabilities": "probabilities from",
        "variance": "relative variance, median (mean)",
    }

    def lay_out(found: list[dict[str, Any]]) -> str:
        lines = [r | {"variance": f"{r['median']:.2f} ({r['mean']:.2f})"} for r in found]
        own = fmean(r["own_median"] for r in found)
        text = f"The mini-batch's own gradient variance on the same scale: {own:.2f}."
        return f"{rows.table(lines, heads)}\n\n{text}"

    return rows.by_device(_read("wta_crs_variance_minilm", "probabilities"), lay_out)


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
TABLES: dict[str, Callable[[], Any]] = {
    "headlines-cpu": partial(headlines, "CPU"),
    "headlines-gpu": partial(headlines, "GPU"),
    "speed": speed,
    "variance": variance,
    "quality": wta_crs_quality.summary,
    "cached-norms": wta_crs_quality.cached,
    "sparse-grad": sparse_grad,
    "sparse-grad-quality": sparse_grad_quality.summary,
    "sparse-grad-quality-long": sparse_grad_quality.long_summary,
    "spt-quality": spt_quality.summary,
    "spt-language": spt_language.summary,
    "smollm-attention": spt_smollm.attention,
    "smollm-routed": spt_smollm.routed,
    "smollm-recall": spt_smollm_recall.summary,
    "llm-quality": llm_quality.summary,
    "quantised-bytes": quantised_bytes.summary,
    "whole-step": whole_step,
    "planned": planned,
    "launches": launches,
    "host": host_costs,
    "frontier-plots": pareto.first_page,
    "frontier": pareto.whole_page,
    "energy": energy,
    "routed-ffn": routed_ffn,
    "routed-ffn-error": routed_ffn_error.summary,
    "attention": attention,
    "recall": recall,
    "hostile": hostile,
    **{f"sites-{name}": partial(sites, name) for name in SURVEYED},
    "models": models.summary,
    "model-types": models.types,
}
