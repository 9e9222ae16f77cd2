"""A run from files to its folder: comparison, schema, interruption, resumption, bad input."""

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.tiny import bert, llama, same, tokenizer, write_sentences
from safetensors.torch import load_file
from transformers import TrainerCallback

import leantune as lt
from leantune.core import registry
from leantune.core.registry import Figure
from leantune.report import write_report
from leantune.train.models import load_model
from leantune.train.run import RunConfig, RunResult, VariantResult, run

SAMPLED = lt.WTACRS(keep_ratio=0.3, min_rows=2)


@pytest.fixture
def base(model_folder: Path, data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of ten steps, five an epoch."""
    return {
        "model": str(model_folder),
        "task": "text",
        "data": str(data_folder),
        "output": str(tmp_path / "run"),
        "methods": [SAMPLED],
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 32,
    }


def saved_weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model" / "model.safetensors")


class Interrupt(TrainerCallback):
    """Press Ctrl-C when a step of a variant begins, or raise at once."""

    def __init__(self, step: int, name: str = "wta_crs", at_once: bool = False) -> None:
        self.step, self.name, self.at_once = step, name, at_once

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and args.run_name == self.name:
            if self.at_once:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)


class Steps(TrainerCallback):
    """Note the optimiser steps that are taken."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((args.run_name, state.global_step))


def test_a_compared_run_writes_its_folder(base: dict[str, Any]) -> None:
    config = RunConfig(**base, compare="exact")
    result = run(config)
    output = Path(config.output)
    data = json.loads((output / "metrics.json").read_text())
    assert RunResult.from_dict(data) == result and data == result.to_dict()
    assert data.keys() == {"format", *(f.name for f in dataclasses.fields(RunResult))}
    assert RunConfig.from_dict(json.loads((output / "recipe.json").read_text())) == config
    exact, method = result.runs
    assert [r.name for r in result.runs] == ["exact", "wta_crs"]
    for variant in result.runs:
        assert vars(variant).keys() == {f.name for f in dataclasses.fields(VariantResult)}
        assert variant.num_steps == 10
        assert [step for step, _ in variant.train_loss] == list(range(1, 11))
        assert [step for step, _ in variant.evaluations] == [5, 10]
        assert variant.metrics == variant.evaluations[-1][1]
        assert variant.metrics.keys() == {"accuracy", "loss"}
        assert variant.tokens_per_second > 0 and variant.train_seconds > 0
        assert variant.saved_bytes == variant.ledger["activations"]
        assert variant.step_time_ratio is not None and variant.step_time_ratio_spread is not None
    assert exact.step_time_ratio == 1.0
    assert method.saved_bytes < exact.saved_bytes
    # Same head, order and dropout: the first forward is exact with the method, too.
    assert method.train_loss[0] == exact.train_loss[0]
    assert method.train_loss[-1] != exact.train_loss[-1]
    assert (result.num_train, result.num_validation) == (40, 16)
    assert result.baseline == {"name": "majority", "value": 0.5}
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "checkpoints-exact",
        "metrics.json",
        "model",
        "recipe.json",
        "session",
    ]


def test_the_model_loads_without_us_and_predicts_the_same(base: dict[str, Any]) -> None:
    config = RunConfig(**base)
    result = run(config)
    classify = transformers.pipeline(
        "text-classification", str(Path(config.output) / "model"), device="cpu"
    )
    lines = (Path(config.data or "") / "validation.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    answers = [classify(text)[0] for text in texts]
    losses = [
        -math.log(a["score"] if a["label"] == label else 1 - a["score"])
        for a, label in zip(answers, labels, strict=True)
    ]
    metrics = result.runs[0].metrics
    hits = [a["label"] == label for a, label in zip(answers, labels, strict=True)]
    assert metrics["accuracy"] == sum(hits) / 16
    assert metrics["loss"] == pytest.approx(sum(losses) / 16, rel=1e-4)
    assert result.runs[0].step_time_ratio is None


def test_equal_configs_give_equal_bits_and_other_seeds_do_not(base: dict[str, Any]) -> None:
    results = []
    for number, seed in enumerate((0, 0, 1)):
        output = f"{base['output']}{number}"
        run(RunConfig(**{**base, "output": output, "epochs": 1, "seed": seed}))
        results.append(saved_weights(output))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize("step", [3, 5, 8])
def test_interrupted_and_resumed_equals_uninterrupted(base: dict[str, Any], step: int) -> None:
    base = {**base, "methods": [lt.WTACRS(min_rows=2, norms="cache")], "save_steps": 5}
    whole = run(RunConfig(**{**base, "output": base["output"] + "-whole"}))
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(**base), callbacks=[Interrupt(step)])
    assert (Path(base["output"]) / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert not (Path(base["output"]) / "metrics.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = Steps()
    resumed = run(RunConfig(**base, resume=True), callbacks=[seen])
    assert [number for _, number in seen.steps] == list(range(step + 1, 11))
    assert same(saved_weights(base["output"]), saved_weights(base["output"] + "-whole"))
    assert resumed.runs[0].metrics == whole.runs[0].metrics
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations
    assert [at for at, _ in resumed.runs[0].train_loss] == list(range(1, 11))


def test_an_abrupt_end_goes_on_from_the_last_checkpoint(base: dict[str, Any]) -> None:
    run(RunConfig(**{**base, "output": base["output"] + "-whole"}))
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(**base), callbacks=[Interrupt(8, at_once=True)])
    # A crash may also leave a checkpoint half written.
    half = Path(base["output"]) / "checkpoints" / "checkpoint-7"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step"')
    seen = Steps()
    run(RunConfig(**base, resume=True), callbacks=[seen])
    assert [number for _, number in seen.steps] == [6, 7, 8, 9, 10]
    assert same(saved_weights(base["output"]), saved_weights(base["output"] + "-whole"))


def test_resuming_does_not_repeat_what_is_done(base: dict[str, Any]) -> None:
    base = {**base, "compare": "exact"}
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(**base), callbacks=[Interrupt(2)])
    seen = Steps()
    result = run(RunConfig(**base, resume=True), callbacks=[seen])
    assert {name for name, _ in seen.steps} == {"wta_crs"}
    assert [r.name for r in result.runs] == ["exact", "wta_crs"]
    again = Steps()
    assert run(RunConfig(**base, resume=True), callbacks=[again]) == result
    assert not again.steps
    # Cut off between the end of training and the saved model: the last stretch is done again.
    expected = saved_weights(base["output"])
    (Path(base["output"]) / "metrics.json").unlink()
    run(RunConfig(**base, resume=True), callbacks=[again])
    assert [number for _, number in again.steps] == [6, 7, 8, 9, 10]
    assert same(saved_weights(base["output"]), expected)


def test_an_existing_folder_is_kept_unless_told(base: dict[str, Any]) -> None:
    output = Path(base["output"])
    base = {**base, "epochs": 1}
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(lt.ConfigError, match=r"output must be a new folder.*which exists"):
        run(RunConfig(**base))
    with pytest.raises(lt.ConfigError, match=r"must be a run's folder to be overwritten"):
        run(RunConfig(**base, overwrite=True))
    with pytest.raises(lt.ConfigError, match=r"must hold recipe.json to be resumed"):
        run(RunConfig(**base, resume=True))
    (output / "mine.txt").unlink()
    run(RunConfig(**base))
    before = saved_weights(output)
    with pytest.raises(lt.ConfigError, match="which exists"):
        run(RunConfig(**base))
    with pytest.raises(lt.ConfigError, match=r"seed must be 0 to resume the run.*got 1"):
        run(RunConfig(**base, seed=1, resume=True))
    # What is wrong with the new run shows before the old one is touched.
    with pytest.raises(lt.SiteError):
        methods = [lt.WTACRS(sites="no_such_module")]
        run(RunConfig(**{**base, "methods": methods}, overwrite=True))
    with pytest.raises(lt.ConfigError, match="max_length must be"):
        run(RunConfig(**{**base, "max_length": 33}, overwrite=True))
    assert same(saved_weights(output), before)
    (output / "notes.txt").write_text("mine")
    run(RunConfig(**base, seed=1, overwrite=True))
    assert not same(saved_weights(output), before)
    assert (output / "notes.txt").exists()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_lora_leaves_an_adapter_and_a_merged_model(base: dict[str, Any]) -> None:
    import peft

    config = RunConfig(**{**base, "methods": [lt.LoRA(rank=4), SAMPLED], "epochs": 1})
    result = run(config)
    assert result.runs[0].name == "lora+wta_crs"
    output = Path(config.output)
    # The head of the base model is the run's own, from its seed.
    plain, _ = load_model(config.model, _text_data(config), seed=config.seed)
    adapted = peft.PeftModel.from_pretrained(plain, output / "adapter").eval()
    kind = transformers.AutoModelForSequenceClassification
    merged = kind.from_pretrained(output / "model").eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        a, b = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bert()(input_ids=ids).logits, b, atol=1e-2)


@pytest.mark.parametrize("method", lt.methods())
def test_every_method_trains_from_files_to_folder(base: dict[str, Any], method: str) -> None:
    """Calibration included; a plain model is written where one computes the same."""
    spec = lt.methods()[method]
    base["methods"] = [spec.config(**spec.example)]
    config = RunConfig(**base, max_steps=2)
    result = run(config)
    output = Path(config.output)
    assert result.runs[-1].num_steps == 2 and math.isfinite(result.runs[-1].metrics["loss"])
    assert (output / "model").is_dir() == spec.merges(base["methods"][0])
    model, _ = load_model(config.model, _text_data(config), seed=config.seed)
    session = lt.load(model, output / "session")
    assert session.draw > 0 and [m.method for m in session.methods] == [method]


def _text_data(config: RunConfig) -> Any:
    from leantune.train.data import load_task

    assert config.data is not None
    return load_task(config.task, config.data)


def test_a_regression_run_is_judged_by_correlation(base: dict[str, Any], tmp_path: Path) -> None:
    data = write_sentences(tmp_path / "scores", lambda good: "4.5" if good else "0.5")
    result = run(RunConfig(**{**base, "task": "regression", "data": str(data), "epochs": 1}))
    assert result.main_metric == "pearson"
    assert result.baseline == {"name": "mean", "value": 0.0}
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
    options = {"model": str(tmp_path / "llama"), "task": "causal_lm", "data": str(folder)}
    result = run(RunConfig(**{**base, **options, "max_length": 8, "epochs": 4}))
    metrics = result.runs[0].metrics
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    # Six tokens in a line of 21 characters, the line's end included (but for the last).
    per_byte = 6 * 16 / (21 * 16 - 1)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2) * per_byte)
    assert metrics["perplexity"] < 40 and result.baseline is None
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["use_cache"] == llama().config.use_cache


def test_the_measured_batch_is_the_first_of_training(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    kept = transformers.DataCollatorWithPadding.__call__

    def collate(self: Any, features: Any) -> Any:
        batch = kept(self, features)
        batches.append(batch["input_ids"].clone())
        return batch

    monkeypatch.setattr(transformers.DataCollatorWithPadding, "__call__", collate)
    run(RunConfig(**base, compare="exact", max_steps=1, eval_steps=1))
    # Measured for the exact and the sampled model, then the start of both trainings.
    first = [batch for batch in batches if torch.equal(batch, batches[0])]
    assert len(first) == 4
    assert batches[0].shape[1] == (batches[0] != 0).sum(1).max()


def test_other_ways_to_train_are_passed_on(base: dict[str, Any]) -> None:
    options = {"precision": "bf16", "gradient_checkpointing": True, "schedule": "constant"}
    options |= {"gradient_accumulation_steps": 2, "max_steps": 4, "eval_steps": 2, "save_steps": 1}
    options |= {"max_train": 24, "max_validation": 8, "batch_size": 4, "compare": "exact"}
    result = run(RunConfig(**{**base, **options}))
    assert (result.num_train, result.num_validation) == (24, 8)
    for variant in result.runs:
        assert variant.num_steps == 4
        assert [step for step, _ in variant.evaluations] == [2, 4]
    plain = run(RunConfig(**{**base, "compare": "exact", "output": base["output"] + "-plain"}))
    assert result.runs[0].saved_bytes < plain.runs[0].saved_bytes
    names = sorted(path.name for path in (Path(base["output"]) / "checkpoints").iterdir())
    assert names == ["checkpoint-3", "checkpoint-4", "result.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be integer >= 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be number > 0, got nan"),
        ({"precision": "half"}, "precision must be one of 'float32', 'bf16', 'fp16', got 'half'"),
        ({"methods": ["wta_crs"]}, "methods must be a list of method configs"),
        ({"methods": 3}, "methods must be a list of method configs, got 3"),
        ({"methods": [], "compare": "exact"}, "compare must be None where methods is empty"),
        ({"data": None}, "data must be a folder or 'hub' for task text, got None"),
        ({"task": "demo"}, "data must be left out for task demo"),
        ({"resume": True, "overwrite": True}, "overwrite must be False where resume is True"),
    ],
)
def test_a_bad_option_names_itself(base: dict[str, Any], changes: dict, message: str) -> None:
    with pytest.raises(lt.ConfigError, match="RunConfig: ") as error:
        RunConfig(**{**base, **changes})
    assert message in str(error.value)


def test_a_recipe_with_a_slip_is_refused(base: dict[str, Any]) -> None:
    recipe = RunConfig(**base).to_dict()
    for changes, message in (
        ({"epoch": 3}, "option must be one of .* got 'epoch'; did you mean 'epochs'"),
        ({"format": 2}, "format must be at most 1, got 2; .*newer leantune"),
        ({"methods": [{"method": "wtacrs"}]}, "method must be one of .* got 'wtacrs'"),
        ({"methods": [{"method": "wta_crs", "keep": 1}]}, "option must be one of .* got 'keep'"),
        ({"methods": "wta_crs"}, "methods must be a list of entries"),
    ):
        with pytest.raises(lt.ConfigError, match=message):
            RunConfig.from_dict({**recipe, **changes})
    with pytest.raises(lt.ConfigError, match="model must be given, got none"):
        RunConfig.from_dict({key: value for key, value in recipe.items() if key != "model"})


def test_bad_input_is_named_and_nothing_is_written(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(lt.ConfigError, match=r"there is no such folder"):
        run(RunConfig(**{**base, "model": missing}))
    with pytest.raises(lt.ConfigError, match=r"model must hold what .*without a network"):
        run(RunConfig(**{**base, "model": "nobody/no-such-model"}))
    weights = Path(base["model"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(lt.ConfigError, match=r"as a model for classification"):
        run(RunConfig(**base))
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\n" * 40)
    transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**bert().config.to_dict(), "num_labels": 3})
    ).save_pretrained(base["model"])
    with pytest.raises(lt.ConfigError, match=r"head of this task's size.*without a head"):
        run(RunConfig(**base))
    options = {"task": "causal_lm", "data": str(tmp_path / "text.txt"), "max_length": 4}
    with pytest.raises(lt.ConfigError, match=r"must read from left to right"):
        run(RunConfig(**{**base, **options}))
    bert().bert.save_pretrained(base["model"])
    with pytest.raises(lt.SiteError):
        run(RunConfig(**{**base, "methods": [lt.WTACRS(sites="no_such_module")]}))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("leantune.train.run.ledger", _interrupt)
        run(RunConfig(**base))
    assert not Path(base["output"]).exists()


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_float16_needs_a_gpu(base: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(lt.ConfigError, match=r"precision must be .*got 'fp16'"):
        run(RunConfig(**base, precision="fp16"))


def test_a_new_head_comes_from_the_seed_alone(base: dict[str, Any]) -> None:
    data = _text_data(RunConfig(**base))
    state = torch.random.get_rng_state()
    heads = [load_model(base["model"], data, seed=seed)[0].classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.random.get_rng_state(), state)


SPARSE = lt.SparseGrad(density=0.1, num_calibration_steps=2)


def test_a_methods_figures_are_in_metrics_and_report(base: dict[str, Any]) -> None:
    base = {**base, "methods": [SPARSE, lt.WTACRS(min_rows=2)], "compare": "exact", "max_steps": 2}
    result = run(RunConfig(**base))
    output = Path(base["output"])
    data = json.loads((output / "metrics.json").read_text())
    assert RunResult.from_dict(data) == result
    exact, method = data["runs"]
    (figure,) = method["figures"]
    assert exact["figures"] == [] and figure.keys() == {"title", "note", "values"}
    assert list(figure["values"]) == ["original", "one-sided", "right, shared", "right, per layer"]
    assert all(0 < value <= 1 for value in figure["values"].values())
    # 40 rows in batches of 8: two to calibrate on, three are left.
    assert figure["note"].endswith("not seen in calibration: 3.")
    page = write_report(output).read_text()
    assert figure["title"] in page and "right, per layer " in page
    assert (output / "plots" / "figure-1.png").is_file()
    # Files of older versions have no figures.
    for entry in data["runs"]:
        del entry["figures"]
    assert RunResult.from_dict(data).runs[1].figures == []
    (output / "metrics.json").write_text(json.dumps(data))
    assert figure["title"] not in write_report(output).read_text()
    assert not (output / "plots" / "figure-1.png").exists()


def test_figures_leave_no_trace_in_training_and_survive_a_stop(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {**base, "methods": [SPARSE]}
    whole = run(RunConfig(**{**base, "output": base["output"] + "-whole"}))
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(**base), callbacks=[Interrupt(3, name="sparse_grad")])
    spec = lt.methods()["sparse_grad"]
    with monkeypatch.context() as patch:
        # What is resumed measures nothing, and a run without them trains the same bits.
        patch.setitem(registry._METHODS, "sparse_grad", dataclasses.replace(spec, figures=None))
        resumed = run(RunConfig(**base, resume=True))
        without = run(RunConfig(**{**base, "output": base["output"] + "-without"}))
    assert resumed.runs[0].figures == whole.runs[0].figures != []
    assert without.runs[0].figures == []
    assert without.runs[0].train_loss == whole.runs[0].train_loss
    for end in ("", "-without"):
        assert same(saved_weights(base["output"] + end), saved_weights(base["output"] + "-whole"))


def test_a_figure_without_a_finite_number_is_left_out(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(session: lt.Session, calibration: list, held_out: list) -> list[Figure]:
        # 40 rows are five batches: calibration saw all, so the others are validation rows.
        assert len(calibration) == 5 and len(held_out) == 2
        return [Figure(t, "note", {"a": v}) for t, v in (("good", 2.0), ("bad", math.nan))]

    spec = dataclasses.replace(lt.methods()["sparse_grad"], figures=figures)
    monkeypatch.setitem(registry._METHODS, "sparse_grad", spec)
    options = {"methods": [dataclasses.replace(SPARSE, num_calibration_steps=30)], "max_steps": 1}
    (variant,) = run(RunConfig(**{**base, **options})).runs
    assert variant.figures == [{"title": "good", "note": "note", "values": {"a": 2.0}}]
