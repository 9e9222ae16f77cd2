"""Fixtures of the integration tests: one thread, Ctrl-C, and a run's inputs as folders."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.tiny import bert, text_run, tokenizer, write_sentences


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let SIGINT act as in a terminal; a shell may start its background jobs deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step's time is does not matter here."""
    monkeypatch.setattr("leantune.training.first_step.MEASURED_ROUNDS", 1)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with a tiny BERT encoder without a head, and the tokenizer."""
    folder = tmp_path / "model"
    bert().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Train and validation as TSV: the label is whether the sentence has a friendly word."""
    return write_sentences(tmp_path / "data", lambda good: str(int(good)))


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Options of a run of ten steps, five an epoch."""
    return text_run(tmp_path)
