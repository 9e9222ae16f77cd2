"""What sampling costs beside its products: operations, launches and host time, before and now.

A GPU waits for its host where that takes longer to launch than it takes to compute. All of this is
counted on a CPU in tiny shapes: what launches does not depend on the shape. Each source runs in a
process of its own; this file runs under the older one, too, and imports nothing of ``bench`` there.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

BEFORE = "c8965d4"
RESULT = "host"
ROOT = Path(__file__).parents[1]
COLUMNS = {
    "case": "",
    "variant": "variant",
    "operations": "operations on a CPU",
    "launches": "launches on a GPU",
    "host_us": "us of the CPU",
}
COUNTED = ("operations", "launches", "host_us")
NUM_WARM_UP, NUM_TIMED = 20, 300

# What computes nothing: views, allocations, and a number that the host reads.
NOTHING = (
    *("detach", "view", "_unsafe_view", "expand", "t", "slice", "select", "unsqueeze", "alias"),
    *("transpose", "as_strided", "permute", "split", "squeeze", "lift_fresh"),
    "split_with_sizes",
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    "_local_scalar_dense",
)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in NOTHING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], object]) -> list[str]:
    """Name the operations that a function computes with."""
    with _Count() as count:
        function()
    return count.names


class Block(nn.Module):
    """A Llama decoder block, as an example of one that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama import modeling_llama as llama

        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList([llama.LlamaDecoderLayer(config, 0)])
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        return self.layers[0](x, position_embeddings=positions)


CASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(32, 32)),
    "Llama block": Block,
}


def _methods(lt: Any) -> dict[str, tuple[Any, ...]]:
    tenth = lt.WTACRS(keep_ratio=0.1, min_rows=2)
    return {
        "exact": (),
        "WTA-CRS 0.1": (tenth,),
        "WTA-CRS 0.1, activation norms": (
            lt.WTACRS(keep_ratio=0.1, min_rows=2, norms="activation"),
        ),
        "checkpointing": (lt.Checkpoint(),),
        "checkpointing + WTA-CRS 0.1": (lt.Checkpoint(), tenth),
    }


def measure() -> list[dict[str, Any]]:
    """Return a row for each case and variant under the source that is imported."""
    import leantune as lt

    found: list[dict[str, Any]] = []
    for case, build in CASES.items():
        for variant, methods in _methods(lt).items():
            if case == "linear" and "checkpointing" in variant:
                continue
            torch.manual_seed(0)
            model = build()
            session = lt.apply(model, *methods) if methods else None
            found.append({"case": case, "variant": variant, **_step(model, session)})
    return found


def _step(model: nn.Module, session: Any) -> dict[str, Any]:
    """Count one step after the first ones, which learn; gradients are made anew."""
    launched = unseen_launches()

    def step() -> float:
        model.zero_grad()
        x = torch.randn(4, 16, 32, requires_grad=True)
        start = time.thread_time()
        model(x).square().sum().backward()
        return time.thread_time() - start

    for _ in range(NUM_WARM_UP - 1):  # of step 19 gradients are not looked at
        step()
        if session is not None:
            session.on_step()
    before = launched()
    names = operations(step)
    launches = len(names) + launched() - before
    times = [] if launched() else [step() for _ in range(NUM_TIMED)]
    return {
        "operations": len(names),
        "launches": launches,
        "host_us": min(times, default=0.0) * 1e6,
    }


def unseen_launches() -> Callable[[], int]:
    """Let Triton's interpreter run kernels out of sight of the count; return theirs."""
    if os.environ.get("LEANTUNE_KERNELS") != "triton":
        return lambda: 0
    from leantune.ops import backend, rows_triton

    launch = rows_triton._launch
    if launch.__module__ != __name__:

        def unseen(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(*args, **kwargs)

        unseen.__module__ = __name__
        rows_triton._launch = unseen
    return backend.num_launches


def main() -> None:
    """Count under both sources, the newer one with its kernels too; write rows and print them."""
    from bench import rows

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "-C", str(ROOT), "archive", BEFORE, "src"]
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as source:
            source.extractall(folder, filter="data")
        found += [r | {"source": BEFORE} for r in _run(Path(folder) / "src")]
    kernels = _run(ROOT / "src", TRITON_INTERPRET="1", LEANTUNE_KERNELS="triton")
    for row, with_kernels in zip(_run(ROOT / "src"), kernels, strict=True):
        found.append(row | {"source": "now", "launches": with_kernels["launches"]})
    rows.replace(RESULT, ("case", "variant", "source"), found)
    print(rows.table(found, {"source": "source", **COLUMNS}))


def _run(source: Path, **environment: str) -> list[dict[str, Any]]:
    # -P: the folder of this file must not hide modules of others.
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", __file__],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure()))
