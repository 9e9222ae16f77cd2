"""SparseGrad inside an unmodified Trainer: calibration, resuming, its own optimiser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import bert, make_trainer, same, token_rows, weights

import leantune as lt


def train(folder: Path, resume: Path | None = None, **options: Any):
    config = lt.SparseGrad(density=0.1, num_calibration_batches=3)
    session = lt.apply(bert(), config, seed=3)
    options = {"save_strategy": "steps", "save_steps": 1, **options}
    trainer = make_trainer(session.model, folder, [lt.TrainerCallback(session)], **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return weights(session.model), session


def test_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected, whole = train(tmp_path)
    for stop in (1, 3, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{stop}"
        got, resumed = train(tmp_path, resume=checkpoint, save_strategy="no")
        assert same(got, expected), stop
        assert resumed.step == whole.step == 7
    moved = [n for n in expected if n.endswith(".delta")]
    assert len(moved) == 4 and all(bool(expected[n].any()) for n in moved)


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2, "max_steps": 5}, {"bf16": True}], ids=str
)
def test_accumulation_and_bf16_resume_with_the_same_bits(tmp_path: Path, options: dict) -> None:
    expected, _ = train(tmp_path, **options)
    got, _ = train(tmp_path, resume=tmp_path / "checkpoint-3", **options)
    assert same(got, expected)
    assert all(value.isfinite().all() for value in got.values())


def test_it_learns_and_the_merged_model_is_plain(tmp_path: Path) -> None:
    options = {"max_steps": 60, "logging_steps": 5, "save_strategy": "no"}
    _, session = train(tmp_path, **options)
    batch = token_rows().with_format("torch")[:]
    session.model.eval()
    with torch.no_grad():
        loss = session.model(**batch).loss
        session.merge()
        assert abs(session.model(**batch).loss - loss) < 1e-4
    assert loss < 0.3
    assert type(session.model) is type(bert())
    assert session.model.state_dict().keys() == bert().state_dict().keys()


def test_sparse_gradients_are_refused_before_the_first_step(tmp_path: Path) -> None:
    session = lt.apply(bert(), lt.SparseGrad(selection="step", density=0.1))
    trainer = make_trainer(session.model, tmp_path, [lt.TrainerCallback(session)])
    with pytest.raises(lt.UnsupportedError, match=r"gradients must be dense.*got 4 .*session\.opt"):
        trainer.train()
