"""A run from files to its folder: comparison, interruption, resumption, bad input."""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.damage import DAMAGES, FILES, Payload
from integration.tiny import (
    Interrupt,
    Steps,
    bert,
    llama,
    same,
    saved_weights,
    text_run,
    tokenizer,
    write_sentences,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import leantune as lt
from leantune.core.files import STATE_FILE
from leantune.core.manifest import find_damage, write_manifest
from leantune.errors import WriteError
from leantune.training.checkpoints import find_starts
from leantune.training.data import get_task, load_task
from leantune.training.interrupt import handled_by
from leantune.training.models import load_model
from leantune.training.recipe import RunRecipe
from leantune.training.results import RunResult, VariantResult

SAMPLED = lt.WTACRS(keep_ratio=0.3, min_rows=2)


def test_a_compared_run_writes_its_folder(base: dict[str, Any]) -> None:
    result = lt.train(base, compare=["baseline", "checkpoint"])
    output = Path(base["output"])
    assert RunResult.read(output) == result
    recipe = RunRecipe.read(output / "recipe.json", {})
    assert recipe == RunRecipe(**base, compare=["baseline", "checkpoint"])  # type: ignore[arg-type]
    assert [r.name for r in result.runs] == ["baseline", "checkpoint", "wta_crs"]
    plain, checkpointed, method = result.runs
    for variant in result.runs:
        assert variant.num_steps == 10
        assert [step for step, _ in variant.train_loss] == list(range(1, 11))
        assert [step for step, _ in variant.evaluations] == [5, 10]
        assert variant.metrics == variant.evaluations[-1][1]
        assert variant.metrics.keys() == {"accuracy", "loss"}
        assert variant.train_seconds > 0
        assert variant.saved_bytes == variant.ledger["activations"]
    assert result.reference is plain and plain.step_time_ratio == 1.0
    assert max(method.saved_bytes, checkpointed.saved_bytes) < plain.saved_bytes
    # Same head, order and dropout: checkpointing is exact, and so is the sampled first forward.
    losses = [[loss for _, loss in variant.train_loss] for variant in (checkpointed, plain)]
    assert losses[0] == pytest.approx(losses[1])
    assert method.train_loss[0] == plain.train_loss[0]
    assert method.train_loss[-1] != plain.train_loss[-1]
    assert result.floor == {"name": "majority", "value": 0.5}
    names = {path.name for path in output.iterdir()}
    folders = {"checkpoints", "checkpoints-baseline", "checkpoints-checkpoint", "model", "session"}
    assert names == folders | {"metrics.json", "recipe.json", ".lock"}


def test_the_model_loads_without_us_and_predicts_the_same(base: dict[str, Any]) -> None:
    result = lt.train(base)
    classify = transformers.pipeline(
        "text-classification", str(Path(base["output"]) / "model"), device="cpu"
    )
    lines = (Path(base["data"]) / "validation.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    answers = [classify(text)[0]["label"] for text in texts]
    hits = [answer == label for answer, label in zip(answers, labels, strict=True)]
    assert result.runs[0].metrics["accuracy"] == sum(hits) / 16
    assert result.runs[0].step_time_ratio is None


def test_a_recipe_passes_through_few_functions(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's way must stay short enough to be read in one sitting.

    Counted are the distinct functions of ours, between the entry of ``train`` and the trainer's,
    that are called with the recipe, or with something that holds it (an experiment, a mapping of
    its options).
    """
    seen: set[str] = set()

    def holds(value: Any) -> bool:
        if isinstance(value, RunRecipe) or value is base:
            return True
        if isinstance(value, dict):
            return "gradient_accumulation_steps" in value
        return isinstance(getattr(value, "recipe", None), RunRecipe)

    def profile(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and "/leantune/" in code.co_filename:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(holds(frame.f_locals.get(name)) for name in names):
                seen.add(f"{Path(code.co_filename).name}:{code.co_qualname}")

    def stop(*args: Any, **kwargs: Any) -> None:
        sys.setprofile(None)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)
    sys.setprofile(profile)
    with pytest.raises(KeyboardInterrupt):
        lt.train(base)
    assert "run.py:train" in seen and len(seen) <= 30, sorted(seen)


def test_equal_recipes_give_equal_bits_and_other_seeds_do_not(
    base: dict[str, Any], whole: tuple[RunResult, Path]
) -> None:
    for seed in (0, 1):
        output = f"{base['output']}{seed}"
        lt.train(base, output=output, seed=seed)
        assert same(saved_weights(output), saved_weights(whole[1])) == (seed == 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """What a run by the options of ``base`` found when nothing stopped it, and its folder."""
    options = text_run(tmp_path_factory.mktemp("whole"))
    return lt.train(options), Path(options["output"])


@pytest.mark.parametrize("step", [3, 5])
def test_interrupted_and_resumed_equals_uninterrupted(
    base: dict[str, Any], step: int, whole: tuple[RunResult, Path]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, callbacks=[Interrupt(step)], save_steps=5)
    assert (Path(base["output"]) / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert not (Path(base["output"]) / "metrics.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = Steps()
    resumed = lt.train(Path(base["output"]) / "recipe.json", callbacks=[seen], resume=True)
    assert [number for _, number in seen.steps] == list(range(step + 1, 11))
    assert same(saved_weights(base["output"]), saved_weights(whole[1]))
    assert resumed.runs[0].evaluations == whole[0].runs[0].evaluations
    assert [at for at, _ in resumed.runs[0].train_loss] == list(range(1, 11))


def test_an_abrupt_end_goes_on_from_the_last_checkpoint(
    base: dict[str, Any], whole: tuple[RunResult, Path]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, callbacks=[Interrupt(8, at_once=True)])
    # A crash may also leave a checkpoint half written.
    half = Path(base["output"]) / "checkpoints" / "checkpoint-7"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step"')
    seen = Steps()
    lt.train(base, callbacks=[seen], resume=True)
    assert [number for _, number in seen.steps] == [6, 7, 8, 9, 10]
    assert same(saved_weights(base["output"]), saved_weights(whole[1]))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a run that was cut off at step 8 of 10, with checkpoints at steps 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    options = text_run(folder) | {"batch_size": 4, "max_steps": 10, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        lt.train(options, callbacks=[Interrupt(8, at_once=True)])
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6"]
    return options


@pytest.fixture
def run(stopped: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A copy of the run that was cut off."""
    shutil.copytree(stopped["output"], tmp_path / "run")
    return {**stopped, "output": str(tmp_path / "run")}


@pytest.fixture
def at_the_start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints that runs would go on from, in place of what follows."""
    begun: list[str] = []

    def experiment(*_: Any) -> None:
        found = sys._getframe(1).f_locals["starts"]
        begun.extend(path.name for path in found.values())
        raise KeyboardInterrupt

    monkeypatch.setattr("leantune.training.run.Experiment", experiment)
    return begun


@pytest.mark.parametrize("damage", ["missing", "flipped", "short", "empty", "garbage"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    run: dict[str, Any], at_the_start: list[str], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last, before = (Path(run["output"]) / "checkpoints" / f"checkpoint-{n}" for n in (6, 4))
    for name in FILES:
        whole = (last / name).read_bytes()
        DAMAGES[damage](last / name)
        with pytest.raises(KeyboardInterrupt):
            lt.train(run, resume=True)
        said = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
        assert at_the_start.pop() == before.name and len(said) == 1
        assert f"going on from {before.name}, passed over {last.name}: " in said[0]
        assert name in said[0] or name == "leantune_manifest.json"
        with pytest.raises(lt.ConfigError, match=rf"must be whole .*{last.name}: "):
            lt.train(run, resume_from=last.name)
        (last / name).write_bytes(whole)
    for checkpoint in (last, before):
        DAMAGES[damage](checkpoint / "optimizer.pt")
    with pytest.raises(lt.ConfigError, match=r"got none in .*checkpoint-6: .*checkpoint-4: "):
        lt.train(run, resume=True)
    assert not at_the_start


def test_one_process_says_what_is_passed_over(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RunRecipe.read(run, {})
    (Path(run["output"]) / "checkpoints" / "checkpoint-6" / "optimizer.pt").unlink()
    for number, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", number)
        assert find_starts(recipe, {})["wta_crs"].name == "checkpoint-4"
        assert capsys.readouterr().err.count("passed over") == num_lines


def test_a_checkpoint_is_chosen(run: dict[str, Any], at_the_start: list[str]) -> None:
    for options, start in (
        ({"resume": True}, "checkpoint-6"),
        ({"resume_from": "checkpoint-4"}, "checkpoint-4"),
    ):
        with pytest.raises(KeyboardInterrupt):
            lt.train(run, **options)
        assert at_the_start.pop() == start
    for wrong in ("checkpoint-5", "checkpoint-4/", "..", "/", ""):
        with pytest.raises(
            lt.ConfigError, match=r"resume_from must be .*checkpoint-6, checkpoint-4"
        ):
            lt.train(run, resume_from=wrong)


def test_going_on_from_an_earlier_checkpoint_ends_with_the_same_weights(
    run: dict[str, Any], tmp_path: Path
) -> None:
    lt.train(run, resume_from="checkpoint-4")
    lt.train(run, output=tmp_path / "whole")
    assert same(saved_weights(run["output"]), saved_weights(tmp_path / "whole"))
    names = sorted(path.name for path in (Path(run["output"]) / "checkpoints").iterdir())
    assert names == ["checkpoint-10", "checkpoint-8", "result.json"]
    with pytest.raises(lt.ConfigError, match="resume_from must be left out for a run that has"):
        lt.train(run, resume_from="checkpoint-8")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_does_not_run(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Neither where the manifest tells of it, nor where that was forged as well."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(run["output"]) / "checkpoints" / "checkpoint-6"
    for plant in (lambda path: torch.save(Payload(), path), DAMAGES["pickled"]):
        plant(checkpoint / name)
        with pytest.raises(lt.ConfigError, match=rf"{name} with "):
            lt.train(run, resume_from="checkpoint-6")
        write_manifest(checkpoint, "checkpoint")
        with pytest.raises(lt.ConfigError, match=r"checkpoint-6 with a pickle .* was not run"):
            lt.train(run, resume_from="checkpoint-6")
        assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_was_cut_off_leaves_the_start(
    run: dict[str, Any], at_the_start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash in the first save leaves files without a manifest; nothing is lost but time."""
    for checkpoint in (Path(run["output"]) / "checkpoints").iterdir():
        (checkpoint / "leantune_manifest.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        lt.train(run, resume=True)
    assert not at_the_start
    assert "going on from step 0, passed over checkpoint-6: no leantune_manifest.json" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"name": 1}', '{"format": 2}'])
def test_garbage_in_a_runs_own_files_is_named(run: dict[str, Any], text: str) -> None:
    output = Path(run["output"])
    for name in ("recipe.json", "metrics.json"):
        path = output / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(text)
        with pytest.raises(lt.ConfigError, match=rf"{name}"):
            lt.train(run, resume=True)
        path.unlink() if before is None else path.write_bytes(before)
    path = output / "result.json"
    path.write_text(text)
    with pytest.raises(lt.ConfigError, match=r"result\.json"):
        VariantResult.read(path)


def test_one_process_at_a_time_writes_into_a_folder(run: dict[str, Any]) -> None:
    with (Path(run["output"]) / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for how in ("resume", "overwrite"):
            with pytest.raises(lt.ConfigError, match=r"output must be .* no other run is writing"):
                lt.train(run, **{how: True})


def test_two_runs_that_start_together_do_not_mix(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither sees a folder when it is checked; the second is refused before it writes."""

    class Second(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                with monkeypatch.context() as patch:
                    # As it was when the second had its look at the folder.
                    patch.setattr("leantune.training.run.check_folder", lambda recipe: None)
                    with pytest.raises(lt.ConfigError, match="no other run is writing to"):
                        lt.train(base)

    lt.train(base, epochs=1, callbacks=[Second()])
    assert (Path(base["output"]) / "metrics.json").is_file()


def test_a_resumed_run_clears_away_what_a_killed_one_had_half_written(
    run: dict[str, Any], at_the_start: list[str]
) -> None:
    left = Path(run["output"]) / ".model.ab12cd_3"
    left.mkdir()
    with pytest.raises(KeyboardInterrupt):
        lt.train(run, resume=True)
    assert at_the_start == ["checkpoint-6"] and not left.exists()


def test_a_file_system_without_locks_lets_runs_in(
    run: dict[str, Any],
    at_the_start: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flock = fcntl.flock

    def no_locks(file: Any, how: int) -> None:
        # The data sets' cache has locks of its own.
        if not isinstance(file, int):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(KeyboardInterrupt):
        lt.train(run, resume=True)
    assert at_the_start == ["checkpoint-6"]
    assert "no lock on this file system" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_other_signals_keep_a_checkpoint_as_well(run: dict[str, Any], name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup, say, has the tests ignore it
    try:
        with pytest.raises(KeyboardInterrupt, match=name) as stop:
            lt.train(run, resume=True, callbacks=[Interrupt(9, number=number)])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert stop.value.number == number  # type: ignore[attr-defined]
    assert find_damage(Path(run["output"]) / "checkpoints" / "checkpoint-9", "checkpoint") is None


def test_a_signal_before_training_leaves_nothing(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "leantune.training.experiment.load_model",
        lambda *_, **__: signal.raise_signal(signal.SIGTERM),
    )
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        lt.train(base)
    assert not Path(base["output"]).exists()


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, lambda *_: None])
def test_handlers_of_others_keep_their_say(ignored: Any) -> None:
    before = signal.signal(signal.SIGHUP, ignored)
    try:
        with handled_by():
            assert signal.getsignal(signal.SIGHUP) is ignored
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")),
        ("transformers.modeling_utils.safe_save_file", SafetensorError("I/O error: No space left")),
        ("builtins.open", OSError(28, "No space left on device")),
    ],
)
def test_a_disk_that_fills_up_in_training_keeps_the_last_checkpoint(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, write: str, error: Exception
) -> None:
    """Whatever each library raises for it."""

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                monkeypatch.setattr(write, full)

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    recipe = Path(run["output"]) / "recipe.json"
    before = recipe.read_text()
    with pytest.raises(WriteError, match=r"checkpoints must be writable .* bytes free; make room"):
        lt.train(run, resume=True, callbacks=[Fill()])
    monkeypatch.undo()
    folder = Path(run["output"]) / "checkpoints"
    assert find_damage(folder / "checkpoint-6", "checkpoint") is None
    assert find_damage(folder / "checkpoint-8", "checkpoint") is not None
    assert recipe.read_text() == before


def test_a_disk_that_is_too_small_or_closed_is_refused_before_it_is_touched(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
        with pytest.raises(WriteError, match=r"room for a checkpoint of [\d,]+ bytes, got .*1,000"):
            lt.train(base)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(WriteError, match="no permission to write"):
            lt.train(base)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="no folder"):
        lt.train(base, output=tmp_path / "file" / "run")
    assert not Path(base["output"]).exists() and (tmp_path / "file").read_text() == "mine"


def test_the_home_folder_is_expanded_once(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = RunRecipe(**{**base, "output": "~/x", "data": Path("~/data"), "model": "~/model"})
    assert [recipe.output, recipe.data, recipe.model] == [
        str(tmp_path / name) for name in ("x", "data", "model")
    ]


def test_resuming_does_not_repeat_what_is_done(
    base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base["compare"] = "baseline"
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, callbacks=[Interrupt(2)])
    seen = Steps()
    result = lt.train(base, callbacks=[seen], resume=True)
    assert {name for name, _ in seen.steps} == {"wta_crs"}
    assert [r.name for r in result.runs] == ["baseline", "wta_crs"]
    again = Steps()
    # Nobody goes on from these, so nobody asks how they are.
    for path in Path(base["output"]).glob("checkpoints/*/optimizer.pt"):
        path.unlink()
    capsys.readouterr()
    assert lt.train(base, callbacks=[again], resume=True) == result
    assert not again.steps and capsys.readouterr().err == ""


def test_an_existing_folder_is_kept_unless_told(base: dict[str, Any]) -> None:
    output = Path(base["output"])
    base["epochs"] = 1
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(lt.ConfigError, match=r"output must be a new folder.*which exists"):
        lt.train(base)
    with pytest.raises(lt.ConfigError, match=r"must be a run's folder to be overwritten"):
        lt.train(base, overwrite=True)
    with pytest.raises(lt.ConfigError, match=r"must be a run's folder to be resumed.*recipe\.json"):
        lt.train(base, resume=True)
    # A session's folder has a recipe as well.
    lt.apply(new_model(base), lt.LoRA()).save(output / "s")
    with pytest.raises(lt.ConfigError, match=r"must be a run's folder to be overwritten.*model"):
        lt.train(base, output=output / "s", overwrite=True)
    shutil.rmtree(output / "s")
    (output / "mine.txt").unlink()
    lt.train(base)
    before = saved_weights(output)
    with pytest.raises(lt.ConfigError, match=r"seed must be 0 to resume the run.*got 1"):
        lt.train(base, seed=1, resume=True)
    # What is wrong with the new run shows before the old one is touched.
    with pytest.raises(lt.SiteError):
        lt.train(base, methods=[lt.WTACRS(sites="no_such_module")], overwrite=True)
    with pytest.raises(lt.ConfigError, match="max_length must be"):
        lt.train(base, max_length=33, overwrite=True)
    assert same(saved_weights(output), before)
    (output / "notes.txt").write_text("mine")
    for place in ("model", "checkpoints", "checkpoints/checkpoint-5"):
        mine = output / place / "mine.txt"
        mine.write_text("mine")
        with pytest.raises(lt.ConfigError, match=r"mine\.txt"):
            lt.train(base, seed=1, overwrite=True)
        assert same(saved_weights(output), before)
        mine.unlink()
    lt.train(base, seed=1, overwrite=True)
    assert not same(saved_weights(output), before)
    assert (output / "notes.txt").exists()


@pytest.mark.parametrize("how", [{"save_steps": 1}, {"eval_steps": 1}, {}])
def test_a_run_that_diverges_ends_at_once_and_keeps_what_is_good(
    base: dict[str, Any], how: dict[str, Any]
) -> None:
    options = {"learning_rate": 1e30, "max_grad_norm": 0, "schedule": "constant", **how}
    with pytest.raises(lt.ConfigError, match=r"wta_crs: .* must be finite, .* at step \d"):
        lt.train(base, max_steps=20, **options)
    output = Path(base["output"])
    for path in output.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert not (output / "model").exists() and not (output / "metrics.json").exists()


class SpoilEvaluation(TrainerCallback):
    """Let the second step's evaluation give NaN, though loss and weights are finite."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].register_forward_hook(self._spoil)

    def _spoil(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if not model.training:
            output.logits = output.logits * torch.nan


def test_a_run_that_an_evaluation_finds_diverged_names_the_step(base: dict[str, Any]) -> None:
    with pytest.raises(lt.ConfigError, match=r"wta_crs: accuracy on the validation .* at step 2;"):
        lt.train(base, eval_steps=2, callbacks=[SpoilEvaluation()])
    assert not (Path(base["output"]) / "model").exists()


def test_a_checkpoint_that_is_not_finite_is_refused(base: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        lt.train(base, callbacks=[Interrupt(3)])
    path = Path(base["output"]) / "checkpoints" / "checkpoint-3" / "model.safetensors"
    weights = {name: tensor * torch.nan for name, tensor in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    write_manifest(path.parent, "checkpoint")
    with pytest.raises(lt.ConfigError, match=r"the loss must be finite, .* at step 4;"):
        lt.train(base, resume=True)


def test_a_full_disk_leaves_no_half_result(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("leantune.core.files.save_tensors", full_disk)
        with pytest.raises(OSError, match="No space left"):
            lt.train(base, epochs=1)
    output = Path(base["output"])
    assert not (output / "session").exists() and not (output / "metrics.json").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".session")]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora_leaves_an_adapter_and_a_merged_model(base: dict[str, Any]) -> None:
    import peft

    result = lt.train(base, methods=[lt.LoRA(rank=4), SAMPLED], epochs=1)
    assert result.runs[0].name == "lora+wta_crs"
    output = Path(base["output"])
    # The head of the base model is the run's own, from its seed.
    adapted = peft.PeftModel.from_pretrained(new_model(base), output / "adapter").eval()
    kind = transformers.AutoModelForSequenceClassification
    merged = kind.from_pretrained(output / "model").eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        a, b = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_no_adapter_is_left_whose_base_has_trained_too(base: dict[str, Any]) -> None:
    methods = [lt.LoRA(rank=2, sites="attention.output"), lt.SparseGrad(density=0.1)]
    lt.train(base, methods=methods, max_steps=2)
    assert {"session", "model"} <= {path.name for path in Path(base["output"]).iterdir()}
    assert not (Path(base["output"]) / "adapter").exists()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("method", [m for m, s in lt.list_methods().items() if not s.needs_gpu])
def test_every_method_trains_from_files_to_folder(base: dict[str, Any], method: str) -> None:
    """Calibration included; a plain model is written where one computes the same."""
    spec = lt.list_methods()[method]
    result = lt.train(base, methods=[spec.config(**spec.test_options)], max_steps=2)
    output = Path(base["output"])
    assert result.runs[-1].num_steps == 2 and math.isfinite(result.runs[-1].metrics["loss"])
    session = lt.load(new_model(base), output / "session")
    assert session.step == 2 and [m.method for m in session.methods] == [method]
    assert (output / "model").is_dir() == session.can_merge


def new_model(base: dict[str, Any], seed: int = 0) -> Any:
    """Load the run's model as the run does before its first step."""
    labels = load_task(base["task"], base["data"])["train"].features["label"].names
    return load_model(base["model"], get_task(base["task"]), labels, tokenizer(), seed=seed)


def test_samples_are_numbered_for_cached_norms(base: dict[str, Any]) -> None:
    cached = lt.WTACRS(keep_ratio=0.3, min_rows=2, norms="cache")
    result = lt.train(base, methods=[cached], compare=["baseline"])
    state = load_file(Path(base["output"]) / "session" / STATE_FILE)
    # Every sample was met.
    assert len(state["0.wta_crs/norms/cache"]) == result.num_train
    assert state["0.wta_crs/norms/cache"].float().amax((1, 2)).all()


def test_a_regression_run_is_judged_by_correlation(base: dict[str, Any], tmp_path: Path) -> None:
    data = write_sentences(tmp_path / "scores", lambda good: "4.5" if good else "0.5")
    result = lt.train(base, task="regression", data=data, epochs=1)
    assert result.main_metric == "pearson" and result.floor == {"name": "mean", "value": 0.0}
    assert result.runs[0].metrics.keys() == {"pearson", "spearman", "loss"}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model")
    assert (config.problem_type, config.num_labels) == ("regression", 1)


def test_a_language_model_run_gives_perplexity(base: dict[str, Any], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text("good w1 w2 w3 bad w4\n" * 40)
    (folder / "validation.txt").write_text("good w1 w2 w3 bad w4\n" * 16)
    options = {"model": tmp_path / "llama", "task": "causal_lm", "data": folder, "max_length": 8}
    result = lt.train({**base, **options})
    metrics = result.runs[0].metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    # Six tokens in a line of 21 characters, the line's end included (but for the last).
    per_byte = 6 * 16 / (21 * 16 - 1)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) * per_byte)
    assert result.floor is None
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["use_cache"] == llama().config.use_cache


def test_other_ways_to_train_are_passed_on(base: dict[str, Any]) -> None:
    options = {"precision": "bf16", "gradient_checkpointing": True, "schedule": "constant"}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 4, "eval_steps": 2, "save_steps": 1}
    options |= {"max_train": 24, "max_validation": 8, "batch_size": 4}
    result = lt.train(base, **options)
    assert (result.num_train, result.num_validation) == (24, 8)
    assert [step for step, _ in result.runs[0].evaluations] == [2, 4]
    names = sorted(path.name for path in (Path(base["output"]) / "checkpoints").iterdir())
    assert names == ["checkpoint-3", "checkpoint-4", "result.json"]


def test_bad_input_is_named_and_nothing_is_written(base: dict[str, Any], tmp_path: Path) -> None:
    def fails(message: str, **changes: Any) -> None:
        with pytest.raises(lt.LeantuneError, match=message):
            lt.train(base, **changes)

    fails(r"got '.*nowhere'.*correct the path", model=tmp_path / "nowhere")
    fails(r"got 'nobody/no-such-model'.*without a network", model="nobody/no-such-model")
    fails("sites", methods=[lt.WTACRS(sites="no_such_module")])
    if not torch.cuda.is_available():
        fails(r"precision must be .*got 'fp16'", precision="fp16")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\n" * 40)
    text = {"task": "causal_lm", "data": tmp_path / "text.txt", "max_length": 4}
    fails("must read from left to right", **text)
    weights = Path(base["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails("as a model for classification")
    transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**bert().config.to_dict(), "num_labels": 3})
    ).save_pretrained(base["model"])
    fails("weights of other shapes: start from the encoder without a head")
    assert not Path(base["output"]).exists()


def test_a_new_head_comes_from_the_seed_alone(base: dict[str, Any]) -> None:
    state = torch.random.get_rng_state()
    heads = [new_model(base, seed).classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.random.get_rng_state(), state)
