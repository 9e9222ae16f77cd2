"""Run the kernels' tests in Triton's interpreter, which reads its switch when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
IS_TOO_OLD = Version(triton.__version__) < Version("3.9") and Version(np.__version__) >= Version(
    "2.4"
)


@pytest.mark.slow
@pytest.mark.skipif(IS_TOO_OLD, reason="the interpreter of Triton 3.6 wants numpy below 2.4")
@pytest.mark.parametrize(
    "name", ["test_rows_triton.py", "test_launches.py", "../planner/test_order_on_gpu.py"]
)
def test_in_the_interpreter(name: str) -> None:
    forced = {} if name == "test_rows_triton.py" else {"LEANTUNE_KERNELS": "triton"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", name],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", **forced},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
