"""The command: JSON alone on stdout, every mistake named with exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import Interrupt, bert, tokenizer, write_sentences
from typer.testing import CliRunner, Result

import leantune as lt
from leantune.cli.app import app
from leantune.cli.recipe import build_recipe
from leantune.training.recipe import MeasureRecipe, RunRecipe
from leantune.training.results import RunResult

HEAVY = ("torch", "numpy", "transformers", "datasets", "peft", "matplotlib", "jinja2")
MINIMAL = ("model=m", "task=text", "data=d", "output=o")
WTA = ("--method", "wta_crs")


def invoke(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def plain(text: str) -> str:
    """Drop colours and borders, and join wrapped words."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"[\s│]+", " ", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "data"
    return write_sentences(folder, lambda good: "good" if good else "bad")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(
        f"format: 2\nmodel: {model}\ntask: text\ndata: {data}\nbatch_size: 4\nmax_length: 16\n"
        "learning_rate: 1e-3\nmethods:\n  - {method: wta_crs, keep_ratio: 0.5, min_rows: 2}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, Result]:
    """A finished run with comparison, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pairs = ("compare=baseline", "max_steps=4", f"output={folder}", "eval_steps=2")
    result = invoke("train", recipe, *pairs, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, result


def test_help_and_version_load_no_machinery() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\n"
        "from leantune.cli.app import app\n"
        "for flag in (['--help'], ['--version'], ['train', '--help']):\n"
        "    result = CliRunner().invoke(app, flag, prog_name='leantune')\n"
        "    assert result.exit_code == 0 and 'leantune' in result.stdout, result\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [name for name in HEAVY if name in ran.stdout.split()] == []


def test_methods_and_env_show_what_there_is() -> None:
    rows = json.loads(invoke("methods", "--json").stdout)
    assert [row["name"] for row in rows] == list(lt.list_methods())
    for row in rows:
        described = lt.list_methods()[row["name"]].config.describe()
        assert [option["name"] for option in row["options"]] == [d["name"] for d in described]
    shown = plain(invoke("methods", "wta-crs").stdout)
    assert re.search(r"keep_ratio 0\.3 share of .* is kept; number > 0 and <= 1", shown)
    unknown = invoke("methods", "wta_csr")
    assert unknown.exit_code == 2 and unknown.stdout == ""
    assert "got 'wta_csr'; did you mean 'wta_crs'?" in plain(unknown.stderr)
    facts = json.loads(invoke("env", "--json").stdout)
    assert (facts["torch"], facts["leantune"]) == (version("torch"), lt.__version__)
    assert invoke("tarin").exit_code == 2


def recipe_of(*arguments: object, methods: Sequence[str] = ()) -> RunRecipe:
    return build_recipe(RunRecipe, [str(a) for a in arguments], methods)


class TestRecipe:
    def test_command_line_wins_over_the_file(self, recipe: Path) -> None:
        found = recipe_of(recipe, "batch_size=8", "keep_ratio=0.25", "output=o")
        assert (found.batch_size, found.max_length, found.learning_rate) == (8, 16, 1e-3)
        assert found.methods == (lt.WTACRS(keep_ratio=0.25, min_rows=2),)
        dotted = recipe_of(recipe, "batch-size=8", "wta-crs.keep-ratio=0.25", "output=o")
        assert dotted == found

    def test_method_replaces_the_list_and_keeps_options(self, recipe: Path) -> None:
        both = recipe_of(recipe, "output=o", methods=["lora", "wta-crs"])
        assert both.methods == (lt.LoRA(), lt.WTACRS(keep_ratio=0.5, min_rows=2))
        assert recipe_of(recipe, "output=o", "methods=[]").methods == ()

    def test_text_stays_as_it_was_typed(self) -> None:
        found = recipe_of("model=1e3", "task=text", "data=a: b", "output=[x]", "max_steps=null")
        assert (found.model, found.data, found.output) == ("1e3", "a: b", "[x]")
        sites = recipe_of(*MINIMAL, "sites=[query, 're:layer\\.0']", methods=["wta_crs"])
        assert sites.methods[0].sites == ("query", "re:layer\\.0")

    def test_a_measurement_takes_a_runs_recipe(self, recipe: Path, tmp_path: Path) -> None:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(recipe_of(recipe, "output=o", "epochs=2").to_dict()))
        assert build_recipe(RunRecipe, [str(path)], []).epochs == 2
        found = build_recipe(MeasureRecipe, [str(path), "data=null"], [])
        assert found.data is None and found.batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "wta_csr"), "method must be one of .* got 'wta_csr'; did you mean 'wta_crs'"),
        ((*WTA, "keep_ratio=1.5"), "WTACRS: keep_ratio must be number > 0 and <= 1, got 1.5"),
        ((*WTA, "keep_ratio=much"), "keep_ratio must be number > 0 and <= 1, got 'much'"),
        ((*WTA, "keep_ratoi=0.3"), "got 'keep_ratoi'; did you mean 'keep_ratio'"),
        (("batch_szie=3",), "got 'batch_szie'; did you mean 'batch_size'"),
        (
            ("batch_size=0",),
            "RunRecipe: batch_size must be integer >= 1 and <= 1,000,000,000, got 0",
        ),
        (("min_rows=3",), "min_rows must belong to a chosen method.*add --method wta_crs"),
        (("lora.rank=3",), "lora.rank must belong to a chosen method.*add --method lora"),
        ((*WTA, "--method", "lora", "sites=linear"), "got wta_crs.sites and lora.sites"),
        (("methods=3",), "methods must be a list of methods, got 3"),
        (("other.yaml", "more.yaml"), "recipe must be one file, got other.yaml and more.yaml"),
        (("missing.yaml",), "file must exist, got 'missing.yaml'"),
        (("task=sst3",), "task must be one of .* got 'sst3'"),
        (("data=/no/such/folder",), "got '/no/such/folder'"),
    ],
)
def test_bad_options_are_named_with_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path, model: Path, data: Path
) -> None:
    given = {"model": model, "task": "text", "data": data, "output": tmp_path / "out"}
    pairs = [f"{k}={v}" for k, v in given.items() if not any(a.startswith(k) for a in arguments)]
    result = invoke("train", *arguments, *pairs)
    assert result.exit_code == 2, result.output
    assert re.search(message, plain(result.stderr)), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_came_from() -> None:
    assert isinstance(invoke("train", "--debug", "missing.yaml").exception, lt.ConfigError)


class TestTrain:
    def test_json_is_the_only_thing_on_stdout(self, trained: tuple[Path, Result]) -> None:
        folder, result = trained
        document = json.loads(result.stdout)
        assert [run["name"] for run in document["runs"]] == ["baseline", "wta_crs"]
        assert document["runs"][1]["saved_bytes"] < document["runs"][0]["saved_bytes"]
        assert Path(document["report"]) == folder / "report.html"
        assert "wta_crs" in (folder / "report.html").read_text()
        for run in document["runs"]:
            held = run["ledger"]
            assert held["saved activations"] == run["saved_bytes"]
            assert sum(list(held.values())[:3]) == held["held in all"]

    def test_a_log_has_plain_lines_for_all_that_happens(self, trained: tuple[Path, Result]) -> None:
        _, result = trained
        lines = result.stderr.splitlines()
        assert lines[0] == "loading torch"
        begun = ["reading", "measuring baseline: ", "measuring wta_crs: "]
        assert all(any(line.startswith(start) for line in lines) for start in begun)
        for name in ("baseline", "wta_crs"):
            own = [line.removeprefix(f"{name}: ") for line in lines if line.startswith(f"{name}: ")]
            assert own[0] == "step 0/4: training starts" and own[-1] == "step 4/4: training ends"
            assert all(re.match(r"step \d/4: ", line) for line in own)
            assert [line for line in own if "loss 0." in line and "evaluation" not in line]
            found = [re.fullmatch(r"step (\d)/4: evaluation: (.*)", line) for line in own]
            assert [m[1] for m in found if m] == ["2", "4"]
            assert all("loss 0." in m[2] and "accuracy 0." in m[2] for m in found if m)
            assert [line for line in own if re.search(r"4/4: checkpoint .*/checkpoint-4$", line)]

    @pytest.mark.parametrize("columns", [60, 80, 200])
    def test_the_table_of_a_finished_run_is_shown_whole(
        self, trained: tuple[Path, Result], columns: int
    ) -> None:
        folder, _ = trained
        result = invoke("train", folder / "recipe.json", "resume=true", columns=columns)
        assert result.exit_code == 0, result.stderr
        assert max(map(len, result.stdout.split("Without learning")[0].splitlines())) <= columns
        runs = RunResult.read(folder).runs
        shown = plain(result.stdout)
        for what, size in runs[0].held_bytes.items():
            row = re.search(rf"{re.escape(what)} (\S+ [KM]iB) (\S+ [KM]iB)? ", shown)
            assert row is not None, what
            assert f"{runs[1].held_bytes[what] / size:.3f} of baseline" in shown
        for figure in (
            f"{runs[0].metrics['accuracy']:.4f}",
            f"{runs[1].step_time_ratio:.3f} of baseline",
            "Without learning (majority): accuracy 0.5000",
            str(folder / "report.html"),
        ):
            assert figure in shown, figure

    def test_the_recipe_of_a_run_holds_every_option(self, trained: tuple[Path, Result]) -> None:
        written = json.loads((trained[0] / "recipe.json").read_text())
        options = {row["name"] for row in RunRecipe.describe()} - set(RunRecipe.not_saved)
        assert written.keys() == options | {"format"}
        of_method = {row["name"] for row in lt.WTACRS.describe()} | {"method", "version"}
        assert written["methods"][0].keys() == of_method
        assert RunRecipe.from_dict(written).to_dict() == written

    def test_interrupt_keeps_a_checkpoint_and_says_how_to_resume(
        self, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, train = tmp_path / "run", lt.train
        stop = Interrupt(3)
        monkeypatch.setattr(lt, "train", lambda r, dry_run: train(r, callbacks=[stop]))
        result = invoke("train", recipe, f"output={folder}", "max_steps=400", "save_steps=1000")
        seen = plain(result.stderr)
        assert result.exit_code == 130, seen
        kept = re.search(r"checkpoint kept: (\S+/checkpoint-3);", seen)
        assert kept is not None, seen
        assert (Path(kept[1]) / "trainer_state.json").is_file()
        assert f"resume with: leantune train {folder / 'recipe.json'} resume=true" in seen
        assert "Traceback" not in seen
        assert result.stdout == "" and not (folder / "metrics.json").exists()


class TestMeasure:
    def test_names_bytes_of_both_and_what_was_freed(self, recipe: Path) -> None:
        document = json.loads(invoke("measure", recipe, "--json", "--by-module").stdout)
        before, after = document["runs"]
        assert (before["name"], after["name"]) == ("baseline", "wta_crs")
        assert document["batch"]["rows"] == 4 and after["activations"] < before["activations"]
        for run in (before, after):
            assert sum(run["activations_by_kind"].values()) == run["activations"]
            assert sum(run["activations_by_module"].values()) == run["activations"]
        # With dropout before each norm nobody else reads what a BERT linear reads.
        assert document["still_held"] == []

    def test_numbers_samples_for_cached_norms(self, recipe: Path) -> None:
        result = invoke("measure", recipe, *WTA, "norms=cache", "--json")
        before, after = json.loads(result.stdout)["runs"]
        assert after["activations"] < before["activations"]

    def test_names_what_still_holds_an_input(self, tmp_path: Path) -> None:
        options = transformers.OPTConfig(
            vocab_size=64,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
        )
        opt: Any = transformers.OPTForCausalLM(options)
        opt.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        arguments = ("measure", f"model={tmp_path}", "task=causal_lm", "batch_size=2", *WTA)
        result = invoke(*arguments, "max_length=24")
        assert "model.decoder.layers.*.activation_fn (Relu)" in plain(result.stdout)
        ids = torch.randint(1, 64, (2, 24))
        held = lt.still_held(opt, {"input_ids": ids, "labels": ids}, lt.WTACRS())
        by_linears = {item.linears: item for item in held}
        relu = by_linears[("model.decoder.layers.*.fc2",)]
        assert [module for module, _ in relu.holders] == ["model.decoder.layers.*.activation_fn"]
        # Three blocks, each with a (2 * 24, 32) float32 output of the ReLU.
        assert (relu.num_tensors, relu.num_bytes) == (3, 3 * 2 * 24 * 32 * 4)
        assert ("model.decoder.layers.*.fc1",) not in by_linears
        assert type(opt.model.decoder.layers[0].fc2) is torch.nn.Linear

    def test_bad_requests_are_named(self, model: Path) -> None:
        result = invoke("measure", f"model={model}", "max_length=33")
        assert result.exit_code == 2 and "max_length must be at most 32" in plain(result.stderr)


class TestFidelity:
    def test_says_how_noisy_each_gradient_is(self, recipe: Path) -> None:
        arguments = ("fidelity", recipe, "--num-draws", 32, "--num-batches", 2)
        document = json.loads(invoke(*arguments, "--json").stdout)
        assert (document["num_draws"], document["num_batches"]) == (32, 2)
        assert document["looks_biased"] == [] and document["exact_parameters"]
        noisy = {item["name"] for item in document["parameters"]}
        assert "bert.encoder.layer.0.intermediate.dense.weight" in noisy
        assert all(item["relative_variance"] > 0 for item in document["parameters"])
        text = plain(invoke(*arguments).stdout)
        assert "bert.encoder.layer.0.intermediate.dense.weight" in text
        assert "Biased beyond chance: no gradient." in text

    def test_names_gradients_that_are_biased(self, recipe: Path) -> None:
        how = ("estimator=topk", "keep_ratio=0.1")
        document = json.loads(invoke("fidelity", recipe, *how, "--json").stdout)
        assert "bert.encoder.layer.0.intermediate.dense.weight" in document["looks_biased"]

    def test_numbers_samples_over_all_batches(self, recipe: Path) -> None:
        result = invoke("fidelity", recipe, *WTA, "norms=cache", "--num-draws", 2, "--json")
        assert json.loads(result.stdout)["num_batches"] == 4

    def test_without_methods_there_is_nothing_to_compare(self, model: Path) -> None:
        result = invoke("fidelity", f"model={model}", "max_length=8")
        assert result.exit_code == 2
        assert "methods must name at least one" in plain(result.stderr)


class TestSites:
    def test_a_configuration_is_enough(self, tmp_path: Path, model: Path) -> None:
        shutil.copy(model / "config.json", tmp_path)
        document = json.loads(invoke("sites", tmp_path, "--json").stdout)
        assert document["model"] == "BertForSequenceClassification"
        found = {row["name"]: row for row in document["found"]}
        down = found["bert.encoder.layer.0-1.output.dense"]
        assert (down["part"], down["shape"], down["count"]) == ("mlp.down", [16, 32], 2)
        assert {"lora", "sparse_grad", "wta_crs"} <= set(down["methods"])
        assert [choice["method"] for choice in document["choices"]] == list(lt.list_methods())

    @pytest.mark.parametrize("columns", [60, 80])
    def test_a_narrow_screen_keeps_names_and_methods(self, model: Path, columns: int) -> None:
        result = invoke("sites", model, columns=columns)
        assert result.exit_code == 0, result.stderr
        assert max(map(len, result.stdout.splitlines())) <= columns
        shown = plain(result.stdout)
        assert "bert.encoder.layer.0-1: 2 x BertLayer" in shown
        for word in (" attention.self.query ", " mlp.up, ", " lora, ", " checkpoint ", " wta_crs "):
            assert word in shown, word
        assert re.search(r" classifier linear, 2 x 16 - ", shown)
        assert re.search(r" classifier\.weight [\d.]+% Linear, 2 x 16;", shown)

    def test_what_is_no_model_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 15}')
        for name, said in ((tmp_path, "that transformers builds"), (tmp_path / "no", "a config")):
            result = invoke("sites", name)
            assert (result.exit_code, result.stdout) == (2, "")
            assert said in plain(result.stderr) and "Traceback" not in result.stderr


def loads_like(folder: Path, reference: Path) -> bool:
    kind = transformers.AutoModelForSequenceClassification
    ours, theirs = (kind.from_pretrained(f).state_dict() for f in (folder, reference))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class TestMerge:
    def test_run_becomes_the_checkpoint_that_training_wrote(
        self, trained: tuple[Path, Result], tmp_path: Path, model: Path
    ) -> None:
        folder, _ = trained
        output = tmp_path / "plain"
        result = invoke("merge", folder, output, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout) == {"output": str(output), "methods": ["wta_crs"]}
        assert loads_like(output, folder / "model") and not loads_like(output, model)
        config = json.loads((output / "config.json").read_text())
        assert config["label2id"] == {"bad": 0, "good": 1}
        result = invoke("merge", folder / "session", output)
        assert result.exit_code == 2 and "which exists" in plain(result.stderr)
        (output / "keep").write_text("mine")
        result = invoke("merge", folder / "session", output, "--overwrite")
        assert result.exit_code == 2 and "keep, which leantune did not" in plain(result.stderr)
        assert (output / "keep").read_text() == "mine"
        (output / "keep").unlink()
        result = invoke("merge", folder / "session", output, "--overwrite")
        assert result.exit_code == 0, result.stderr

    def test_what_is_read_is_never_overwritten(
        self, trained: tuple[Path, Result], tmp_path: Path, model: Path
    ) -> None:
        run, base = tmp_path / "run", tmp_path / "base"
        shutil.copytree(trained[0], run)
        shutil.copytree(model, base)
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for output in (run, run / "session", run / "new", tmp_path, base, base / "new", run / ".."):
            result = invoke("merge", run, output, "--overwrite", "--model", base)
            assert result.exit_code == 2 and "error" in plain(result.stderr), output
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def test_another_base_of_the_same_shape_is_refused(self, tmp_path: Path) -> None:
        for seed in (1, 2):
            bert(seed=seed).save_pretrained(tmp_path / f"base{seed}")
            tokenizer().save_pretrained(tmp_path / f"base{seed}")
        lt.apply(bert(seed=1), lt.LoRA(rank=2)).save(tmp_path / "session")
        with pytest.raises(lt.ConfigError, match=r"must be the base that .* got other weights in"):
            lt.merge_checkpoint(tmp_path / "session", tmp_path / "plain", str(tmp_path / "base2"))
        assert not (tmp_path / "plain").exists()
        lt.merge_checkpoint(tmp_path / "session", tmp_path / "plain", str(tmp_path / "base1"))

    def test_session_alone_merges_onto_a_named_model(self, tmp_path: Path) -> None:
        base = bert(seed=1)
        base.save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        session = lt.apply(base, lt.LoRA(rank=2))
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "lora_B" in name or "classifier" in name:
                    parameter.add_(0.1)
        session.save(tmp_path / "session")
        session.merge()
        base.save_pretrained(tmp_path / "expected")
        with pytest.raises(lt.ConfigError, match=r"model must be given .* name the base"):
            lt.merge_checkpoint(tmp_path / "session", tmp_path / "plain")
        methods = lt.merge_checkpoint(
            tmp_path / "session", tmp_path / "plain", str(tmp_path / "base")
        )
        assert methods == ["lora"] and loads_like(tmp_path / "plain", tmp_path / "expected")

    def test_damaged_or_missing_sessions_leave_no_output(
        self, trained: tuple[Path, Result], tmp_path: Path, model: Path
    ) -> None:
        shutil.copytree(trained[0] / "session", tmp_path / "session")
        weights = tmp_path / "session" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = invoke("merge", tmp_path / "session", tmp_path / "plain", "--model", model)
        assert result.exit_code == 2 and "weights.safetensors with" in plain(result.stderr)
        run = tmp_path / "run"
        shutil.copytree(trained[0], run)
        for text in ("{}", '{"format": 2}', "[]", "{"):
            (run / "recipe.json").write_text(text)
            result = invoke("merge", run, tmp_path / "plain")
            assert result.exit_code == 2 and "error" in plain(result.stderr), result.exception
        result = invoke("merge", model, tmp_path / "plain")
        assert result.exit_code == 2 and "must be a run folder or a folder" in plain(result.stderr)
        assert not (tmp_path / "plain").exists()


def test_plan_chooses_what_fits_and_prints_a_recipe(model: Path) -> None:
    size = ("--batch-size", 1, "--max-length", 16, "--min-keep-ratio", 1)
    result = invoke("plan", "--model", model, *size, "--budget", "1GiB", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["recipe"]["batch_size"] == 1 and document["fits"]
    assert document["num_bytes"]["peak"] < 2**30 and len(document["alternatives"]) == 2
    shown = invoke("plan", "--model", model, *size, "--budget", "1GiB", "--method", "checkpoint")
    assert "Checkpoint()" in shown.stdout and '"gradient_accumulation_steps": 1' in shown.stdout
