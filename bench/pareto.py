"""What the frontier's rows say: a table, a plot and sentences for each kind of device."""

import io
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from bench import quality, rows
from bench.cases import wta_crs_quality
from bench.cases.frontier import BENCH
from bench.cases.wta_crs_speed import COMPILED

Row = dict[str, Any]
KINDS = ("CPU", "GPU")
INK, MUTED, GRID, OURS = "#1b2430", "#5d6978", "#dfe4ea", "#0f766e"
_REAL = "MiniLM"
"""Begins the name of the case whose variants have rows of quality."""
_AS_GOOD_AS = {
    "LoRA + checkpointing": "LoRA",
    **dict.fromkeys(("plain", "checkpointing", *COMPILED), "exact"),
}
"""Variant -> recipe of the quality rows with the same gradients; others by their own name."""


def is_ours(row: Row) -> bool:
    """Return whether a row is of a method that only this library has."""
    return "WTA-CRS" in row["variant"]


def frontier(found: Iterable[Row]) -> list[Row]:
    """Return the rows than which none is at least as small and as fast, and better in one."""
    found = list(found)

    def beats(a: Row, b: Row) -> bool:
        ours, theirs = ((r["saved_bytes"], r["ratio"]) for r in (a, b))
        return ours != theirs and all(x <= y for x, y in zip(ours, theirs, strict=True))

    return [row for row in found if not any(beats(other, row) for other in found)]


def cases(kind: str) -> dict[str, list[Row]]:
    """Return case -> rows of one kind of device and of plain training's run, the fastest first."""
    read = [row for row in rows.read("frontier") if rows.kind(row) == kind]
    found: dict[str, list[Row]] = {}
    for plain in (row for row in read if row["variant"] == "plain"):
        case, origin = plain["case"], rows.origin(plain)
        run = [row for row in read if row["case"] == case and rows.origin(row) == origin]
        found[case] = sorted(run, key=lambda row: row["ratio"])
    return found


def first_page() -> str:
    """Return plots and sentences, as the README shows them."""
    parts = [f"{_image(kind, 'docs/')}\n\n{words(kind)}" for kind in KINDS if cases(kind)]
    return "\n\n".join(parts) or quality.NO_ROWS


def whole_page() -> str:
    """Return plots, sentences and tables, as the page of results shows them."""
    parts = []
    for kind in KINDS:
        found = cases(kind)
        if found:
            parts += [_image(kind), words(kind)]
            parts += [
                rows.by_device(
                    of_case, _table, f"{case}, whole steps, commit {of_case[0]['commit']}"
                )
                for case, of_case in found.items()
            ]
    return "\n\n".join(parts) or quality.NO_ROWS


def file_name(kind: str) -> str:
    """Return what the plot of a kind of device is called."""
    return f"frontier-{kind.lower()}.svg"


def _image(kind: str, folder: str = "") -> str:
    text = f"Saved bytes and step time of every method on a {kind}, as shares of plain training"
    return f"![{text}]({folder}{file_name(kind)})"


def words(kind: str) -> str:
    """Say for each case who is both smaller and faster than one of ours, and who has no row."""
    planned = {case.name: case.variants for case in BENCH.cases(False)}
    lines = []
    for case, of_case in cases(kind).items():
        losses = []
        for row in filter(is_ours, of_case):
            better = [
                other["variant"]
                for other in of_case
                if not is_ours(other)
                and other["saved_bytes"] < row["saved_bytes"]
                and other["ratio"] < row["ratio"]
            ]
            if better:
                losses.append(f"**{row['variant']}**: {'; '.join(better)}")
        ours = [row["variant"] for row in frontier(of_case) if is_ours(row)]
        text = f"- {case}. Ours on the frontier: {'; '.join(ours) or 'none'}."
        if losses:
            text += f" Both smaller and faster than {', than '.join(losses)}."
        else:
            text += " Nothing else is both smaller and faster than one of ours."
        missing = [v for v in planned.get(case, ()) if all(v != r["variant"] for r in of_case)]
        if missing:
            text += f" Left out: {'; '.join(missing)}."
        lines.append(text)
    return "\n".join(lines)


def _table(of_case: list[Row]) -> str:
    heads = {
        "name": "in bold: on the frontier",
        "time": "step time",
        "saved": "saved for backward",
        "state": "gradients, optimiser state",
    }
    if of_case[0]["peak_mib"] is not None:
        heads["peak"] = "what a step adds at its peak"
    if of_case[0]["case"].startswith(_REAL):
        heads |= {task: quality.HEADS[task] for task in ("sst2", "stsb")}
    best = frontier(of_case)
    lines = [
        {
            "name": f"**{r['variant']}**" if r in best else r["variant"],
            "time": rows.spread(r),
            "saved": f"{r['saved_mib']:.0f} MiB ({r['saved_ratio']:.2f})",
            "state": f"{r['state_bytes'] / 2**20:.0f} MiB",
            "peak": f"{r['peak_mib']} MiB",
            "sst2": _quality(r["variant"], "sst2"),
            "stsb": _quality(r["variant"], "stsb"),
        }
        for r in of_case
    ]
    return rows.table(lines, heads)


def _quality(variant: str, task: str) -> str | None:
    recipe = _AS_GOOD_AS.get(variant, variant)
    values = {
        r["seed"]: 100 * r["metric"]
        for r in rows.read(wta_crs_quality.RESULT)
        if (r["task"], r["recipe"], rows.kind(r)) == (task, recipe, "CPU")
    }
    return quality.cell(values, None) if values else None


_LEFT, _PLOT, _LETTER = 0.62, 2.3, 0.08
"""Inches left of an axes, of an axes, and of a letter of the names right of it."""
_LINE, _HEAD, _ABOVE, _BELOW = 0.175, 0.25, 0.3, 0.5
"""Inches between names, of the head line, above an axes and below it."""


def draw(kind: str) -> str:
    """Return one SVG with a plot for each case: saved bytes to the right, step time upwards.

    Places are computed from the rows alone, so that the same rows give the same file.
    """
    found = cases(kind)
    heights = [max(2.2, _LINE * (len(of_case) + 1)) for of_case in found.values()]
    total = _HEAD + sum(heights) + len(heights) * (_ABOVE + _BELOW)
    longest = max(len(_label(row)) for of_case in found.values() for row in of_case)
    width = _LEFT + _PLOT + _LETTER * (longest + 3)
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "leantune", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(width, total))
        FigureCanvasSVG(figure)
        top = total - _HEAD
        said = "filled: on the frontier; green: ours"
        figure.text(_LEFT / width, 1 - 0.2 / total, said, fontsize=9.5, color=MUTED)
        for (case, of_case), height in zip(found.items(), heights, strict=True):
            bottom = top - _ABOVE - height
            place = (_LEFT / width, bottom / total, _PLOT / width, height / total)
            _draw_case(figure.add_axes(place), case, of_case, _LINE / height)
            top = bottom - _BELOW
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines.
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _draw_case(axes: Axes, case: str, of_case: list[Row], gap: float) -> None:
    """Draw the rows of one case.

    Args:
        axes: drawn on.
        case: the title.
        of_case: the rows, the fastest first.
        gap: between names, as a share of the height.
    """
    shares = [row["saved_bytes"] / _plain(of_case)["saved_bytes"] for row in of_case]
    times = [row["ratio"] for row in of_case]
    low, high = min(times), max(times)
    margin = 0.06 * (high - low or 1)
    low, high = low - margin, high + margin
    axes.set_title(case, loc="left", fontsize=10, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 1.3, max(shares) * 1.3)
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("saved bytes", fontsize=9.5, color=MUTED, labelpad=2)
    axes.set_ylabel("step time / plain", fontsize=9.5, color=MUTED, labelpad=3)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    best = frontier(of_case)
    heights = _apart([(time - low) / (high - low) for time in times], gap)
    for row, share, height in zip(of_case, shares, heights, strict=True):
        colour = OURS if is_ours(row) else MUTED
        inside = colour if row in best else "white"
        axes.plot(share, row["ratio"], "o", ms=6, mec=colour, mfc=inside)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(
            _label(row),
            (share, row["ratio"]),
            (1.08, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color=colour,
            arrowprops=line,
        )


def _label(row: Row) -> str:
    return row["variant"].replace("memory budget", "budget")


def _plain(of_case: list[Row]) -> Row:
    (row,) = (row for row in of_case if row["variant"] == "plain")
    return row


def _apart(wanted: list[float], gap: float) -> list[float]:
    """Return ascending heights near the wanted ones, a gap apart or more, at most 1."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else max(height, 0.0))
    ceiling = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    return heights
