"""Pairs of answers train an unmodified DPOTrainer: every method, resumption, the reference."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from integration.test_trainer import CHECKPOINTING, penalty  # noqa: F401
from integration.tiny import cut_off, llama, same, saved_weights, tokenizer, weights
from training.chats import chats, run_options

import leantune as lt
from leantune.errors import UnsupportedError
from leantune.training.results import RunResult

pytest.importorskip("trl", reason="trl is not installed")
pytestmark = pytest.mark.filterwarnings(
    # TRL 1.0 and peft call a model by transformers' older names.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
LORA = lt.LoRA(rank=4)
SAMPLED = lt.WTACRS(keep_ratio=0.3, min_rows=2)


def pairs(count: int) -> list[dict[str, Any]]:
    """Make whole chats of one question each, one with the right answer and one with the other."""
    rows = []
    for row in chats(count):
        question, right = row["messages"]
        wrong = "sad" if right["content"] != "sad" else "fine nice"
        other = [question, {"role": "assistant", "content": wrong}]
        rows.append({"chosen": [question, right], "rejected": other})
    return rows


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Options of a run of eight steps, two batches in each."""
    return {**run_options(tmp_path, pairs), "task": "preference"}


def test_a_compared_run_learns_to_prefer(base: dict[str, Any]) -> None:
    options = {"methods": [LORA, SAMPLED], "compare": ["baseline"], "epochs": 10, "batch_size": 8}
    options |= {"gradient_accumulation_steps": 1, "save_steps": 100, "learning_rate": 5e-3}
    result = lt.train(base, **options, eval_batch_size=10)
    assert (result.main_metric, result.floor) == ("rewards/accuracies", None)
    for run in result.runs:
        assert {"loss", "rewards/accuracies", "rewards/margins"} <= run.metrics.keys()
        assert "perplexity" not in run.metrics
        assert (
            run.metrics["rewards/accuracies"] == 1.0 > run.evaluations[0][1]["rewards/accuracies"]
        )
        # Before the first step policy and reference agree.
        assert run.train_loss[0][1] == pytest.approx(0.6931, abs=1e-4)
        assert run.metrics["loss"] < 0.67
    plain, sampled = result.runs
    assert sampled.saved_bytes < plain.saved_bytes
    assert {"model", "adapter", "session"} <= {path.name for path in Path(base["output"]).iterdir()}


class Look(transformers.TrainerCallback):
    """Keep what the trainer trains on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows = kwargs["train_dataloader"].dataset


METHODS: dict[str, list[Any]] = {
    "plain": [],
    "lora+wta_crs+checkpoint": [LORA, SAMPLED, lt.Checkpoint()],
    "spt": [LORA, lt.SPTAttention(min_keys=2, num_codewords=4, subspace_width=4)],
    "routed_ffn": [LORA, lt.RoutedFFN()],
    "sparse_grad": [lt.SparseGrad(density=0.1, num_calibration_batches=2)],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, ...]]:
    """Return a function that trains by the methods of a name, once: options, result and rows.

    TRL cannot load a second model meanwhile.
    """

    @cache
    def train(name: str) -> tuple[dict[str, Any], RunResult, Any]:
        options = run_options(tmp_path_factory.mktemp("run"), pairs)
        options |= {"task": "preference", "methods": METHODS[name], "save_steps": 3}
        look, dpo = Look(), pytest.importorskip("trl.trainer.dpo_trainer")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "create_model_from_path", None)
            return options, lt.train(options, callbacks=[look]), look.rows

    return train


@pytest.mark.parametrize("name", METHODS)
def test_cut_off_and_resumed_ends_with_the_same_bits(
    trained: Any, tmp_path: Path, name: str
) -> None:
    options, whole, _ = trained(name)
    cut_off(options["output"], tmp_path / "run", 6)
    resumed = lt.train(options, output=tmp_path / "run", resume=True)
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations
    assert resumed.runs[0].num_steps == 8
    if (tmp_path / "run" / "model").is_dir():
        assert same(saved_weights(tmp_path / "run"), saved_weights(options["output"]))


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-likelihood of an answer."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(answer)), answer].sum()


@pytest.mark.parametrize("name", ["plain", "lora+wta_crs+checkpoint", "spt", "routed_ffn"])
def test_the_reference_is_the_loaded_model_and_no_second_one(trained: Any, name: str) -> None:
    """Also where a method changes what forward computes: only the policy is routed or sparse."""
    *_, rows = trained(name)
    plain = llama().eval()
    for row in rows.select(range(4)):
        for answer in ("chosen", "rejected"):
            expected = log_probs(plain, row["prompt_ids"], row[f"{answer}_ids"])
            assert row[f"ref_{answer}_logps"] == pytest.approx(expected.item(), abs=1e-4)


def test_checkpointing_stays_as_it_was_chosen(base: dict[str, Any]) -> None:
    class Flags(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            self.seen = [layer.gradient_checkpointing for layer in model.model.layers]

    flags = Flags()
    first = lt.Checkpoint(sites="model.layers.0")
    lt.train(base, methods=[LORA, first], callbacks=[flags], epochs=1)
    assert flags.seen == [True, False]


def test_numbers_of_samples_are_refused(base: dict[str, Any]) -> None:
    cache = lt.WTACRS(keep_ratio=0.3, min_rows=2, norms="cache")
    with pytest.raises(lt.ConfigError, match="task must be another where a method needs to know"):
        lt.train(base, methods=[cache])


def test_several_processes_are_refused(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 2)
    with pytest.raises(UnsupportedError, match="preference must train in one process, got 2"):
        lt.train(base)
    assert not Path(base["output"]).exists()


def pair_rows() -> datasets.Dataset:
    draw = [f"w{i % 40}" for i in range(200)]
    return datasets.Dataset.from_list(
        [
            {"prompt": draw[i] + " ", "chosen": f"good {draw[i + 1]}", "rejected": "bad"}
            for i in range(16)
        ]
    )


def dpo(folder: Path, model: Any, callbacks: list[Any], **options: Any) -> Any:
    """Make a DPOTrainer that walks through the rows in order with plain SGD, two steps."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    args = trl.DPOConfig(
        str(folder),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"train_sampling_strategy": "sequential", CHECKPOINTING: False, **options},
    )
    tools = {"processing_class": tokenizer(), "callbacks": callbacks}
    return trl.DPOTrainer(model, llama(), args, train_dataset=pair_rows(), **tools)


def dpo_loss(model: Any, plain: Any, rows: Any) -> torch.Tensor:
    """Return the loss of some rows, all answers in one forward as in the trainer."""
    words = tokenizer()
    pairs = [
        (words(row["prompt"])["input_ids"], words(f"{row[name]} [EOS]")["input_ids"])
        for name in ("chosen", "rejected")
        for row in rows
    ]
    whole = [torch.tensor(a + b) for a, b in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in whole], True)
    logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    ratios = [
        logits[i, range(len(a) - 1, len(a) + len(b) - 1), b].sum() - log_probs(plain, a, b).detach()
        for i, (a, b) in enumerate(pairs)
    ]
    margins = torch.stack(ratios[: len(rows)]) - torch.stack(ratios[len(rows) :])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


def test_dpo_trainer_adds_auxiliary_losses(tmp_path: Path, penalty: Any) -> None:  # noqa: F811
    def by_hand(extra: float) -> dict[str, torch.Tensor]:
        model = llama().train()
        session = lt.apply(model, penalty(weight=1e5))
        optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
        for first in (0, 8):
            for at in (first, first + 4):
                loss = dpo_loss(model, llama(), pair_rows().select(range(at, at + 4)))
                ((loss + extra * session.auxiliary_loss()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    session = lt.apply(llama(), penalty(weight=1e5))
    dpo(tmp_path, session.model, [lt.TrainerCallback(session)]).train()
    got = weights(session.model)

    def distance(other: dict[str, torch.Tensor]) -> float:
        return max(float((got[name] - other[name]).abs().max()) for name in got)

    assert distance(by_hand(1.0)) < 1e-5
    assert distance(by_hand(0.0)) > 1e-3


def test_auxiliary_losses_refuse_float16(tmp_path: Path, penalty: Any) -> None:  # noqa: F811
    session = lt.apply(llama(), penalty(weight=1.0))
    callback = lt.TrainerCallback(session)
    trainer = dpo(tmp_path, session.model, [callback])
    trainer.args.fp16 = True
    with pytest.raises(UnsupportedError, match="under DPOTrainer fp16"):
        trainer.train()


def test_methods_after_the_trainer_leave_it_a_plain_reference(tmp_path: Path) -> None:
    """As the documentation advises; TRL 1.0 is given the second model that it would load."""
    model, look = llama(), Look()
    trainer = dpo(tmp_path, model, [look], precompute_ref_log_probs=True)
    session = lt.apply(model, LORA, lt.Checkpoint(offload=True), lt.RoutedFFN())
    recompute = model.model.layers[0]._gradient_checkpointing_func
    trainer.add_callback(lt.TrainerCallback(session))
    trainer.train()
    assert model.model.layers[0]._gradient_checkpointing_func is recompute
    row = look.rows[0]
    expected = log_probs(llama().eval(), row["prompt_ids"], row["chosen_ids"])
    assert row["ref_chosen_logps"] == pytest.approx(expected.item(), abs=1e-4)
    assert session.step == 2
    session.remove()


def test_an_adapter_of_peft_is_its_own_reference(tmp_path: Path) -> None:
    """TRL copies it under a session, switches to the copy in each step, and back."""
    peft = pytest.importorskip("peft")
    trl = pytest.importorskip("trl")

    def run(*methods: Any) -> list[dict[str, Any]]:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = peft.get_peft_model(llama(), config)
        session = lt.apply(model, *methods) if methods else None
        callbacks = [lt.TrainerCallback(session)] if session else []
        args = dpo(tmp_path, llama(), []).args
        tools = {"processing_class": tokenizer(), "callbacks": callbacks}
        trainer = trl.DPOTrainer(model, args=args, train_dataset=pair_rows(), **tools)
        trainer.train()
        assert trainer.ref_model is None
        if session is not None:
            assert int(session.state_dict()["counter"]) == 4
            session.merge()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    plain, sampled = run(), run(lt.WTACRS(keep_ratio=0.5, min_rows=2))
    assert sampled[0]["loss"] == plain[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
