"""Shared set-up: no network, fixed seeds, uninitialised memory filled with NaN, the gpu marker."""

import os

# Before any import of a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# Tests that put their own methods into the registry start from a full one.
import leantune.methods  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked gpu where there is no NVIDIA GPU, instead of skipping them",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models: a second thread only waits for the first, on a busy machine for long.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # Else every look for garbage goes through all that was imported: half the time of a short run.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        if item.config.getoption("--require-gpu"):
            pytest.fail("needs an NVIDIA GPU, and --require-gpu was given", pytrace=False)
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every new tensor with NaN (integers: the largest), so that an unwritten one shows.

    Torch offers it in deterministic mode only. That mode is harmless on the CPU; on a GPU it would
    swap the very kernels under test, so tests marked gpu run without.
    """
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
