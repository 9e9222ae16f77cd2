"""A finished run's model is scored as in training, and predicts rows without labels."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from integration.test_cli import invoke, plain
from integration.tiny import bert, llama, tokenizer, write_sentences
from training.chats import chat_tokenizer, chats, write_lines

import leantune as lt
from leantune.training.data import TASKS
from leantune.training.evaluation import evaluate, predict
from leantune.training.results import RunResult

SAMPLED = lt.WTACRS(keep_ratio=0.5, min_rows=2)
ROUTED = [lt.LoRA(rank=4), lt.RoutedFFN()]
BASE = {"max_steps": 4, "batch_size": 4, "max_length": 16, "learning_rate": 1e-2}
TEXT = "w1 good w2 bad w3 w4 fine poor w5 w6 w7"


def save(folder: Path, model: Any, words: Any) -> str:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def text_options(folder: Path) -> dict[str, Any]:
    return {
        **BASE,
        "model": save(folder / "base", bert().bert, tokenizer()),
        "task": "text",
        "data": str(write_sentences(folder / "data", lambda good: "good" if good else "bad")),
        "output": str(folder / "run"),
    }


@pytest.fixture
def chat_run(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "data").mkdir()
    for split, count in (("train", 32), ("validation", 10)):
        write_lines(tmp_path / "data" / f"{split}.jsonl", chats(count))
    return {
        **BASE,
        "model": save(tmp_path / "base", llama(), chat_tokenizer()),
        "task": "chat",
        "data": str(tmp_path / "data"),
        "output": str(tmp_path / "run"),
    }


METHODS: dict[str, list[Any]] = {"plain": [], "merged": [SAMPLED], "session": ROUTED}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, RunResult]]:
    """Return a function that trains by the methods of a name, once: the folder and the result."""

    @cache
    def train(name: str) -> tuple[Path, RunResult]:
        folder = tmp_path_factory.mktemp("trained")
        # The plain one learns the task.
        num_steps = 20 if METHODS[name] else 60
        how = {"methods": METHODS[name], "max_steps": num_steps, "save_steps": num_steps}
        return folder / "run", lt.train(text_options(folder), **how)

    return train


@pytest.mark.parametrize("name", METHODS)
def test_the_own_split_scores_as_at_the_end_of_training(trained: Any, name: str) -> None:
    run, result = trained(name)
    assert (run / "model").is_dir() == (name != "session")
    found = evaluate(run)
    assert (found["num_rows"], found["data"]) == (16, str(run.parent / "data"))
    assert found["metrics"] == pytest.approx(result.runs[-1].metrics, rel=1e-5)


def test_a_chat_and_a_text_score_as_at_the_end_of_training(
    chat_run: dict[str, Any], tmp_path: Path
) -> None:
    trained = lt.train(chat_run, methods=[lt.LoRA(rank=4)], score_answers=True)
    found = evaluate(chat_run["output"])["metrics"]
    assert found == pytest.approx(trained.runs[-1].metrics, rel=1e-5)
    assert found.keys() == {"loss", "perplexity", "accuracy"}
    asks_a_reference = replace(TASKS["chat"], kind="preference")  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leantune.training.data.TASKS", {**TASKS, "chat": asks_a_reference})
        with pytest.raises(lt.ConfigError, match="task must be another than preference"):
            evaluate(chat_run["output"])
    text = {"task": "causal_lm", "packing": True, "output": str(tmp_path / "text")}
    rows = [{"text": TEXT} for _ in range(20)]
    trained = lt.train(chat_run | text, data=str(write_lines(tmp_path / "a.jsonl", rows)))
    found = evaluate(text["output"])["metrics"]
    assert found == pytest.approx(trained.runs[-1].metrics, rel=1e-5) and "bits_per_byte" in found


def test_other_data_keep_the_ids_of_the_models_classes(trained: Any, tmp_path: Path) -> None:
    """A file of one class alone, which is the second of the model's."""
    run, _ = trained("plain")
    rows = [{"sentence1": text, "label": "good"} for text in ("good w1", "fine w2 w3", "w4 nice")]
    file = write_lines(tmp_path / "other.jsonl", rows)
    found = evaluate(run, data=str(file))
    assert (found["num_rows"], found["metrics"]["accuracy"]) == (3, 1.0)
    write_lines(file, [{"sentence1": "w1", "label": "ugly"}])
    with pytest.raises(lt.ConfigError, match="'label' must be one of bad, good, got 'ugly'"):
        evaluate(run, data=str(file))
    with pytest.raises(lt.ConfigError, match=r"option must be one of .* got 'learning_rate'"):
        evaluate(run, learning_rate=1.0)
    assert invoke("evaluate", run, "learning-rate=1").exit_code == 2


def unlabelled(folder: Path) -> tuple[Path, list[str]]:
    """Write the validation sentences without their labels, and return both."""
    rows = [line.split("\t") for line in (folder / "validation.tsv").read_text().splitlines()[1:]]
    file = write_lines(folder.parent / "rows.jsonl", [{"sentence1": text} for text, _ in rows])
    return file, [label for _, label in rows]


@pytest.mark.parametrize("name", ["merged", "session"])
def test_classes_come_with_their_probability(trained: Any, name: str) -> None:
    run, result = trained(name)
    metrics = result.runs[-1].metrics
    file, labels = unlabelled(run.parent / "data")
    found = predict(run, file)
    hits = [row["label"] == label for row, label in zip(found, labels, strict=True)]
    assert sum(hits) / len(hits) == metrics["accuracy"]
    shares = [row["probability"] for row in found]
    rights = [p if hit else 1 - p for p, hit in zip(shares, hits, strict=True)]
    loss = -sum(map(math.log, rights)) / len(rights)
    assert min(shares) >= 0.5 and loss == pytest.approx(metrics["loss"], rel=1e-4)


def test_a_regression_gives_its_value(tmp_path: Path) -> None:
    data = write_sentences(tmp_path / "scores", lambda good: str(2.0 * good))
    run = text_options(tmp_path) | {"task": "regression", "data": str(data)}
    trained = lt.train(run).runs[-1].metrics
    file, scores = unlabelled(data)
    values = [row["value"] for row in predict(run["output"], file)]
    apart = [(value - float(score)) ** 2 for value, score in zip(values, scores, strict=True)]
    assert sum(apart) / len(apart) == pytest.approx(trained["loss"], rel=1e-4)
    assert evaluate(run["output"])["metrics"] == pytest.approx(trained, rel=1e-5)


def test_a_text_has_the_loss_of_each_row(
    chat_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"text": TEXT} for _ in range(20)]
    data = str(write_lines(tmp_path / "a.jsonl", lines))
    lt.train(chat_run, task="causal_lm", data=data, packing=True)
    texts = ["w1 good w2 bad", "", "w1", " ".join(["w9"] * 20)]
    file = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    found = predict(chat_run["output"], file)
    assert found[1] == found[2] == {"loss": None, "bits_per_byte": None}
    assert (
        "1 of 4 rows are longer than max_length = 16 (up to 20 tokens)" in capsys.readouterr().err
    )
    folder = Path(chat_run["output"]) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert found[0]["bits_per_byte"] == pytest.approx(loss / math.log(2) * 4 / 14, rel=1e-4)


def test_a_chat_is_answered_by_the_likeliest_tokens(
    chat_run: dict[str, Any], tmp_path: Path
) -> None:
    how = {"max_steps": 100, "learning_rate": 2e-2, "batch_size": 8, "eval_batch_size": 4}
    how |= {"save_steps": 100, "eval_steps": 100}
    lt.train(chat_run, methods=[lt.LoRA(rank=4)], **how)
    rows = chats(6)
    asked = [{"messages": row["messages"][:1]} for row in rows[:3]]
    file = write_lines(tmp_path / "rows.jsonl", [*asked, *rows[3:]])
    right = [row["messages"][1]["content"] for row in rows]
    found = predict(chat_run["output"], file, max_new_tokens=4)
    assert [row["answer"] for row in found] == right
    with pytest.raises(lt.ConfigError, match=r"max_new_tokens must be at most .* of row .* got 64"):
        predict(chat_run["output"], file, max_new_tokens=64)
    write_lines(file, [{"messages": rows[0]["messages"][1:]}])
    with pytest.raises(lt.ConfigError, match="row 1: messages must be a question"):
        predict(chat_run["output"], file)


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lt.ConfigError, match=r"must hold metrics\.json, got none"):
        evaluate(tmp_path)


def test_the_commands_print_scores_and_write_predictions(trained: Any, tmp_path: Path) -> None:
    run, result = trained("plain")
    file, _ = unlabelled(run.parent / "data")
    metrics = result.runs[-1].metrics
    found = invoke("evaluate", run, "eval-batch-size=5", "--json")
    document = json.loads(found.stdout)
    assert document["metrics"] == pytest.approx(metrics, rel=1e-5)
    shown = plain(invoke("evaluate", run, f"data={run.parent / 'data'}").stdout)
    score = f"{metrics['accuracy']:.4f}"
    assert f"accuracy {score} {score}" in shown and "on 16 rows of" in shown
    hints = {"daata=x": "did you mean 'data'?", "run=x": "got 'run'", "other.yaml": "'other.yaml'"}
    for argument, hint in hints.items():
        wrong = invoke("evaluate", run, argument)
        assert wrong.exit_code == 2 and hint in plain(wrong.stderr)
    output = tmp_path / "predicted.jsonl"
    how = ("predict", run, "--data", file, "--output", output)
    assert json.loads(invoke(*how, "--json").stdout)["num_rows"] == 16
    first = output.read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == 16 and all(row.keys() == {"label", "probability"} for row in rows)
    refused = invoke(*how)
    assert refused.exit_code == 2 and "output must be a new file" in plain(refused.stderr)
    assert "16 rows" in plain(invoke(*how, "--overwrite").stdout) and output.read_text() == first


def test_predictions_never_replace_the_data(tmp_path: Path) -> None:
    """Which is seen before anything is loaded."""
    file = write_lines(tmp_path / "rows.jsonl", [{"sentence1": "w1"}])
    before = file.read_text()
    refused = invoke("predict", tmp_path, "--data", file, "--output", file, "--overwrite")
    assert refused.exit_code == 2 and "output must be a new file" in plain(refused.stderr)
    assert file.read_text() == before
