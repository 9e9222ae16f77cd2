"""Liger where there is no GPU: refused by name; its kernels run in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import MODELS

import leantune as lt


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and importlib.util.find_spec("liger_kernel")),
    reason="needs triton and liger-kernel",
)
def test_liger_in_the_interpreter() -> None:
    """The interpreter's switch is read when triton is imported, hence a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_liger.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantune.core.apply.on_gpu", lambda device: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name)
    )
    model = MODELS["llama"].build()
    with pytest.raises(
        lt.UnsupportedError, match=r"^Liger: package liger_kernel must .*'leantune\[gpu\]'"
    ):
        lt.apply(model, lt.Liger())
    assert not any("forward" in vars(module) for module in model.modules())
