"""A report: self-contained, right in its numbers, whole or not at all."""

import copy
import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import bert

import leantune as lt
from leantune.report.figures import (
    GROUPS,
    LEDGERS,
    Bars,
    all_bars,
    all_curves,
    block_of,
    place_in_block,
    saved_table,
)
from leantune.report.page import _recipe_rows, headline, write_report
from leantune.training.results import RunResult


def make_metrics() -> dict[str, Any]:
    """Return what a run with ``compare="baseline"`` writes, with the ledgers of a real step."""
    model = bert()
    ids = torch.randint(5, 64, (8, 16))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1] * 4)}
    method = lt.WTACRS(keep_ratio=0.25)
    ledgers = {"baseline": lt.ledger(model, batch)}
    lt.apply(model, method)
    ledgers["wta_crs"] = lt.ledger(model, batch)
    runs = [
        {
            "name": name,
            "methods": [] if name == "baseline" else [method.to_dict()],
            "saved_bytes": ledgers[name].activations,
            "step_ms": step_ms,
            "step_time_ratio": ratio,
            "step_time_ratio_spread": [ratio - 0.02, ratio + 0.03],
            "ledger": ledgers[name].to_dict(),
            "metrics": {"accuracy": accuracy, "loss": 0.43},
            "train_loss": [[step, 0.7 - step / 1000] for step in range(10, 410, 10)],
            "evaluations": [[200, {"accuracy": 0.7}], [400, {"accuracy": accuracy}]],
            "num_steps": 400,
            "train_seconds": 131.2,
            "peak_bytes": None,
        }
        for name, accuracy, step_ms, ratio in (
            ("baseline", 0.8312, 210.0, 1.0),
            ("wta_crs", 0.8275, 168.0, 0.8),
        )
    ]
    return {
        "format": 2,
        "versions": {"leantune": "0.2.0", "torch": "2.13.0"},
        "device": "cpu (2 threads)",
        "model": "some/model",
        "task": "sst2",
        "main_metric": "accuracy",
        "floor": {"name": "majority", "value": 0.5093},
        "num_train": 6000,
        "num_validation": 872,
        "seed": 0,
        "runs": runs,
        "plan": None,
        "labels": ["unacceptable", "acceptable"],
    }


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return make_metrics()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, Any]) -> Path:
    """The folder of a run with its report."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    recipe = {"format": 2, "model": "some/model", "methods": metrics["runs"][1]["methods"]}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same run before its report."""
    for name in ("metrics.json", "recipe.json"):
        shutil.copy(written / name, tmp_path)
    return tmp_path


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        names = ("src", "href", "srcset", "xlink:href")
        self.references += [value for name in names if (value := named.get(name)) is not None]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_fetches_nothing_and_runs_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    page = _Page(text)
    # The icon is empty, so that no browser asks a server for one.
    assert page.references == ["data:,"]
    assert not {"script", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "@import" not in text and "url(" not in text
    names = {path.name for path in written.iterdir()}
    assert names == {"metrics.json", "recipe.json", "report.html"}


def test_every_figure_is_also_told_in_words(written: Path) -> None:
    page = _Page((written / "report.html").read_text())
    text = re.sub(r"\s+", " ", page.text)
    plots = [named for tag, named in page.tags if tag == "svg"]
    assert len(plots) == 2 and all(plot["role"] == "img" for plot in plots)
    words = [str(plot["aria-label"]) for plot in plots]
    assert "baseline from 0.69 at 10 to 0.3 at 400; wta_crs from" in words[0]
    assert "majority from 0.5093 at 0" in words[1]
    tracks = [named for _, named in page.tags if named.get("class") == "track"]
    assert tracks and all(named["aria-hidden"] == "true" for named in tracks)
    for bars in all_bars(RunResult.read(written)):
        assert bars.title in text and bars.hint in text
        for name, row in bars.rows.items():
            assert name in text
            assert all(
                bar.text in text and (bar.name in (name,) or bar.name in text) for bar in row
            )


def test_colours_are_variables_of_both_themes(written: Path) -> None:
    text = (written / "report.html").read_text()
    body = text.partition("<body>")[2]
    assert not re.search(r"#[0-9a-f]{3,8}\b", body)
    used = set(re.findall(r'class="(c\d)"', body))
    assert used == {"c0", "c1", "c2", "c3", "c4"} and all(f".{name} {{" in text for name in used)
    assert all(text.count(f"--run-{number}: #") == 2 for number in range(5))


def test_page_shows_the_numbers_of_both_runs(written: Path, metrics: dict[str, Any]) -> None:
    text = re.sub(r"\s+", " ", _Page((written / "report.html").read_text()).text)
    saved = [run["saved_bytes"] for run in metrics["runs"]]
    for figure in (
        "0.8312",
        "0.8275",
        "-0.0037",
        "Without learning (majority): accuracy 0.5093",
        f"{saved[1] / saved[0]:.3f} of baseline",
        "0.780 to 0.830",
        "2 min 11 s",
        "6,000 training and 872 validation examples, 400 steps",
        "keep_ratio=0.25",
        "bert.encoder.layer.1",
        "cpu (2 threads)",
    ):
        assert figure in text, figure


def test_page_shows_every_ledger_with_its_ratio(folder: Path, metrics: dict[str, Any]) -> None:
    """A method that saves no activations shows what it saves."""
    lean = copy.deepcopy(metrics)
    plain, own = lean["runs"]
    plain["peak_bytes"], own["peak_bytes"] = 4 << 30, 3 << 30
    own["ledger"]["optimizer"] = own["ledger"]["gradients"] = plain["ledger"]["gradients"] // 100
    (folder / "metrics.json").write_text(json.dumps(lean))
    result = RunResult.read(folder)
    _, rows = headline(result)
    notes = {row[0].text: row[2].note for row in rows}
    small = 2 * own["ledger"]["optimizer"]
    large = plain["ledger"]["gradients"] + plain["ledger"]["optimizer"]
    assert notes["gradients + optimizer"] == f"{small / large:.3f} of baseline"
    assert notes["weights"] == "1.000 of baseline" and notes["peak"] == "0.750 of baseline"
    assert notes["step time"] == "0.800 of baseline\n0.780 to 0.830"
    text = write_report(folder).read_text().partition("<section>")[0]
    assert text.count('class="card"') == 5 and "3 GiB" in text and "0.750 of baseline" in text


def test_every_option_of_the_recipe_is_on_the_page() -> None:
    recipe = {"format": 2, "compare": [], "max_steps": None, "seed": 0, "methods": []}
    assert dict(_recipe_rows(recipe)) == {
        "format": "2",
        "compare": "none",
        "max_steps": "none",
        "seed": "0",
    }


def test_one_evaluation_makes_no_curve(metrics: dict[str, Any], folder: Path) -> None:
    once = copy.deepcopy(metrics)
    for run in once["runs"]:
        run["evaluations"], run["train_loss"] = run["evaluations"][-1:], run["train_loss"][:1]
    (folder / "metrics.json").write_text(json.dumps(once))
    text = write_report(folder).read_text()
    assert "0.8312" in text and "<svg" not in text and "Training loss" not in text


def test_curves_lie_within_their_square(written: Path) -> None:
    loss, accuracy = all_curves(RunResult.read(written))
    assert loss.ys == ["0.69", "0.495", "0.3"] and loss.xs == ["0", "200", "400"]
    for _, points in [*loss.lines, *accuracy.lines]:
        places = [float(value) for value in re.split("[ ,]", points)]
        assert min(places) >= 0 and max(places) <= 100
    # From the highest on the left down to the lowest on the right.
    assert loss.lines[0][1].startswith("2.50,0.00 ") and loss.lines[0][1].endswith(" 100.00,100.00")
    assert [name for _, name in accuracy.legend] == ["baseline", "wta_crs", "majority"]


def bars_of(folder: Path, title: str) -> Bars:
    return next(bars for bars in all_bars(RunResult.read(folder)) if bars.title.startswith(title))


def test_ledgers_are_stacked_before_and_after(written: Path, metrics: dict[str, Any]) -> None:
    bars = bars_of(written, "What one training step holds")
    plain, own = (run["ledger"] for run in metrics["runs"])
    total = sum(plain[name] for name in LEDGERS)
    for name, ledger in (("baseline", plain), ("wta_crs", own)):
        ((bar,),) = (bars.rows[name],)
        expected = [100 * ledger[part] / total for part in LEDGERS]
        assert [percent for _, percent in bar.parts] == pytest.approx(expected)
        assert all(f"{part} " in bar.text for part in LEDGERS)


def test_a_plan_is_shown_beside_what_was_measured(metrics: dict[str, Any], folder: Path) -> None:
    assert not any(b.title.startswith("Pred") for b in all_bars(RunResult.read(folder)))
    mib = 1 << 20
    sizes = dict(zip(LEDGERS, (mib, mib, 2 * mib, 4 * mib), strict=True))
    plan = {"budget": 16 * mib, "replanned": True, "relative_time": 1.1}
    plan |= {"predicted": sizes | {"peak": 10 * mib}, "measured": sizes | {"peak": 11 * mib}}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"plan": plan}))
    bars = bars_of(folder, "Predicted and measured")
    assert list(bars.rows) == ["predicted", "measured", "budget"] and "again" in bars.hint
    assert [percent for _, percent in bars.rows["predicted"][0].parts] == [6.25, 6.25, 12.5, 25]
    assert "activations 4 MiB, peak 11 MiB" in bars.rows["measured"][0].text
    assert "16 MiB" in _Page(write_report(folder).read_text()).text


def test_the_last_fidelity_of_each_site_is_shown(metrics: dict[str, Any], folder: Path) -> None:
    found = copy.deepcopy(metrics)
    site = {"relative_variance": 0.5, "cosine": 0.875, "z_score": -1.25}
    steps = [{"a": site | {"relative_variance": 9.0}}, {"a": site, "b": site | {"cosine": 1.0}}]
    found["runs"][1]["fidelity"] = [{"step": n, "sites": sites} for n, sites in enumerate(steps)]
    (folder / "metrics.json").write_text(json.dumps(found))
    bars = bars_of(folder, "Fidelity")
    assert [(name, bar.text, bar.parts) for name, (bar,) in bars.rows.items()] == [
        ("a", "0.5, cosine 0.875, z -1.2", [(1, 100.0)]),
        ("b", "0.5, cosine 1.000, z -1.2", [(1, 100.0)]),
    ]
    assert bars.legend == [(1, "wta_crs")]


def test_tables_scroll_beside_their_first_column(written: Path) -> None:
    """A phone shows 360 pixels: names stay in sight while the figures scroll."""
    text = (written / "report.html").read_text()
    assert len(re.findall(r'<div class="scroll">\s*<table>', text)) == text.count("<table>") == 1
    first = re.search(r"th:first-child, td:first-child \{([^}]*)\}", text)
    assert first is not None and "position: sticky; left: 0" in first[1]
    narrow = text.partition("@media (max-width: 36rem)")[2].partition("@media print")[0]
    assert re.search(r"td:first-child \{ white-space: normal", narrow)


def test_bars_have_a_column_of_their_own_on_a_phone(written: Path) -> None:
    """At 360 pixels a name stands above its bars, so that none is squeezed beside a long one."""
    text = (written / "report.html").read_text()
    narrow = text.partition("@media (max-width: 36rem)")[2].partition("@media print")[0]
    assert ".bars { grid-template-columns: minmax(0, 1fr);" in narrow
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text


def test_second_report_replaces_the_first_with_the_same(folder: Path) -> None:
    first = write_report(folder).read_text()
    assert write_report(folder).read_text() == first


def test_bars_add_up_to_the_saved_bytes(written: Path, metrics: dict[str, Any]) -> None:
    result = RunResult.read(written)
    for name in GROUPS:
        sums = [sum(column) for column in zip(*saved_table(result, name).values(), strict=True)]
        assert sums == [run["saved_bytes"] for run in metrics["runs"]]
    before, after = saved_table(result, "block")["bert.encoder.layer.1"]
    assert after < before


@pytest.mark.parametrize(
    ("module", "block", "place"),
    [
        ("bert.encoder.layer.3.output.dense", "bert.encoder.layer.3", "output.dense"),
        ("bert.encoder.layer.3", "bert.encoder.layer.3", "(block)"),
        ("encoder.block.0.layer.1.mlp", "encoder.block.0", "layer.1.mlp"),
        ("bert.embeddings.word_embeddings", "bert.embeddings", "bert.embeddings.word_embeddings"),
        ("", "(model)", "(model)"),
    ],
)
def test_module_names_are_cut_at_the_block(module: str, block: str, place: str) -> None:
    assert (block_of(module), place_in_block(module)) == (block, place)


def test_a_run_alone_has_no_ratio(folder: Path, metrics: dict[str, Any]) -> None:
    none = {"step_time_ratio": None, "step_time_ratio_spread": None}
    alone = {**metrics, "runs": [metrics["runs"][0] | none], "floor": None}
    (folder / "metrics.json").write_text(json.dumps(alone))
    header, rows = headline(RunResult.read(folder))
    assert header == ["", "baseline"] and not any(cell.note for row in rows for cell in row)
    assert "of baseline" not in _Page(write_report(folder).read_text()).text


def test_odd_numbers_and_names_are_drawn_and_escaped(folder: Path, metrics: dict[str, Any]) -> None:
    odd = copy.deepcopy(metrics) | {"model": "<script>alert(1)</script>"}
    odd["runs"][1]["metrics"] = {"accuracy": float("nan")}
    odd["runs"][1]["train_loss"][3][1] = float("nan")
    odd["runs"][1]["name"] = "<script>"
    odd["runs"][0]["evaluations"] = []
    (folder / "metrics.json").write_text(json.dumps(odd))
    text = write_report(folder).read_text()
    assert "<script" not in text and "nan" in _Page(text).text


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_text(path.read_text()[:500]),
        lambda path: path.write_bytes(b"\xff\xfe{}"),
        lambda path: path.write_text("[]"),
        _edit(lambda data: data.update(format=1)),
        _edit(lambda data: data.pop("main_metric")),
        _edit(lambda data: data.update(runs=[])),
        _edit(lambda data: data["runs"][0].pop("ledger")),
    ],
)
def test_broken_metrics_are_named_and_nothing_is_written(
    folder: Path, damage: Callable[[Path], Any]
) -> None:
    damage(folder / "metrics.json")
    with pytest.raises(lt.ConfigError, match=r"metrics\.json must be what a finished run"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_full_disk_keeps_the_old_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(folder).read_bytes()

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old


def test_results_of_another_type_are_refused(written: Path, tmp_path: Path) -> None:
    metrics = json.loads((written / "metrics.json").read_text())
    metrics["runs"][0]["saved_bytes"] = "many"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(lt.ConfigError, match=r"metrics\.json must be .* saved_bytes must be"):
        RunResult.read(tmp_path)
