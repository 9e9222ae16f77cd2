"""A session inside an unmodified Trainer: every kind of run, and stopping and resuming."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
import transformers
from integration.tiny import bert, llama, make_trainer, same, token_rows, tokenizer, weights
from safetensors.torch import load_file, save_file

import leantune as lt
from leantune.core import registry
from leantune.core.config import MethodConfig, option
from leantune.core.conversion import Conversion
from leantune.core.registry import MethodSpec, register
from leantune.integrations.trainer import SESSION_FILE

# The older name is deprecated since the newer one exists.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)
PEERS_USE_THE_OLDER_NAME = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
Weights = dict[str, torch.Tensor]


def sampled(**options: Any) -> lt.WTACRS:
    return lt.WTACRS(keep_ratio=0.3, min_rows=2, **options)


def train(
    folder: Path,
    *methods: MethodConfig,
    resume: Path | None = None,
    model: Any = None,
    **options: Any,
) -> tuple[Weights, lt.Session]:
    """Train a tiny BERT and return its weights; by default every step leaves a checkpoint."""
    session = lt.apply(bert() if model is None else model, *methods, seed=3)
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    trainer = make_trainer(session.model, folder, [lt.TrainerCallback(session)], **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return weights(session.model), session


def test_a_plain_trainer_learns_with_sampled_rows(tmp_path: Path) -> None:
    session = lt.apply(bert(dropout=0.0), sampled())
    callbacks = [lt.TrainerCallback(session)]
    trainer = make_trainer(session.model, tmp_path, callbacks, max_steps=60, logging_steps=5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert (session.step, num_forwards(session)) == (60, 60)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, lt.Session, Path]:
    """A training that nothing stopped: its weights, its session, and its folder."""
    folder = tmp_path_factory.mktemp("usual")
    return (*train(folder, sampled()), folder)


def test_stopped_anywhere_and_resumed_ends_with_the_same_bits(usual: Any) -> None:
    expected, whole, folder = usual
    # Six steps an epoch: the last stop falls on the border of two epochs.
    for stop in (1, 4, 6):
        checkpoint = folder / f"checkpoint-{stop}"
        got, resumed = train(folder, sampled(), resume=checkpoint, save_strategy="no")
        assert same(got, expected), stop
        assert (resumed.step, num_forwards(resumed)) == (whole.step, num_forwards(whole)) == (7, 7)


def num_forwards(session: lt.Session) -> int:
    return int(session.state_dict()["counter"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_steps": 5},
        {CHECKPOINTING: True},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_to_train_resumes_with_the_same_bits(
    tmp_path: Path, options: dict, usual: Any
) -> None:
    expected, session = train(tmp_path, sampled(), **options)
    got, _ = train(tmp_path, sampled(), resume=tmp_path / "checkpoint-3", **options)
    assert same(got, expected)
    assert all(value.isfinite().all() for value in got.values())
    assert not same(usual[0], expected)
    assert session.step == options.get("max_steps", 7)
    assert num_forwards(session) == session.step * options.get("gradient_accumulation_steps", 1)


def test_other_draws_after_the_stop_end_elsewhere(tmp_path: Path, usual: Any) -> None:
    """The control of the tests above: they would notice a state that is not restored."""
    expected, _, folder = usual
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    file = tmp_path / "checkpoint-3" / SESSION_FILE
    state = load_file(file)
    save_file({**state, "counter": torch.zeros_like(state["counter"])}, file)
    without_draw, _ = train(tmp_path, sampled(), resume=file.parent)
    assert not same(without_draw, expected)
    save_file({key: state[key] for key in ("counter", "step", "seed")}, file)
    without_norms, _ = train(tmp_path, sampled(), resume=file.parent)
    assert not same(without_norms, expected)


def test_a_checkpoint_without_its_session_is_refused(tmp_path: Path) -> None:
    train(tmp_path, sampled(), max_steps=2)
    file = tmp_path / "checkpoint-1" / SESSION_FILE
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(lt.ConfigError, match="whole safetensors file, got a truncated"):
        train(tmp_path, sampled(), resume=file.parent, max_steps=2)
    file.unlink()
    with pytest.raises(lt.ConfigError, match=r"must hold leantune_session.*an earlier checkpoint"):
        train(tmp_path, sampled(), resume=file.parent, max_steps=2)


def test_a_checkpoint_elsewhere_is_named_or_found_in_the_arguments(
    tmp_path: Path, usual: Any
) -> None:
    expected, _, folder = usual
    moved = tmp_path / "kept"
    shutil.copytree(folder / "checkpoint-3", moved)
    with pytest.raises(lt.ConfigError, match=r"resume_from=\.\.\."):
        train(tmp_path / "b", sampled(), resume=moved)
    got, _ = train(tmp_path / "b", sampled(), resume=moved, resume_from_checkpoint=str(moved))
    assert same(got, expected)

    def explicit(step: str | None) -> Weights:
        session = lt.apply(bert(), sampled(), seed=3)
        callbacks = [lt.TrainerCallback(session, resume_from=moved)]
        trainer = make_trainer(session.model, tmp_path / "c", callbacks)
        trainer.train(resume_from_checkpoint=step)
        return weights(session.model)

    assert same(explicit(str(moved)), expected)
    with pytest.raises(lt.ConfigError, match="resume_from must be left out"):
        explicit(None)


def test_a_closed_or_foreign_session_is_refused(tmp_path: Path) -> None:
    session = lt.apply(bert(), sampled())
    with pytest.raises(lt.ConfigError, match="model must be the session's"):
        make_trainer(bert(), tmp_path, [lt.TrainerCallback(session)]).train()
    session.remove()
    with pytest.raises(lt.ConfigError, match="session must be open"):
        make_trainer(session.model, tmp_path, [lt.TrainerCallback(session)]).train()


def test_cached_norms_know_each_sample_and_resume_with_the_same_bits(tmp_path: Path) -> None:
    rows = token_rows()
    options = {
        "dataset": rows.add_column("sample_id", range(len(rows))),
        "remove_unused_columns": False,
        "gradient_accumulation_steps": 2,
    }
    method = sampled(norms="cache")
    expected, session = train(tmp_path, method, **options)
    norms = session.state_dict()["0.wta_crs/norms/cache"]
    assert len(norms) == len(rows) and norms.amax((1, 2)).all()
    checkpoint = tmp_path / "checkpoint-4"
    got, _ = train(tmp_path, method, resume=checkpoint, **{**options, "save_strategy": "no"})
    assert same(got, expected)
    with pytest.raises(lt.ConfigError, match=r"remove_unused_columns must be False .*got True"):
        train(tmp_path, method, dataset=options["dataset"])


@dataclass(frozen=True, kw_only=True)
class Penalty(MethodConfig):
    """Punish large outputs of each MLP, and note what calibration shows."""

    method: ClassVar[str] = "penalty_of_tests"

    weight: float = option(1.0, ge=0, help="factor of the auxiliary loss")


SHOWN: list[torch.Tensor] = []


class _Punished(Conversion):
    num_calibration_batches = 8

    def __init__(self, model: Any, sites: list, config: Penalty, runtime: Any) -> None:
        def punish(module: Any, args: Any, output: torch.Tensor) -> None:
            runtime.add_auxiliary_loss(config.weight * output.square().mean())

        self.model = model
        self.handles = [site.module.register_forward_hook(punish) for site in sites]

    def calibrate(self, batches: Any) -> None:
        for batch in batches:
            SHOWN.append(batch["input_ids"])
            self.model(**batch)

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def penalty() -> Iterator[type[Penalty]]:
    SHOWN.clear()
    spec = MethodSpec(
        config=Penalty,
        axis="evaluated",
        roles=("mlp",),
        summary="for tests",
        source="none",
        convert=_Punished,
    )
    register(spec)
    yield Penalty
    del registry._METHODS[Penalty.method]


def by_hand(method: MethodConfig, steps: tuple[int, ...], extra: bool) -> Weights:
    """Plain SGD on the rows in order; ``steps`` says how many micro-batches each step has."""
    model = bert(dropout=0.0).train()
    session = lt.apply(model, method)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    rows = token_rows().with_format("torch")
    first = 0
    for num_micro in steps:
        for _ in range(num_micro):
            loss = model(**rows[first : first + 4]).loss
            first += 4
            if extra:
                loss = loss + session.auxiliary_loss() / num_micro
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


# Six batches an epoch: the last case ends with a step of fewer micro-batches than asked for.
@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 2, 2), (4, 2)], ids=str)
def test_the_trainer_adds_auxiliary_losses(
    tmp_path: Path, penalty: Any, steps: tuple[int, ...]
) -> None:
    session = lt.apply(bert(dropout=0.0), penalty())
    trainer = make_trainer(
        session.model,
        tmp_path,
        [lt.TrainerCallback(session)],
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=steps[0],
        max_steps=len(steps),
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    got = weights(session.model)

    def distance(other: Weights) -> float:
        return max(float((got[name] - other[name]).abs().max()) for name in got)

    # This BERT head ignores the trainer's num_items_in_batch: micro-batch losses add up.
    assert distance(by_hand(penalty(), steps, extra=True)) < 1e-5
    assert distance(by_hand(penalty(), steps, extra=False)) > 1e-3
    # Outside of training the model's loss is its own again.
    rows = token_rows().with_format("torch")[:4]
    session.model.train()
    with_hook = session.model(**rows).loss
    session.remove()
    assert torch.equal(with_hook, session.model(**rows).loss)


def test_an_auxiliary_loss_that_would_be_lost_is_an_error(tmp_path: Path, penalty: Any) -> None:
    session = lt.apply(bert(), penalty())
    callbacks = [lt.TrainerCallback(session)]
    trainer = make_trainer(session.model, tmp_path, callbacks, label_smoothing_factor=0.1)
    with pytest.raises(lt.UnsupportedError, match="loss must be the one that the model returns"):
        trainer.train()

    def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    session = lt.apply(bert(), penalty())
    trainer = make_trainer(session.model, tmp_path, [lt.TrainerCallback(session)])
    trainer.compute_loss_func = own_loss
    with pytest.raises(lt.UnsupportedError, match="a trainer that computes its own"):
        trainer.train()


def test_calibration_sees_spread_rows_and_moves_nothing(tmp_path: Path, penalty: Any) -> None:
    rows = token_rows(num_rows=96)
    options: dict[str, Any] = {"dataset": rows, "save_strategy": "no", "max_steps": 3}
    with_calibration, _ = train(tmp_path, penalty(weight=0.0), **options)
    shown = torch.cat(SHOWN)
    every_third = torch.tensor([rows[i]["input_ids"] for i in range(0, 96, 3)])
    assert torch.equal(shown, every_third)
    model = bert()
    trainer = make_trainer(model, tmp_path, [], **options)
    trainer.train()
    assert same(with_calibration, weights(model))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**token_rows().remove_columns("labels").with_format("torch")[:]).logits


@PEERS_USE_THE_OLDER_NAME
def test_our_lora_trains_resumes_and_loads_without_us(tmp_path: Path) -> None:
    import peft

    recipe = (lt.LoRA(rank=4), sampled())
    expected, session = train(tmp_path / "a", *recipe)
    got, _ = train(tmp_path / "a", *recipe, resume=tmp_path / "a" / "checkpoint-3")
    assert same(got, expected)
    session.model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(session.model))
    assert not torch.equal(logits(bert()), logits(session.model))


@PEERS_USE_THE_OLDER_NAME
def test_sft_trainer_trains_and_resumes(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    rows = datasets.Dataset.from_dict({"input_ids": token_rows()["input_ids"][:]})

    def run(resume: str | None = None) -> Weights:
        session = lt.apply(llama(), sampled())
        trainer = trl.SFTTrainer(
            session.model,
            trl.SFTConfig(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=4,
                save_steps=1,
                learning_rate=1e-2,
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            processing_class=tokenizer(),
            callbacks=[lt.TrainerCallback(session)],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert num_forwards(session) == session.step == 4
        return weights(session.model)

    expected = run()
    assert not same(expected, weights(llama()))
    assert same(run(str(tmp_path / "checkpoint-2")), expected)


def sft(folder: Path, session: lt.Session, rows: datasets.Dataset, **options: Any) -> Any:
    """Make an SFTTrainer that walks through the rows in order with plain SGD."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    args = trl.SFTConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
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
        **{CHECKPOINTING: False},
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    callbacks = [lt.TrainerCallback(session)]
    return trl.SFTTrainer(
        session.model, args, train_dataset=rows, processing_class=tokenizer(), callbacks=callbacks
    )


@PEERS_USE_THE_OLDER_NAME
def test_sft_trainer_adds_auxiliary_losses(tmp_path: Path, penalty: Any) -> None:
    ids = token_rows()["input_ids"][:]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})

    def by_hand(extra: float) -> Weights:
        model = llama().train()
        session = lt.apply(model, penalty(weight=1e5))
        optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
        for first in (0, 8):
            for at in (first, first + 4):
                batch = torch.tensor(ids[at : at + 4])
                loss = model(input_ids=batch, labels=batch).loss
                ((loss + extra * session.auxiliary_loss()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(model)

    session = lt.apply(llama(), penalty(weight=1e5))
    sft(tmp_path, session, rows).train()
    got = weights(session.model)

    def distance(other: Weights) -> float:
        return max(float((got[name] - other[name]).abs().max()) for name in got)

    assert distance(by_hand(1.0)) < 1e-5
    assert distance(by_hand(0.0)) > 1e-3


@PEERS_USE_THE_OLDER_NAME
def test_a_loss_of_trl_that_is_no_sum_refuses_auxiliary_losses(
    tmp_path: Path, penalty: Any
) -> None:
    ids = token_rows()["input_ids"][:]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    session = lt.apply(llama(), penalty(weight=1e5))
    with pytest.raises(lt.UnsupportedError, match="loss must be the one that the model returns"):
        sft(tmp_path, session, rows, loss_type="dft").train()
