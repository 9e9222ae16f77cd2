"""Runs beside one another: seeds share a row with their standard error; a cut-off set goes on."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from integration.test_cli import invoke, plain
from integration.test_run import Interrupt

import leantune as lt
from leantune.cli.compare import compare_runs
from leantune.training.results import RunResult

HOW = {"task": "text", "max_steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 1e-3}
WTA = {"method": "wta_crs", "keep_ratio": 0.5, "min_rows": 2}


@pytest.fixture
def pairs(model_folder: Path, data_folder: Path, tmp_path: Path) -> list[str]:
    options = {**HOW, "model": model_folder, "data": data_folder, "output": tmp_path / "runs"}
    return [f"{name}={value}" for name, value in options.items()]


def test_seeds_become_one_row_with_their_standard_error(pairs: list[str], tmp_path: Path) -> None:
    how = ("train", *pairs, "compare=baseline", "--method", "wta_crs", "min_rows=2")
    found = invoke(*how, "--seeds", "0,1", "--json")
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)["rows"]
    folders = [tmp_path / "runs" / f"seed-{seed}" for seed in range(2)]
    assert [row["name"] for row in rows] == ["baseline", "wta_crs"]
    for at, row in enumerate(rows):
        runs = [RunResult.read(folder).runs[at] for folder in folders]
        losses = [run.metrics["loss"] for run in runs]
        assert len(set(losses)) == 2 and row["seeds"] == [0, 1]
        assert row["loss"]["mean"] == pytest.approx(statistics.mean(losses))
        error = statistics.stdev(losses) / 2**0.5
        assert row["loss"]["standard_error"] == pytest.approx(error)
        saved = statistics.mean(run.saved_bytes for run in runs)
        assert row["saved_bytes"]["mean"] == pytest.approx(saved)
        assert row["accuracy"]["mean"] <= 1 and row["peak_bytes"] is None
    assert compare_runs([tmp_path / "runs"]) == rows == compare_runs(folders)
    shown = plain(invoke("compare", tmp_path / "runs").stdout)
    loss = rows[1]["loss"]
    assert f"{loss['mean']:.4f} ± {loss['standard_error']:.4f}" in shown and "peak" not in shown
    assert json.loads(invoke("compare", folders[0], "--json").stdout)["rows"][0]["seeds"] == [0]


def test_runs_that_differ_in_more_than_the_seed_have_rows_of_their_own(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    same: dict[str, Any] = {**HOW, "model": model_folder, "data": data_folder}
    for name, methods in (("a", [WTA]), ("b", [WTA | {"keep_ratio": 0.25}])):
        lt.train(same, methods=methods, compare=["baseline"], output=tmp_path / name)
    lt.train(same, methods=[WTA], learning_rate=2e-3, output=tmp_path / "c", seed=1)
    rows = compare_runs([tmp_path / name for name in "abc"])
    # The baseline of one seed is one training, however many runs have it.
    assert [(row["name"], [Path(run).name for run in row["runs"]]) for row in rows] == [
        ("baseline", ["a"]),
        ("wta_crs", ["a"]),
        ("wta_crs", ["b"]),
        ("wta_crs", ["c"]),
    ]
    other = json.loads((tmp_path / "c" / "metrics.json").read_text()) | {"main_metric": "f1"}
    (tmp_path / "c" / "metrics.json").write_text(json.dumps(other))
    refused = invoke("compare", tmp_path / "a", tmp_path / "c")
    assert refused.exit_code == 2 and "judged by one metric, got accuracy" in plain(refused.stderr)
    assert invoke("compare", tmp_path).exit_code == 2


def test_an_interrupted_set_of_seeds_goes_on(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = lt.train

    def stops(recipe: Any, dry_run: bool) -> RunResult:
        return train(recipe, callbacks=[Interrupt(2, "baseline")] if recipe.seed == 1 else [])

    monkeypatch.setattr(lt, "train", stops)
    stopped = invoke("train", *pairs, "--seeds", "0,1,2")
    assert stopped.exit_code == 130
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["seed-0", "seed-1"]
    command = plain(stopped.stderr).partition("resume with: leantune ")[2].split()
    assert command[-2:] == ["--seeds", "0,1,2"] and f"output={tmp_path / 'runs'}" in command
    monkeypatch.setattr(lt, "train", train)
    done = invoke(*command, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("seeds", ["", "0,0", "0,x", "-1", "1,01"])
def test_seeds_are_different_whole_numbers(pairs: list[str], seeds: str, tmp_path: Path) -> None:
    refused = invoke("train", *pairs, f"--seeds={seeds}")
    assert refused.exit_code == 2 and "seeds must be different" in plain(refused.stderr)
    assert not (tmp_path / "runs").exists()
