"""The report: what it shows comes from metrics.json, nothing else is needed, nothing half done."""

import base64
import copy
import html.parser
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import bert

import leantune
from leantune.measure import ledger
from leantune.report import write_report
from leantune.report.page import headline
from leantune.report.plots import DARK, LIGHT, PLOTS, block_of, place_in_block, saved_table
from leantune.report.results import results_from_dict

FIGURE = {
    "title": "Keys that are kept",
    "note": "Share of all keys.",
    "values": {"kept": 0.625, "left over": 12.345},
}


def make_metrics() -> dict[str, Any]:
    """Return what a run with ``compare="exact"`` writes, with the ledgers of a real step."""
    model = bert()
    ids = torch.randint(5, 64, (8, 16))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1] * 4)}
    ledgers = {"exact": ledger(model, batch)}
    leantune.apply(model, leantune.WTACRS(keep_ratio=0.25))
    ledgers["wta_crs"] = ledger(model, batch)
    runs = [
        {
            "name": name,
            "methods": [] if name == "exact" else [{"method": "wta_crs", "keep_ratio": 0.25}],
            "seed": 0,
            "metrics": {"accuracy": accuracy, "loss": 0.43},
            "train_loss": [[step, 0.7 - step / 1000] for step in range(10, 410, 10)],
            "evaluations": [[200, {"accuracy": 0.7}], [400, {"accuracy": accuracy}]],
            "num_steps": 400,
            "train_seconds": 131.2,
            "tokens_per_second": 5123.4,
            "saved_bytes": ledgers[name].activations,
            "peak_bytes": None,
            "step_ms": step_ms,
            "step_time_ratio": ratio,
            "step_time_ratio_spread": [ratio - 0.02, ratio + 0.03],
            "ledger": ledgers[name].to_dict(),
        }
        for name, accuracy, step_ms, ratio in (
            ("exact", 0.8312, 210.0, 1.0),
            ("wta_crs", 0.8275, 168.0, 0.8),
        )
    ]
    return {
        "format": 1,
        "leantune": "0.1.0",
        "versions": {"torch": "2.13.0", "python": "3.11.9"},
        "device": "cpu (2 threads)",
        "model": "some/model",
        "task": "sst2",
        "main_metric": "accuracy",
        "baseline": {"name": "majority", "value": 0.5093},
        "num_train": 6000,
        "num_validation": 872,
        "runs": runs,
    }


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return make_metrics()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, Any]) -> Path:
    """The folder of a run with its report."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    recipe = {"format": 1, "model": "some/model", "methods": metrics["runs"][1]["methods"]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same run before its report."""
    for name in ("metrics.json", "recipe.json"):
        shutil.copy(written / name, tmp_path)
    return tmp_path


@pytest.fixture
def one_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the loss alone, where the plots do not matter: ten take seconds."""
    monkeypatch.setattr("leantune.report.page.PLOTS", {"loss": PLOTS["loss"]})


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to, its text, and its table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.references += [
            value for key in ("src", "href", "srcset") if (value := named.get(key)) is not None
        ]
        if tag not in ("meta", "img", "source", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_page_is_self_contained_and_well_formed(written: Path) -> None:
    path = written / "report.html"
    page = _Page(path.read_text())
    assert page.open == []
    assert len(page.references) == 2 * len(PLOTS)
    for reference in page.references:
        assert reference.startswith("data:image/png;base64,")
        width, height = png_size(base64.b64decode(reference.partition(",")[2], validate=True))
        assert width > 500 and height > 200
    assert "url(" not in path.read_text()


def test_page_shows_the_figures_of_both_runs(written: Path, metrics: dict[str, Any]) -> None:
    text = re.sub(r"\s+", " ", _Page((written / "report.html").read_text()).text)
    saved = [run["saved_bytes"] for run in metrics["runs"]]
    for figure in (
        "0.8312",
        "0.8275",
        "-0.0037",
        "majority baseline: accuracy 0.5093",
        f"{saved[1] / saved[0]:.3f} of exact",
        "0.800",
        "0.780 to 0.830",
        "5,123",
        "2 min 11 s",
        "6,000 training and 872 validation examples, 400 steps",
        "keep_ratio=0.25",
        "bert.encoder.layer.1",
        "cpu (2 threads)",
    ):
        assert figure in text, figure


def test_plots_lie_beside_the_page_in_both_themes(written: Path) -> None:
    names = {path.name for path in (written / "plots").iterdir()}
    assert names == {f"{name}{theme.suffix}.png" for name in PLOTS for theme in (LIGHT, DARK)}
    left = {path.name for path in written.iterdir()}
    assert left == {"metrics.json", "plots", "recipe.json", "report.html"}


@pytest.mark.usefixtures("one_plot")
def test_second_report_replaces_the_first(folder: Path) -> None:
    first = write_report(folder).read_text()
    (folder / "plots" / "old.png").write_bytes(b"")
    assert write_report(folder).read_text() == first
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "loss-dark.png"}


def test_bars_add_up_to_the_saved_bytes(metrics: dict[str, Any]) -> None:
    results = results_from_dict(metrics)
    for key in (
        lambda entry: block_of(entry["module"]),
        lambda entry: place_in_block(entry["module"]),
        lambda entry: entry["kind"],
    ):
        rows = saved_table(results, key)
        sums = [sum(column) for column in zip(*rows.values(), strict=True)]
        assert sums == [run["saved_bytes"] for run in metrics["runs"]]


def test_sampled_block_saves_less(metrics: dict[str, Any]) -> None:
    rows = saved_table(results_from_dict(metrics), lambda entry: block_of(entry["module"]))
    for number in (0, 1):
        before, after = rows[f"bert.encoder.layer.{number}"]
        assert after < before
    # What no method touches is the same in both.
    assert len(set(rows["bert.embeddings"])) == 1


@pytest.mark.parametrize(
    ("module", "block", "place"),
    [
        ("bert.encoder.layer.3.output.dense", "bert.encoder.layer.3", "output.dense"),
        ("bert.encoder.layer.3", "bert.encoder.layer.3", "(block)"),
        ("model.layers.11.mlp", "model.layers.11", "mlp"),
        ("encoder.block.0.layer.1.mlp", "encoder.block.0", "layer.1.mlp"),
        ("bert.embeddings.word_embeddings", "bert.embeddings", "bert.embeddings.word_embeddings"),
        ("classifier", "classifier", "classifier"),
        ("0.weight", "0", "weight"),
        ("", "(model)", "(model)"),
    ],
)
def test_module_names_are_cut_at_the_block(module: str, block: str, place: str) -> None:
    assert (block_of(module), place_in_block(module)) == (block, place)


@pytest.mark.usefixtures("one_plot")
def test_exact_run_alone_has_no_ratio_columns(folder: Path, metrics: dict[str, Any]) -> None:
    alone = {**metrics, "runs": [metrics["runs"][0] | {"step_ms": None, "step_time_ratio": None}]}
    header, rows = headline(results_from_dict(alone))
    assert "ratio to exact" not in header and "step time" not in header
    assert len(rows) == 1
    (folder / "metrics.json").write_text(json.dumps(alone))
    assert "of exact" not in _Page(write_report(folder).read_text()).text


def test_run_without_curves_or_ledger_still_has_a_page(
    folder: Path, metrics: dict[str, Any]
) -> None:
    bare = copy.deepcopy(metrics)
    bare["baseline"] = None
    for run in bare["runs"]:
        run |= {"train_loss": [], "evaluations": [], "ledger": None, "saved_bytes": None}
    (folder / "metrics.json").write_text(json.dumps(bare))
    page = _Page(write_report(folder).read_text())
    assert page.references == [] and "0.8275" in page.text


@pytest.mark.usefixtures("one_plot")
def test_undefined_figures_are_drawn_and_written(folder: Path, metrics: dict[str, Any]) -> None:
    odd = copy.deepcopy(metrics)
    odd["runs"][1]["metrics"] = {"accuracy": float("nan")}
    odd["runs"][1]["train_loss"][3][1] = float("nan")
    (folder / "metrics.json").write_text(json.dumps(odd))
    assert "nan" in _Page(write_report(folder).read_text()).text


@pytest.mark.usefixtures("one_plot")
def test_a_methods_figures_are_drawn_and_said(folder: Path, metrics: dict[str, Any]) -> None:
    shown = copy.deepcopy(metrics)
    shown["runs"][1]["figures"] = [FIGURE, FIGURE | {"title": "Another <figure>"}]
    (folder / "metrics.json").write_text(json.dumps(shown))
    text = write_report(folder).read_text()
    page = _Page(text)
    assert page.open == [] and FIGURE["note"] in page.text and "Another <figure>" in page.text
    assert "Another <figure>" not in text and "kept 0.625, left over 12.3" in text
    names = {path.name.removesuffix(".png") for path in (folder / "plots").iterdir()}
    figures = {"figure-1", "figure-1-dark", "figure-2", "figure-2-dark"}
    assert names == {"loss", "loss-dark"} | figures
    drawn = (folder / "plots" / "figure-1.png").read_bytes()
    width, height = png_size(drawn)
    assert width > 1000 and height > 200
    # The bars follow the numbers.
    shown["runs"][1]["figures"][0] = FIGURE | {"values": {"kept": 0.1, "left over": 12.345}}
    (folder / "metrics.json").write_text(json.dumps(shown))
    write_report(folder)
    assert (folder / "plots" / "figure-1.png").read_bytes() != drawn


@pytest.mark.usefixtures("one_plot")
def test_names_cannot_inject_markup(folder: Path, metrics: dict[str, Any]) -> None:
    evil = {**metrics, "model": "<script>alert(1)</script>"}
    (folder / "metrics.json").write_text(json.dumps(evil))
    assert "<script" not in write_report(folder).read_text()


def test_drawing_leaves_global_state_of_matplotlib_alone(folder: Path) -> None:
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    write_report(folder)
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def _truncate(path: Path) -> None:
    path.write_text(path.read_text()[:500])


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "must hold metrics.json, got no such file"),
        (_truncate, "must be valid JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "must be valid JSON"),
        (lambda path: path.write_text("[]"), "content must be a mapping"),
        (_edit(lambda d: d.update(format=2)), "format must be at most 1, got 2; .* newer"),
        (_edit(lambda d: d.pop("format")), "format must be integer, got None"),
        (_edit(lambda d: d.pop("main_metric")), "main_metric must be str"),
        (_edit(lambda d: d.update(runs=[])), "runs must be a list of at least one run"),
        (_edit(lambda d: d.update(runs=[3])), "runs must be a list of mappings"),
        (_edit(lambda d: d["runs"][0].update(saved_bytes="5")), "saved_bytes must be integer"),
        (_edit(lambda d: d["runs"][0].update(train_loss=[[1]])), "train_loss must be a list of"),
        (_edit(lambda d: d["runs"][0].update(step_time_ratio_spread=[1])), "spread must be a pair"),
        (_edit(lambda d: d["runs"][1]["ledger"].pop("entries")), "entries must be list"),
        (_edit(lambda d: d["runs"][1].update(figures=[3])), "figures must be a list of mappings"),
        (
            _edit(lambda d: d["runs"][1].update(figures=[FIGURE | {"values": {}}])),
            "values must be a mapping of at least one label to a number",
        ),
        (
            _edit(lambda d: d["runs"][1].update(figures=[FIGURE | {"values": {"a": "1"}}])),
            "values must be a mapping of at least one label to a number",
        ),
        (_edit(lambda d: d["runs"][1].update(figures=[FIGURE | {"note": 1}])), "note must be str"),
        (_edit(lambda d: d["runs"][1]["ledger"]["entries"][0].pop("kind")), "kind must be str"),
    ],
)
def test_broken_metrics_are_named_and_nothing_is_written(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder / "metrics.json")
    with pytest.raises(leantune.ConfigError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists() and not (folder / "plots").exists()


def test_missing_recipe_is_named(folder: Path) -> None:
    (folder / "recipe.json").unlink()
    with pytest.raises(leantune.ConfigError, match=r"must hold recipe\.json"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("one_plot")
def test_failed_drawing_keeps_the_old_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(folder).read_bytes()
    plots = {path.name: path.read_bytes() for path in (folder / "plots").iterdir()}

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    assert {path.name: path.read_bytes() for path in (folder / "plots").iterdir()} == plots
