"""Fill the README's tables from the committed result rows, between their markers."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import rows, wta_crs_quality
from leantune.core.state import write_atomic

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Rewrite every ``<!-- NAME -->`` ... ``<!-- /NAME -->`` block of the README."""
    text = README.read_text("utf-8")
    for name, make in _TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not block.search(text):
            raise ValueError(f"README: markers must hold {name!r}, got none; add them")
        table = make()
        text = block.sub(lambda m, t=table: m.group(1) + t + "\n" + m.group(2), text)
    write_atomic(README, text)


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
                "time": f"{r['ratio']:.2f} ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})",
                "saved": f"{r['saved_mib']:.0f} MiB ({r['saved_ratio']:.2f})",
                "peak": f"{r['peak_mib']} MiB",
            }
            for r in of_case
        ]
        device = of_case[0]["device"]
        parts.append(f"{case} tokens, forward + backward, {device}:\n\n{rows.table(lines, heads)}")
    return "\n\n".join(parts)


def variance() -> str:
    """Return the estimators on MiniLM's real rows."""
    found = rows.read("wta_crs_variance_minilm")
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


_TABLES: dict[str, Callable[[], Any]] = {
    "speed": speed,
    "variance": variance,
    "quality": wta_crs_quality.summary,
}
