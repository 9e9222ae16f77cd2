"""The command: every option offered, JSON alone on stdout, every mistake named with exit code 2."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import bert, tokenizer, write_sentences
from typer.testing import CliRunner, Result

import leantune
from leantune.cli import app
from leantune.cli.options import flag_name
from leantune.cli.recipe import Setting, build_config, split_arguments
from leantune.core import registry
from leantune.core.session import Session
from leantune.train.config import RunConfig

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "jinja2")
MINIMAL = ("model=m", "task=text", "data=d", "output=o")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


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
        f"model: {model}\ntask: text\ndata: {data}\nbatch_size: 4\nmax_length: 16\n"
        "learning_rate: 1e-3\nmethods:\n  - {method: wta_crs, keep_ratio: 0.5, min_rows: 2}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, Result]:
    """A finished run with comparison, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(
        *("train", recipe, "compare=exact", "--max-steps", 4, "--output", folder),
        *("--eval-steps", 2, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return folder, result


class TestHelp:
    def test_group_help_and_version_load_no_machinery(self) -> None:
        code = (
            "import sys, leantune; before = set(sys.modules)\n"
            "from typer.testing import CliRunner\n"
            "from leantune.cli import app\n"
            "for flag in ('--help', '--version'):\n"
            "    result = CliRunner().invoke(app, [flag], prog_name='leantune')\n"
            "    assert result.exit_code == 0, result\n"
            "    assert 'leantune' in result.stdout\n"
            "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))\n"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        loaded = ran.stdout.split()
        assert "typer" in loaded
        assert [name for name in HEAVY if name in loaded] == []

    @pytest.mark.parametrize("command", ["train", "measure"])
    def test_help_names_every_option_with_its_meaning(self, command: str) -> None:
        text = plain(invoke(command, "--help").stdout)
        rows = [(flag_name(row["name"]), row) for row in RunConfig.describe()]
        for name, spec in registry.methods().items():
            rows += [(flag_name(f"{name}__{row['name']}"), row) for row in spec.config.describe()]
        for flag, row in rows:
            if row["name"] != "methods":
                shown = flag.replace("--", "--no-", 1) if row["default"] is True else flag
                assert f" {shown} " in text, shown
                assert row["help"][:20] in text, row["help"]
        assert "--method " in text and "--json" in text

    def test_commands_are_listed_and_have_help(self) -> None:
        text = plain(invoke("--help").stdout)
        for command in ("train", "measure", "methods", "merge", "env"):
            assert f" {command} " in text
            assert invoke(command, "--help").exit_code == 0
        assert invoke("tarin").exit_code == 2


class TestMethods:
    def test_lists_the_registry(self) -> None:
        text = plain(invoke("methods").stdout)
        for name, spec in registry.methods().items():
            assert name in text and spec.axis in text

    def test_json_has_the_options(self) -> None:
        rows = json.loads(invoke("methods", "--json").stdout)
        assert [row["name"] for row in rows] == list(registry.methods())
        for row in rows:
            described = registry.get(row["name"]).config.describe()
            assert [option["name"] for option in row["options"]] == [d["name"] for d in described]

    def test_one_method_shows_rule_default_and_help(self) -> None:
        text = plain(invoke("methods", "wta-crs").stdout)
        assert "keep_ratio 0.3 number > 0 and <= 1 share of a linear's input rows" in text

    def test_unknown_method_is_named(self) -> None:
        result = invoke("methods", "wta_csr")
        assert result.exit_code == 2 and result.stdout == ""
        assert "got 'wta_csr'; did you mean 'wta_crs'?" in plain(result.stderr)


def test_env_names_versions_and_threads() -> None:
    facts = json.loads(invoke("env", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == transformers.__version__
    assert facts["cpu_threads"] == torch.get_num_threads()
    assert facts["leantune"] in plain(invoke("env").stdout)


def config_of(*arguments: str, methods: Sequence[str] = (), recipe: Path | None = None) -> Any:
    _, settings = split_arguments(arguments)
    return build_config(recipe, settings, methods)


class TestRecipe:
    def test_command_line_wins_over_the_file(self, recipe: Path) -> None:
        config = config_of("batch_size=8", "keep_ratio=0.25", "output=o", recipe=recipe)
        assert config.batch_size == 8
        assert config.max_length == 16
        # YAML 1.1 would read this as text.
        assert config.learning_rate == 1e-3
        assert config.methods == (leantune.WTACRS(keep_ratio=0.25, min_rows=2),)

    def test_method_flag_replaces_the_list_and_keeps_options(self, recipe: Path) -> None:
        both = config_of("output=o", methods=["lora", "wta-crs"], recipe=recipe)
        assert both.methods == (
            leantune.LoRA(),
            leantune.WTACRS(keep_ratio=0.5, min_rows=2),
        )
        one = config_of("output=o", methods=["checkpoint"], recipe=recipe)
        assert one.methods == (leantune.Checkpoint(),)
        assert config_of("output=o", "methods=[]", recipe=recipe).methods == ()

    def test_flag_and_pair_and_dotted_key_say_the_same(self) -> None:
        expected = config_of(*MINIMAL, "keep_ratio=0.1", "batch_size=3", methods=["wta_crs"])
        dotted = config_of(*MINIMAL, "wta-crs.keep-ratio=0.1", "batch-size=3", methods=["wta_crs"])
        assert dotted == expected
        _, settings = split_arguments(MINIMAL)
        settings += [
            Setting("wta_crs.keep_ratio", "0.1", "--wta-crs.keep-ratio", is_flag=True),
            Setting("batch_size", "3", "--batch-size", is_flag=True),
        ]
        assert build_config(None, settings, ["wta_crs"]) == expected
        assert build_config(None, settings, ["wta-crs"]) == expected

    def test_text_options_are_taken_as_typed(self) -> None:
        config = config_of("model=1e3", "task=text", "data=a: b", "output=[x]")
        assert (config.model, config.data, config.output) == ("1e3", "a: b", "[x]")
        demo = config_of("model=m", "task=demo", "data=none", "output=o", "max_steps=null")
        assert demo.data is None and demo.max_steps is None

    @pytest.mark.parametrize(
        ("typed", "sites"),
        [
            ("*.query", ("*.query",)),
            ("re:layer\\.0.*dense", ("re:layer\\.0.*dense",)),
            ("[query, key]", ("query", "key")),
            ("no", ("no",)),
        ],
    )
    def test_patterns_reach_the_method(self, typed: str, sites: tuple[str, ...]) -> None:
        config = config_of(*MINIMAL, f"sites={typed}", methods=["wta_crs"])
        assert config.methods[0].sites == sites

    def test_recipe_of_a_run_is_a_recipe(self, tmp_path: Path) -> None:
        config = config_of(*MINIMAL, "keep_ratio=0.1", "compare=exact", methods=["wta_crs"])
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(config.to_dict()))
        assert build_config(path, []) == config

    def test_method_by_bare_name_takes_the_defaults(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("methods: [wta-crs]\n")
        assert config_of(*MINIMAL, recipe=path).methods == (leantune.WTACRS(),)


WTA = ("--method", "wta_crs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "wta_csr"), "method must be one of .* got 'wta_csr'; did you mean 'wta_crs'"),
        ((*WTA, "keep_ratio=0"), r"WTACRS: keep_ratio must be number > 0 and <= 1, got 0"),
        ((*WTA, "keep_ratio=-1"), "keep_ratio must be number > 0 and <= 1, got -1"),
        ((*WTA, "keep_ratio=1.5"), "keep_ratio must be number > 0 and <= 1, got 1.5"),
        ((*WTA, "keep_ratio=.nan"), "keep_ratio must be number > 0 and <= 1, got nan"),
        ((*WTA, "keep_ratio=much"), "keep_ratio must be number > 0 and <= 1, got 'much'"),
        ((*WTA, "--wta-crs.keep-ratio", "0"), "keep_ratio must be number > 0 and <= 1, got 0"),
        ((*WTA, "keep_ratoi=0.3"), "got 'keep_ratoi'; did you mean 'keep_ratio'"),
        ((*WTA, "wta_crs.keep_ratoi=1"), "WTACRS: option .* did you mean 'keep_ratio'"),
        (("batch_szie=3",), "got 'batch_szie'; did you mean 'batch_size'"),
        (("batch_size=0",), "RunConfig: batch_size must be integer >= 1, got 0"),
        (("--batch-size", "many"), "batch_size must be integer >= 1, got 'many'"),
        (("keep_ratio=0.3",), "an option of meprop, spt_attention, wta_crs, none of which is one"),
        (("min_rows=3",), "got an option of wta_crs, which is not one; add --method wta_crs"),
        (("--lora.rank", "3"), "got an option of lora, which is not one; add --method lora"),
        (
            (*WTA, "--method", "lora", "sites=linear"),
            r"sites must name one option, got wta_crs\.sites=\.\.\. and lora\.sites=",
        ),
        (("batch_size=2", "--batch-size", "3"), "given once, got batch_size=2 and --batch-size"),
        (("methods=3",), "methods must be a list of method entries, got 3"),
        (("other.yaml", "more.yaml"), "recipe must be one file, got 'other.yaml' and 'more.yaml'"),
        (("missing.yaml",), "file must exist, got 'missing.yaml', which does not"),
        (("compare=exact",), "compare must be None where methods is empty"),
        (("task=sst3",), "task must be one of .* got 'sst3'"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_szie: 3", "option must be one of .* got 'batch_szie'; did you mean 'batch_size'"),
        ("format: 2", "format must be at most 1, got 2; .* newer leantune"),
        ("methods: [{method: wta_crs, version: 99}]", "version must be at most 1, got 99"),
        ("methods: [{keep_ratio: 0.3}]", "each entry of methods must have a 'method' name"),
        ("methods: wta_crs", "methods must be a list of method entries, got 'wta_crs'"),
        ("methods: [{method: wta_crs, keep: 1}]", "WTACRS: option must be one of .* got 'keep'"),
        ("batch_size: [", "must be valid YAML"),
        ("batch_size: 3\nbatch_size: 4", "the key 'batch_size' twice"),
        ("just words", "must be a mapping of options, got str"),
    ],
)
def test_bad_recipe_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    pairs = [pair for pair in MINIMAL if pair.partition("=")[0] not in content]
    result = invoke("train", path, *pairs)
    assert result.exit_code == 2, result.output
    assert re.search(message, plain(result.stderr)), result.stderr


def test_missing_options_are_named() -> None:
    result = invoke("train", "task=text")
    assert result.exit_code == 2
    assert "recipe: model must be given, got none" in plain(result.stderr)


def test_debug_shows_where_an_error_came_from() -> None:
    result = invoke("train", "--debug", "missing.yaml")
    assert isinstance(result.exception, leantune.ConfigError)


class TestTrain:
    def test_json_is_the_only_thing_on_stdout(self, trained: tuple[Path, Result]) -> None:
        folder, result = trained
        document = json.loads(result.stdout)
        assert [run["name"] for run in document["runs"]] == ["exact", "wta_crs"]
        assert document["runs"][1]["saved_bytes"] < document["runs"][0]["saved_bytes"]
        assert Path(document["report"]) == folder / "report.html"
        on_disk = json.loads((folder / "metrics.json").read_text())
        assert document["runs"][0]["metrics"] == on_disk["runs"][0]["metrics"]

    def test_progress_tells_metric_and_time_on_stderr(self, trained: tuple[Path, Result]) -> None:
        lines = trained[1].stderr.splitlines()
        for run in ("exact", "wta_crs"):
            for step in (2, 4):
                pattern = rf"{run}  step {step}/4  .*accuracy \d\.\d{{4}}  \d+ ms/step"
                assert any(re.fullmatch(pattern, line) for line in lines), (run, step)

    def test_report_lies_in_the_run_folder(self, trained: tuple[Path, Result]) -> None:
        folder, _ = trained
        assert "wta_crs" in (folder / "report.html").read_text()
        assert (folder / "plots" / "loss.png").is_file()

    def test_table_puts_exact_beside_the_method(
        self, trained: tuple[Path, Result], recipe: Path
    ) -> None:
        folder, _ = trained
        # A finished run has nothing left to do: its table is shown again.
        result = invoke("train", folder / "recipe.json", "--resume")
        assert result.exit_code == 0, result.stderr
        text = plain(result.stdout)
        runs = json.loads((folder / "metrics.json").read_text())["runs"]
        ratio = runs[1]["saved_bytes"] / runs[0]["saved_bytes"]
        for figure in (
            f"{runs[0]['metrics']['accuracy']:.4f}",
            f"{ratio:.3f} of exact",
            f"{runs[1]['step_time_ratio']:.3f}",
            "majority baseline: accuracy 0.5000",
            str(folder / "report.html"),
        ):
            assert figure in text, figure

    def test_existing_output_is_refused(self, trained: tuple[Path, Result], recipe: Path) -> None:
        folder, _ = trained
        before = (folder / "metrics.json").read_bytes()
        result = invoke("train", recipe, "--output", folder)
        assert result.exit_code == 2
        assert "output must be a new folder" in plain(result.stderr)
        assert (folder / "metrics.json").read_bytes() == before

    def test_missing_data_file_is_named(self, tmp_path: Path, recipe: Path) -> None:
        result = invoke("train", recipe, f"data={tmp_path / 'no'}", f"output={tmp_path / 'o'}")
        assert result.exit_code == 2 and str(tmp_path / "no") in plain(result.stderr)

    def test_interrupt_keeps_a_checkpoint_and_says_how_to_resume(
        self, tmp_path: Path, recipe: Path
    ) -> None:
        folder = tmp_path / "run"
        # A shell may start its children deaf to SIGINT.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from leantune.cli import main; main()"
        )
        command = [sys.executable, "-c", code, "train", str(recipe), f"output={folder}"]
        command += ["max_steps=400", "eval_steps=20", "save_steps=1000"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            seen = ""
            for line in process.stderr:
                seen += line
                if "step 20/400" in line:
                    process.send_signal(signal.SIGINT)
        assert process.returncode == 130, seen
        kept = re.search(r"checkpoint kept: (\S+/checkpoint-\d+);", plain(seen))
        assert kept is not None, seen
        assert (Path(kept[1]) / "trainer_state.json").is_file()
        assert f"resume with: leantune train {folder / 'recipe.json'} --resume" in plain(seen)
        assert "Traceback" not in seen
        assert not (folder / "metrics.json").exists()


class TestMeasure:
    def test_names_bytes_of_both_and_what_was_freed(self, recipe: Path) -> None:
        document = json.loads(invoke("measure", recipe, "--json", "--by-module").stdout)
        exact, sampled = document["runs"]
        assert (exact["name"], sampled["name"]) == ("exact", "wta_crs")
        assert document["batch"]["rows"] == 4
        assert sampled["activations"] < exact["activations"]
        for run in (exact, sampled):
            assert sum(run["activations_by_kind"].values()) == run["activations"]
            assert sum(run["activations_by_module"].values()) == run["activations"]
        # With dropout before each norm nobody else reads what a BERT linear reads.
        assert document["still_held"] == []

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
        transformers.OPTForCausalLM(options).save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        arguments = ("measure", f"model={tmp_path}", "task=causal_lm", "batch_size=2", *WTA)
        document = json.loads(invoke(*arguments, "--length", 24, "--json").stdout)
        assert document["batch"] == {"rows": 2, "tokens": 24}
        held = {tuple(item["linears"]): item for item in document["still_held"]}
        relu = held[("model.decoder.layers.*.fc2",)]
        assert [module for module, _ in relu["holders"]] == ["model.decoder.layers.*.activation_fn"]
        # Three blocks, each with a (2 * 24, 32) float32 output of the ReLU.
        assert relu["num_tensors"] == 3
        assert relu["num_bytes"] == 3 * 2 * 24 * 32 * 4
        assert ("model.decoder.layers.*.fc1",) not in held
        text = plain(invoke(*arguments, "--length", 24).stdout)
        assert "model.decoder.layers.*.activation_fn (Relu)" in text

    def test_drawing_in_backward_is_seen_to_keep_inputs(self, recipe: Path) -> None:
        document = json.loads(invoke("measure", recipe, "draw_at=backward", "--json").stdout)
        held = [item["linears"] for item in document["still_held"]]
        assert ["bert.encoder.layer.*.output.dense"] in held

    def test_random_ids_without_data(self, model: Path) -> None:
        arguments = (f"model={model}", "--batch-size", 3, "--length", 11, "--json")
        document = json.loads(invoke("measure", *arguments).stdout)
        assert document["batch"] == {"rows": 3, "tokens": 11}
        assert [run["name"] for run in document["runs"]] == ["exact"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--length", "33"), "length must be at most 32"),
            (("task=sst3",), "task must be one of"),
            (("model=/no/such/model",), "there is no such folder"),
        ],
    )
    def test_bad_requests_are_named(
        self, arguments: tuple[str, ...], message: str, model: Path
    ) -> None:
        pairs = [] if arguments[0].startswith("model") else [f"model={model}"]
        result = invoke("measure", *arguments, *pairs)
        assert result.exit_code == 2 and message in plain(result.stderr)

    def test_length_beside_data_is_refused(self, recipe: Path) -> None:
        result = invoke("measure", recipe, "--length", 8)
        assert result.exit_code == 2
        assert "length must be left out where data are given" in plain(result.stderr)


def loads_like(folder: Path, reference: Path) -> bool:
    kind = transformers.AutoModelForSequenceClassification
    ours, theirs = (kind.from_pretrained(f).state_dict() for f in (folder, reference))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class TestMerge:
    def test_run_becomes_the_checkpoint_that_training_wrote(
        self, trained: tuple[Path, Result], tmp_path: Path, model: Path
    ) -> None:
        folder, _ = trained
        result = invoke("merge", folder, tmp_path / "plain", "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout) == {
            "output": str(tmp_path / "plain"),
            "model": str(model),
            "methods": ["wta_crs"],
        }
        assert loads_like(tmp_path / "plain", folder / "model")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").pad_token == "[PAD]"
        config = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert config["label2id"] == {"bad": 0, "good": 1}
        assert not loads_like(tmp_path / "plain", model)

    def test_existing_output_is_replaced_only_when_asked(
        self, trained: tuple[Path, Result], tmp_path: Path
    ) -> None:
        output = tmp_path / "plain"
        output.mkdir()
        (output / "keep").write_text("mine")
        result = invoke("merge", trained[0], output)
        assert result.exit_code == 2 and "which exists" in plain(result.stderr)
        assert (output / "keep").read_text() == "mine"
        result = invoke("merge", trained[0] / "session", output, "--overwrite")
        assert result.exit_code == 0, result.stderr
        assert loads_like(output, trained[0] / "model") and not (output / "keep").exists()

    def test_session_alone_merges_onto_a_named_model(self, tmp_path: Path) -> None:
        base = bert(seed=1)
        base.save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        session: Session = leantune.apply(base, leantune.LoRA(rank=2))
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "lora_B" in name or "classifier" in name:
                    parameter.add_(0.1)
        session.save(tmp_path / "session")
        session.merge()
        base.save_pretrained(tmp_path / "expected")
        output = tmp_path / "plain"
        result = invoke("merge", tmp_path / "session", output, "--model", tmp_path / "base")
        assert result.exit_code == 0, result.stderr
        assert loads_like(output, tmp_path / "expected")
        assert not loads_like(output, tmp_path / "base")

    def test_session_without_a_model_name_says_so(
        self, trained: tuple[Path, Result], tmp_path: Path
    ) -> None:
        import shutil

        shutil.copytree(trained[0] / "session", tmp_path / "session")
        result = invoke("merge", tmp_path / "session", tmp_path / "plain")
        assert result.exit_code == 2 and "give --model NAME" in plain(result.stderr)

    def test_truncated_session_leaves_no_output(
        self, trained: tuple[Path, Result], tmp_path: Path, model: Path
    ) -> None:
        import shutil

        shutil.copytree(trained[0] / "session", tmp_path / "session")
        weights = tmp_path / "session" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = invoke("merge", tmp_path / "session", tmp_path / "plain", "--model", model)
        assert result.exit_code == 2 and "whole safetensors file" in plain(result.stderr)
        assert not (tmp_path / "plain").exists()

    def test_folder_without_a_session_is_refused(self, tmp_path: Path) -> None:
        result = invoke("merge", tmp_path, tmp_path / "plain")
        assert result.exit_code == 2
        assert "must be a run folder or a folder that session.save wrote" in plain(result.stderr)
        (tmp_path / "model").mkdir()
        result = invoke("merge", tmp_path, tmp_path / "plain")
        assert result.exit_code == 2 and "trained no method" in plain(result.stderr)
